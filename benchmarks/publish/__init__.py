"""Results of a GPU in docs/results/gpu.md and docs/results/scaling.md: `python -m benchmarks.publish`."""
