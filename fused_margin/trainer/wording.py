"""Numbers and what is counted, for the screen."""

from __future__ import annotations


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """The number with its noun: "1 image", "2,603 identities"; the plural has an s if it is not given."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def identities(number: int) -> str:
    return counted(number, "identity", "identities")
