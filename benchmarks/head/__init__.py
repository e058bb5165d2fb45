"""Whole training steps of a classification head, beside peers: `python -m benchmarks head`."""
