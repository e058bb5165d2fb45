"""Reads files written by torch.save."""

from __future__ import annotations

import os
from typing import Any

import torch

# First bytes of a file written by torch.save: a zip archive, or, before torch 1.6, a pickled number.
FIRST_BYTES = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")


class UnreadableFileError(ValueError):
    """A file is truncated, empty, or not written by torch.save. The message names the file."""


def load_tensors(path: str | os.PathLike, **options: Any) -> Any:
    """Loads a file of tensors and plain values to the CPU, by ``torch.load`` with ``weights_only=True``.

    Args:
        path: the file.
        **options: other arguments of ``torch.load``.

    Raises:
        FileNotFoundError: if there is no such file.
        UnreadableFileError: if the file cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except FileNotFoundError:
        raise
    # Arbitrary bytes can raise any exception in the unpickler.
    except Exception as error:
        raise UnreadableFileError(f"{path}: {_reason(path, error)}") from error


def _reason(path: str | os.PathLike, error: Exception) -> str:
    """Describes why the file cannot be read. torch's message advises to load untrusted files without protection."""
    if isinstance(error, OSError):
        return str(error)
    with open(path, "rb") as file:
        head = file.read(max(map(len, FIRST_BYTES)))
    if not head:
        return "the file is empty"
    if not head.startswith(FIRST_BYTES):
        return "it is not a file written by torch.save"
    if "weights_only" in str(error):
        return "it contains other objects than tensors and plain values, which are not read because they could run code"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
