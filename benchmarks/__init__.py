"""Side-by-side measurements of fused_margin and what its users use today: `python -m benchmarks`."""
