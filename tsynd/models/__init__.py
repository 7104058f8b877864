"""Autoencoders and networks: adapters, files, folding, stages, memory layouts."""
