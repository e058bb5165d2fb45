"""Tests that run the code of the CUDA kernels on the host."""
