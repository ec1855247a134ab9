"""Sparse autoencoders: one architecture a file, training, metrics, and SAELens' file format."""
