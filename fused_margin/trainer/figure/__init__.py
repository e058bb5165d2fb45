"""Figures of 2-d embeddings that several losses learn."""
