"""The drop-ins beside the libraries that they replace: `python -m benchmarks.parity`."""
