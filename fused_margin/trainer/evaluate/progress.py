"""Texts of the progress of evaluations, which a console shows."""

from __future__ import annotations

from collections.abc import Callable

from fused_margin.evaluation.nearest_rows import Progress

Show = Callable[[str], None]  # shows a text in place of the last one


def show_progress(show: Show, text: str, unit: str) -> Progress:
    """A function that shows "`text`: 1,000 of 2,000 `unit`" of the numbers it is called with."""
    return lambda done, total: show(f"{text}: {done:,} of {total:,} {unit}")


def show_embedding(show: Show, images: str = "") -> Progress:
    """`show_progress` of computing features of images; `images` says which, if there are several kinds."""
    return show_progress(show, f"computing features of the {images}" if images else "computing features", "images")
