"""Certified refresh of nearest classes during a training: `python -m benchmarks.certified`."""
