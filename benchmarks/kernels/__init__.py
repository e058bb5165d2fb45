"""Tensor-core kernels and half-precision steps on a GPU: `python -m benchmarks kernels --device cuda`."""
