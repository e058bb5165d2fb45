"""Nearest classes of hundreds of thousands on a CPU: `python -m benchmarks.many_classes`."""
