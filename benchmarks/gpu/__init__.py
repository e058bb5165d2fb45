"""Builds, checks, profiles and times the CUDA kernels on a GPU within a time limit: `python -m benchmarks.gpu`."""
