"""Numbers with their nouns, for messages."""

from __future__ import annotations


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """The number with its noun: "1 image", "2,603 identities". The default plural appends an s."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def counted_identities(number: int) -> str:
    return counted(number, "identity", "identities")
