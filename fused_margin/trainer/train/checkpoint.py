"""Checkpoints: written atomically, read without executing code from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_margin._tensor_files import UnreadableFileError, load_tensors

FORMAT = 2  # incremented when older checkpoints become unreadable
FILE_NAME, WEIGHTS_NAME = "checkpoint.pt", "backbone.pt"  # of a run, and of its exported backbone
# Entries that the checkpoint of every run has. Early checkpoints have no `identities` (names of the classes) and no
# `identities_before` (identities that the initial weights were trained on).
RUN_ENTRIES = (
    "config", "data", "step", "model", "optimizer", "average", "precision", "seconds", "losses", "unreadable",
)  # fmt: skip


class CheckpointError(Exception):
    """A checkpoint is missing, damaged or of another version."""


class StartingWeights(NamedTuple):
    """Initial weights of a run's backbone."""

    backbone: dict[str, Tensor]  # state dict
    identities: list[str] | None  # all identities that it was trained on; None: unknown


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a temporary file and rename it to `path`, so that a kill leaves the old file or the new one."""
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
    """Delete temporary files of killed processes next to `path`."""
    for temporary in path.parent.glob(f"{path.name}.*.tmp"):
        process = temporary.name.removeprefix(f"{path.name}.").removesuffix(".tmp")
        if process.isdecimal() and not _is_running(int(process)):
            temporary.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False  # this process has written nothing yet, so its id was reused
    try:
        os.kill(process, 0)  # signal 0 only tests whether the process exists
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU.

    Raises:
        CheckpointError: the file is missing, damaged or of another version.
    """
    expected = f"; expected the folder of a run of fused-margin train, or its {FILE_NAME}"
    state = _load(path, "checkpoint", expected)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version of the trainer{expected}")
    return state


def _load(path: Path, contents: str, expected: str = "") -> Any:
    """Read a file written by torch.save; `contents` and `expected` are for error messages."""
    try:
        return load_tensors(path)
    except FileNotFoundError:
        raise CheckpointError(f"no {contents} at {path}{expected}") from None
    except UnreadableFileError as error:
        raise CheckpointError(f"cannot read the {contents} {error}{expected}") from error


def load_run(path: Path, purpose: str) -> dict[str, Any]:
    """Read the checkpoint of a run and check its entries; `purpose`, such as "resume", is for error messages.

    Raises:
        CheckpointError: as `load_checkpoint`, or an entry is missing.
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
        CheckpointError: there is no such file, or it has no weights of a backbone.
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
    """Load a state dict; `path` is for error messages.

    Raises:
        CheckpointError: it does not fit the network.
    """
    try:
        backbone.load_state_dict(weights)
    except (AttributeError, RuntimeError, TypeError) as error:
        reasons = " ".join(str(error).split())
        raise CheckpointError(f"the weights in {path} do not fit the network: {reasons}") from error


def backbone_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """State dict of the backbone in a checkpoint; of the moving average, if there is one."""
    if state["average"] is not None:
        return _under("module.", state["average"])
    return _under("backbone.", state["model"])


def identities_before(state: dict[str, Any]) -> list[str] | None:
    """Names of the identities that the initial weights of a run were trained on; None: unknown."""
    started_at_random = state["config"].get("weights") is None
    return state.get("identities_before", [] if started_at_random else None)


def trained_identities(state: dict[str, Any]) -> list[str] | None:
    """Names of all identities that a backbone was trained on, in the run and before it; None: unknown."""
    before, own = identities_before(state), state.get("identities")
    return None if before is None or own is None else sorted({*before, *own})


def criterion_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """State dict of the criterion in a checkpoint."""
    return _under("criterion.", state["model"])


def _under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def latest_run(runs: Path) -> Path | None:
    """The folder in `runs` with the latest checkpoint; None if there is none."""
    checkpoints = list(runs.glob(f"*/{FILE_NAME}"))
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent if checkpoints else None
