"""Checkpoints as arcface_torch's training script writes them, a file for every rank, read by any number of ranks."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from fused_margin.compat.insightface import PartialFC_V2


class Progress(NamedTuple):
    epoch: int  # the first that is still to come
    global_step: int  # optimizer steps done, as the training script counts them


CHECKPOINT, MODEL = "checkpoint_gpu_{}.pt", "model.pt"
KEYS = {
    "epoch",
    "global_step",
    "state_dict_backbone",
    "state_dict_softmax_fc",
    "state_optimizer",
    "state_lr_scheduler",
}


def save_checkpoint(
    folder: str | os.PathLike,
    epoch: int,
    global_step: int,
    backbone: nn.Module,
    partial_fc: PartialFC_V2,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Writes this rank's ``checkpoint_gpu_{rank}.pt``, and on rank 0 ``model.pt``, the backbone's state dict.

    Every rank calls it. Files take their place when all are written: a kill leaves the old ones or the new.

    Args:
        folder: exists.
        epoch: the first that is still to come.
        backbone: DistributedDataParallel or what is in it.
        optimizer: of backbone and ``partial_fc``.
    """
    state = unwrapped(backbone).state_dict()
    content = {
        "epoch": epoch,
        "global_step": global_step,
        "state_dict_backbone": state,
        "state_dict_softmax_fc": partial_fc.state_dict(),
        "state_optimizer": optimizer.state_dict(),
        "state_lr_scheduler": lr_scheduler.state_dict(),
    }
    folder, written = Path(folder), {CHECKPOINT.format(partial_fc.rank): content}
    if partial_fc.rank == 0:
        written[MODEL] = state
    try:
        for name, value in written.items():
            torch.save(value, folder / f"{name}.tmp")
        if partial_fc.world_size > 1:
            dist.barrier(partial_fc.shard.group)
        for name in written:
            os.replace(folder / f"{name}.tmp", folder / name)
    finally:
        for name in written:
            (folder / f"{name}.tmp").unlink(missing_ok=True)


def load_checkpoint(
    folder: str | os.PathLike,
    backbone: nn.Module,
    partial_fc: PartialFC_V2,
    optimizer: torch.optim.Optimizer | None = None,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> Progress:
    """Reads what :func:`save_checkpoint` or arcface_torch's training script wrote, on any number of ranks.

    Class weights and what the optimizer keeps of each of them go to the ranks whose they are now. Everything else is
    from the file of the rank's own number, if there is one. Reads tensors and plain values only (``weights_only``).

    Args:
        folder: of all ranks' files; those of an earlier run on more ranks may still lie there.
        backbone: DistributedDataParallel or what is in it.
        optimizer: of the same parameters, in the same order, as the one that was saved; None leaves its state.
        lr_scheduler: None leaves its state.

    Raises:
        ValueError: for files that are missing, of different steps, or not of these classes or this optimizer.
    """
    files = read_all(Path(folder), partial_fc.num_classes)
    own = files[partial_fc.rank % len(files)]
    weight = own_rows([file["state_dict_softmax_fc"]["weight"] for file in files], partial_fc)
    state = None if optimizer is None else optimizer_state(files, own, optimizer, partial_fc)
    unwrapped(backbone).load_state_dict(own["state_dict_backbone"])
    partial_fc.load_state_dict({"weight": weight})
    if optimizer is not None:
        optimizer.load_state_dict(state)
    if lr_scheduler is not None:
        lr_scheduler.load_state_dict(own["state_lr_scheduler"])
    return Progress(own["epoch"], own["global_step"])


def read_all(folder: Path, num_classes: int) -> list[dict[str, Any]]:
    """The files of the ranks that wrote together: the first so many as hold all classes."""
    files, classes = [], 0
    while classes < num_classes:
        path = folder / CHECKPOINT.format(len(files))
        if not path.exists():
            raise ValueError(f"folder: expected checkpoints of {num_classes} classes, got {classes} and no file {path}")
        file = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # reads what is then used
        if not isinstance(file, dict) or not KEYS <= file.keys() or "weight" not in file["state_dict_softmax_fc"]:
            raise ValueError(f"folder: expected a checkpoint of arcface_torch, got {path}")
        files.append(file)
        classes += len(file["state_dict_softmax_fc"]["weight"])
    if classes != num_classes:
        raise ValueError(f"folder: expected checkpoints of {num_classes} classes, got {classes} in {folder}")
    steps = [file["global_step"] for file in files]
    if len(set(steps)) > 1:
        raise ValueError(f"folder: expected checkpoints of one step, got steps {steps} in {folder}")
    return files


def own_rows(parts: Iterable[Tensor], partial_fc: PartialFC_V2) -> Tensor:
    """This rank's rows of what the parts are together."""
    rows, begin, end = [], partial_fc.class_start, partial_fc.class_start + partial_fc.num_local
    for part in parts:
        rows.append(part[max(begin, 0) : max(end, 0)])
        begin, end = begin - len(part), end - len(part)
    return torch.cat(rows)


def optimizer_state(
    files: list[dict[str, Any]], own: dict[str, Any], optimizer: torch.optim.Optimizer, partial_fc: PartialFC_V2
) -> dict[str, Any]:
    """The state dict of the own file, but with the rows of this rank's classes, as this optimizer takes it."""
    saved, groups = own["state_optimizer"], optimizer.param_groups
    if len(groups) != len(saved["param_groups"]):
        raise ValueError(
            f"optimizer: expected {len(saved['param_groups'])} parameter groups as in the checkpoint, got {len(groups)}"
        )
    state, merged_groups = dict(saved["state"]), []
    for group, saved_group in zip(groups, saved["param_groups"], strict=True):
        merged_groups.append({**group, **saved_group})  # an option that another optimizer did not have stays
        for parameter, number in zip(group["params"], saved_group["params"], strict=False):
            if parameter is partial_fc.weight and number in state:
                parts = [file["state_optimizer"]["state"][number] for file in files]
                state[number] = {name: of_classes(name, parts, partial_fc) for name in state[number]}
    return copy.deepcopy({"state": state, "param_groups": merged_groups})  # nothing of it stays in the files


def of_classes(name: str, parts: list[dict[str, Any]], partial_fc: PartialFC_V2):
    """One entry of an optimizer's state of the class weights: rows, as momentum, or a number that all ranks have."""
    values = [part[name] for part in parts]
    if not isinstance(values[0], Tensor) or values[0].dim() == 0:
        return values[0]
    if sum(map(len, values)) != partial_fc.num_classes:
        raise ValueError(
            f"optimizer: expected {name} of all {partial_fc.num_classes} classes in the checkpoint, got "
            f"{sum(map(len, values))} rows; None leaves them out"
        )
    return own_rows(values, partial_fc)


def unwrapped(backbone: nn.Module) -> nn.Module:
    return backbone.module if isinstance(backbone, nn.parallel.DistributedDataParallel) else backbone
