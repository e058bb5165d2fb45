"""Results of a GPU in README.md and docs/results/scaling.md: `python -m benchmarks.publish`."""
