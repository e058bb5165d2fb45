"""The exact search for the nearest classes, and its cache between steps."""

from fused_margin._ops.nearest.search import find_nearest_classes

__all__ = ["find_nearest_classes"]
