"""Checkpoints: written whole or not at all, read without running code from them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

FORMAT = 1  # raised when a checkpoint of an older version can no longer be read
FILE_NAME = "checkpoint.pt"


class CheckpointError(Exception):
    """A checkpoint is missing, damaged or of another version."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` beside `path`, then move it there: a kill leaves the old file or the new."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU.

    Raises:
        CheckpointError: there is none, it is damaged, or another version wrote it.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"cannot read the checkpoint {path}: {reason[0]}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version of the trainer")
    return state


def latest_run(runs: Path) -> Path | None:
    """The folder in `runs` whose checkpoint was written last."""
    checkpoints = list(runs.glob(f"*/{FILE_NAME}"))
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent if checkpoints else None
