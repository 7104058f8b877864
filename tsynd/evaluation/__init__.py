"""Scores of classifiers and of images: metrics, shifts, attacks, quality."""
