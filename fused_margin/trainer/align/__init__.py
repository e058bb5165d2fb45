"""Alignment of faces by landmarks."""
