"""Reading of files that torch.save has written."""

from __future__ import annotations

import os
from typing import Any

import torch

# How files of torch.save begin: as a zip archive, or, before torch 1.6, with a pickled number.
FIRST_BYTES = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")


class UnreadableFileError(ValueError):
    """A file is truncated, empty, or not one that torch.save has written; the message names it."""


def load_tensors(path: str | os.PathLike, **options: Any) -> Any:
    """``torch.load`` to the CPU that reads tensors and plain values only; `options` are its other arguments.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableFileError: it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except FileNotFoundError:
        raise
    # The unpickler meets arbitrary bytes here, and any exception can come of them.
    except Exception as error:
        raise UnreadableFileError(f"{path}: {_reason(path, error)}") from error


def _reason(path: str | os.PathLike, error: Exception) -> str:
    """What is wrong with the file: torch's own words advise to load files of other kinds without its protection."""
    if isinstance(error, OSError):
        return str(error)
    with open(path, "rb") as file:
        head = file.read(max(map(len, FIRST_BYTES)))
    if not head:
        return "the file is empty"
    if not head.startswith(FIRST_BYTES):
        return "it is not a file that torch.save has written"
    if "weights_only" in str(error):
        return "it holds other objects than tensors and plain values, which are not read because they could run code"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
