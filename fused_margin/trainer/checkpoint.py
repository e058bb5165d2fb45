"""Checkpoints: written whole or not at all, read without running code from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_margin._tensor_files import UnreadableFileError, load_tensors

FORMAT = 2  # raised when a checkpoint of an older version can no longer be read
FILE_NAME, WEIGHTS_NAME = "checkpoint.pt", "backbone.pt"  # of a run, and of its exported backbone
# Entries of every run's checkpoint. `identities`, the names of the classes, and `identities_before`, those that the
# starting weights were trained on, came later.
RUN_ENTRIES = (
    "config", "data", "step", "model", "optimizer", "average", "precision", "seconds", "losses", "unreadable",
)  # fmt: skip


class CheckpointError(Exception):
    """A checkpoint is missing, damaged or of another version."""


class StartingWeights(NamedTuple):
    """What the backbone of a run starts from."""

    backbone: dict[str, Tensor]  # state dict
    identities: list[str] | None  # names of all identities that it was trained on; None: not known


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
    state = _load(path, "checkpoint")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version of the trainer")
    return state


def _load(path: Path, contents: str, expected: str = "") -> Any:
    """Read a file of torch.save; `contents` and `expected` are parts of the error messages."""
    try:
        return load_tensors(path)
    except FileNotFoundError:
        raise CheckpointError(f"no {contents} at {path}{expected}") from None
    except UnreadableFileError as error:
        raise CheckpointError(f"cannot read the {contents} {error}{expected}") from error


def load_run(path: Path, purpose: str) -> dict[str, Any]:
    """Read the checkpoint of a run, with everything that a `purpose` such as "resume" or "export" needs.

    Raises:
        CheckpointError: as `load_checkpoint`, or parts of it are missing.
    """
    state = load_checkpoint(path)
    missing = [name for name in RUN_ENTRIES if name not in state]
    missing += [name for name in ("config", "model", "optimizer") if not isinstance(state.get(name, {}), dict)]
    if missing:
        raise CheckpointError(
            f"cannot {purpose} {path}: it is not the checkpoint of a run, because it has no usable {', '.join(missing)}"
        )
    return state


def load_backbone_weights(path: Path) -> StartingWeights:
    """The backbone of an earlier run, from its folder or checkpoint, or from an exported backbone.pt.

    Raises:
        CheckpointError: there is no such file, or it holds no weights of a backbone.
    """
    if path.is_dir():
        exported = path / WEIGHTS_NAME
        path = exported if exported.exists() and not (path / FILE_NAME).exists() else path / FILE_NAME
    expected = (
        f"; expected the folder of a run, its {FILE_NAME}, or a {WEIGHTS_NAME} that fused-margin export has written"
    )
    state = _load(path, "weights", expected)
    if isinstance(state, dict) and "format" in state:
        run = load_run(path, "start from")
        return StartingWeights(backbone_state(run), trained_identities(run))
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no weights of a backbone{expected}")
    return StartingWeights(state, None)


def load_into_backbone(weights: dict[str, Tensor], backbone: nn.Module, path: Path) -> None:
    """Load a state dict that was read from `path`.

    Raises:
        CheckpointError: it does not fit in full.
    """
    try:
        backbone.load_state_dict(weights)
    except (AttributeError, RuntimeError, TypeError) as error:
        reasons = " ".join(str(error).split())
        raise CheckpointError(f"the weights in {path} do not fit the network: {reasons}") from error


def backbone_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """State dict of the backbone in a checkpoint: of the weights' moving average where there is one."""
    if state["average"] is not None:
        return _under("module.", state["average"])
    return _under("backbone.", state["model"])


def identities_before(state: dict[str, Any]) -> list[str] | None:
    """Names of the identities that the starting weights of a run were trained on; None where they are not known."""
    started_at_random = state["config"].get("weights") is None
    return state.get("identities_before", [] if started_at_random else None)


def trained_identities(state: dict[str, Any]) -> list[str] | None:
    """Names of all identities that a run's backbone was trained on, in the run and before; None if not known."""
    before, own = identities_before(state), state.get("identities")
    return None if before is None or own is None else sorted({*before, *own})


def criterion_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """State dict of the criterion in a checkpoint."""
    return _under("criterion.", state["model"])


def _under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def latest_run(runs: Path) -> Path | None:
    """The folder in `runs` whose checkpoint was written last."""
    checkpoints = list(runs.glob(f"*/{FILE_NAME}"))
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent if checkpoints else None
