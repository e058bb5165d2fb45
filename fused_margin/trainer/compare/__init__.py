"""Comparison of several losses with the same settings."""
