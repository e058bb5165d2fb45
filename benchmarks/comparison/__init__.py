"""Time, peak memory and accuracy of fused_margin beside its peers: `python -m benchmarks`."""
