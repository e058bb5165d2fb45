"""Reading of files that torch.save has written."""

from __future__ import annotations

import os
from typing import Any

import torch


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
        if not os.path.isdir(path) and os.path.getsize(path) == 0:
            reason = "the file is empty"
        else:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnreadableFileError(f"{path}: {reason}") from error
