"""Checkpoints: written whole or not at all, read without running code from them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 2  # raised when a checkpoint of an older version can no longer be read
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


def remove_partial_checkpoints(path: Path) -> None:
    """Delete what savers of `path` that were killed have left beside it."""
    for temporary in path.parent.glob(f"{path.name}.*.tmp"):
        saver = temporary.name.removeprefix(f"{path.name}.").removesuffix(".tmp")
        if saver.isdecimal() and not _runs(int(saver)):
            temporary.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    if process == os.getpid():
        return False  # this one's number was another's before
    try:
        os.kill(process, 0)  # asks without sending anything
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


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


def backbone_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """State dict of the backbone in a checkpoint: of the weights' moving average where there is one."""
    if state["average"] is not None:
        return _under("module.", state["average"])
    return _under("backbone.", state["model"])


def criterion_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """State dict of the criterion in a checkpoint."""
    return _under("criterion.", state["model"])


def _under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def latest_run(runs: Path) -> Path | None:
    """The folder in `runs` whose checkpoint was written last."""
    checkpoints = list(runs.glob(f"*/{FILE_NAME}"))
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent if checkpoints else None
