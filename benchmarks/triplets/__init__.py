"""Triplet loss beside pytorch-metric-learning: time and peak memory of a step."""
