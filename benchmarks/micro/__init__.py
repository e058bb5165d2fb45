"""Single operations, by pytest-benchmark: `pytest benchmarks/micro`."""
