"""Classes divided among processes, measured and modelled: `python -m benchmarks.sharding`."""
