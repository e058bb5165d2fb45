"""Every loss and single operations beside plain PyTorch, by pytest-benchmark: `pytest benchmarks/micro`."""
