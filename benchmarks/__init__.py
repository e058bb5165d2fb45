"""Measurements of fused_margin, one folder for each study: see benchmarks/README.md."""
