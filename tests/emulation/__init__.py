"""The CUDA kernels' code, run on the host."""
