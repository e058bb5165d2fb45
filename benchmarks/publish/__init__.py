"""Results of a GPU in README.md and docs/scaling.md: `python -m benchmarks.publish`."""
