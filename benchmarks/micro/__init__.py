"""Single operations of ours, by pytest-benchmark."""
