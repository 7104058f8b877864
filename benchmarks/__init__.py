"""Benchmarks as programs: ``python -m benchmarks head``."""
