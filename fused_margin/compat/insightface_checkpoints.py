"""Checkpoints in the format of arcface_torch's training script: one file per rank, readable by any number of ranks."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_margin._tensor_files import UnreadableFileError, load_tensors
from fused_margin.distributed import slice_sizes

__all__ = ["Progress", "ShardedClasses", "load_checkpoint", "save_checkpoint"]


class ShardedClasses(Protocol):
    """The attributes of :class:`~fused_margin.compat.insightface.PartialFC_V2` that checkpoints need.

    Examples:
        >>> from fused_margin.compat import insightface
        >>> partial_fc = insightface.PartialFC_V2(insightface.ArcFace(), embedding_size=4, num_classes=10)
        >>> partial_fc.class_start, partial_fc.num_local
        (0, 10)
    """

    rank: int
    world_size: int
    num_classes: int
    embedding_size: int
    class_start: int
    num_local: int
    weight: nn.Parameter

    @property
    def process_group(self) -> dist.ProcessGroup | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Progress(NamedTuple):
    """The position of a training: the result of :func:`load_checkpoint`.

    Attributes:
        epoch: the next epoch.
        global_step: number of optimizer steps, as the training script counts them.

    Examples:
        >>> from fused_margin.compat.insightface import Progress
        >>> epoch, global_step = Progress(epoch=3, global_step=12_000)
    """

    epoch: int
    global_step: int


CHECKPOINT, MODEL = "checkpoint_gpu_{}.pt", "model.pt"
KEYS = {
    "epoch",
    "global_step",
    "state_dict_backbone",
    "state_dict_softmax_fc",
    "state_optimizer",
    "state_lr_scheduler",
}
STATES = KEYS - {"epoch", "global_step"}
# Entries of an optimizer's state that have the shape of their parameter.
ELEMENTWISE = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def save_checkpoint(
    folder: str | os.PathLike[str],
    epoch: int,
    global_step: int,
    backbone: nn.Module,
    partial_fc: ShardedClasses,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Write a checkpoint in the format of arcface_torch's training script.

    Each rank writes its ``checkpoint_gpu_{rank}.pt``, and rank 0 also ``model.pt``, the backbone's state dict. Every
    rank must call it. Temporary files are renamed after all are written, so that a kill leaves the old files or the new
    ones.

    Args:
        folder: an existing folder.
        epoch: the next epoch.
        global_step: number of optimizer steps.
        backbone: the module, or DistributedDataParallel of it.
        partial_fc: the loss, a :class:`fused_margin.compat.insightface.PartialFC_V2`.
        optimizer: of the parameters of backbone and ``partial_fc``.
        lr_scheduler: the scheduler of ``optimizer``.

    Examples:
        >>> import os, tempfile, torch
        >>> from fused_margin.compat import insightface
        >>> backbone = torch.nn.Linear(8, 4)
        >>> partial_fc = insightface.PartialFC_V2(insightface.ArcFace(), embedding_size=4, num_classes=10)
        >>> optimizer = torch.optim.SGD([*backbone.parameters(), *partial_fc.parameters()], lr=0.1)
        >>> schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     insightface.save_checkpoint(folder, 1, 100, backbone, partial_fc, optimizer, schedule)
        ...     sorted(os.listdir(folder))
        ['checkpoint_gpu_0.pt', 'model.pt']
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
            dist.barrier(partial_fc.process_group)
        for name in written:
            os.replace(folder / f"{name}.tmp", folder / name)
    finally:
        for name in written:
            (folder / f"{name}.tmp").unlink(missing_ok=True)


def load_checkpoint(
    folder: str | os.PathLike[str],
    backbone: nn.Module,
    partial_fc: ShardedClasses,
    optimizer: torch.optim.Optimizer | None = None,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> Progress:
    """Read a checkpoint of :func:`save_checkpoint` or of arcface_torch's training script.

    It may have been written by any number of ranks. Class weights and their entries in the optimizer's state are
    divided among the current ranks. All other values are from the file with the number of the rank; if there are more
    ranks than files, the files are used in turn. Only tensors and plain values are read (``weights_only``).

    Args:
        folder: folder with the files of all ranks. It may also have files of an earlier run on more ranks.
        backbone: the module, or DistributedDataParallel of it.
        partial_fc: the loss, a :class:`fused_margin.compat.insightface.PartialFC_V2`.
        optimizer: with the same parameters, in the same order, as the saved one. None: its state is not read.
        lr_scheduler: the scheduler. None: its state is not read.

    Returns:
        The position of the training.

    Raises:
        ValueError: a file is missing, damaged, of another step or of another kind, or does not fit the classes, the
            backbone, the optimizer or the schedule. Nothing is loaded then.

    Examples:
        >>> import tempfile, torch
        >>> from fused_margin.compat import insightface
        >>> backbone = torch.nn.Linear(8, 4)
        >>> partial_fc = insightface.PartialFC_V2(insightface.ArcFace(), embedding_size=4, num_classes=10)
        >>> optimizer = torch.optim.SGD([*backbone.parameters(), *partial_fc.parameters()], lr=0.1)
        >>> schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     insightface.save_checkpoint(folder, 1, 100, backbone, partial_fc, optimizer, schedule)
        ...     insightface.load_checkpoint(folder, backbone, partial_fc)  # without the optimizer
        Progress(epoch=1, global_step=100)
    """
    files = read_all(Path(folder), partial_fc)
    own = files[partial_fc.rank % len(files)]
    path = Path(folder) / CHECKPOINT.format(partial_fc.rank % len(files))
    weight = own_rows([file["state_dict_softmax_fc"]["weight"] for file in files], partial_fc)
    check_finite(weight, partial_fc, files, Path(folder))
    states = []  # all are checked before the first is loaded
    if optimizer is not None:
        states.append(loaded_optimizer(optimizer, optimizer_state(files, own, optimizer, partial_fc, path), path))
    if lr_scheduler is not None:
        check_scheduler(own["state_lr_scheduler"], lr_scheduler, path)
        states.append(loaded_scheduler(lr_scheduler, own["state_lr_scheduler"], path))
    with contextlib.ExitStack() as loaded:
        for state in states:
            loaded.enter_context(state)
        load_backbone(own["state_dict_backbone"], unwrapped(backbone), path)
        partial_fc.load_state_dict({"weight": weight})
    return Progress(own["epoch"], own["global_step"])


def read_all(folder: Path, partial_fc: ShardedClasses) -> list[dict[str, Any]]:
    """The files of the ranks that wrote the checkpoint: the first files that together have all classes."""
    files: list[dict[str, Any]] = []
    classes, num_classes = 0, partial_fc.num_classes
    while classes < num_classes:
        path = folder / CHECKPOINT.format(len(files))
        if not path.exists():
            raise ValueError(f"folder: expected checkpoints of {num_classes} classes, got {classes} and no file {path}")
        files.append(read_file(path, partial_fc.embedding_size))
        classes += len(files[-1]["state_dict_softmax_fc"]["weight"])
    if classes != num_classes:
        sizes = [len(file["state_dict_softmax_fc"]["weight"]) for file in files]
        classes += sum(further_ranks(folder, sizes, files[0]["global_step"], partial_fc.embedding_size))
        raise ValueError(f"folder: expected checkpoints of {num_classes} classes, got {classes} in {folder}")
    steps = [file["global_step"] for file in files]
    if len(set(steps)) > 1:
        raise ValueError(f"folder: expected checkpoints of one step, got steps {steps} in {folder}")
    sizes = [len(file["state_dict_softmax_fc"]["weight"]) for file in files]
    if sizes != slice_sizes(num_classes, len(files)):
        raise ValueError(
            f"folder: expected {num_classes} classes divided among {len(files)} ranks as "
            f"{slice_sizes(num_classes, len(files))}, got {sizes} in {folder}: the files are of different runs"
        )
    if further := further_ranks(folder, sizes, steps[0], partial_fc.embedding_size):
        total = sum(sizes + further)
        raise ValueError(
            f"folder: expected checkpoints of {num_classes} classes, got {total} in {folder}, "
            f"written by {len(sizes + further)} ranks at step {steps[0]}"
        )
    return files


def read_file(path: Path, embedding_size: int) -> dict[str, Any]:
    """The checked contents of a rank's file, with class weights (classes, embedding_size)."""
    try:
        file = load_tensors(path, mmap=True)  # tensors are read from disk when they are used
    except UnreadableFileError as error:
        raise ValueError(
            f"folder: expected a checkpoint of arcface_torch, got a file that is damaged or of another kind, {error}"
        ) from error
    if not isinstance(file, dict) or not file.keys() >= KEYS or not all(isinstance(file[key], dict) for key in STATES):
        raise ValueError(f"folder: expected a checkpoint of arcface_torch, got {path}")
    for key in sorted(KEYS - STATES):
        if isinstance(file[key], bool) or not isinstance(file[key], int) or file[key] < 0:
            raise ValueError(f"folder: expected a non-negative integer {key}, got {file[key]!r} in {path}")
    weight = file["state_dict_softmax_fc"].get("weight")
    if not isinstance(weight, Tensor) or set(file["state_dict_softmax_fc"]) != {"weight"}:
        raise ValueError(f"folder: expected a checkpoint of arcface_torch, got {path} without class weights")
    if weight.dim() != 2 or weight.shape[1] != embedding_size:
        shape = tuple(weight.shape)
        raise ValueError(f"folder: expected class weights (classes, {embedding_size}), got {shape} in {path}")
    if not weight.is_floating_point():
        raise ValueError(f"folder: expected floating-point class weights, got {weight.dtype} in {path}")
    return file


def further_ranks(folder: Path, sizes: list[int], step: int, embedding_size: int) -> list[int]:
    """Numbers of classes of further ranks of the same run as the first ranks, which have `sizes`; usually none.

    Files of an earlier run on more ranks may remain. They have another step, or do not continue the division of the
    classes among the first ranks.
    """
    further: list[int] = []
    while (path := folder / CHECKPOINT.format(len(sizes) + len(further))).exists():
        try:
            file = read_file(path, embedding_size)
        except ValueError:  # the file is not needed, so it may be damaged
            break
        if file["global_step"] != step:
            break
        further.append(len(file["state_dict_softmax_fc"]["weight"]))
    for number in range(len(further), 0, -1):
        combined = sizes + further[:number]
        if combined == slice_sizes(sum(combined), len(combined)):
            return further[:number]
    return []


def load_backbone(state: dict[str, Any], backbone: nn.Module, path: Path) -> None:
    """Load a state dict; if it does not fit, restore the backbone and raise."""
    before = copy.deepcopy(backbone.state_dict())
    try:
        backbone.load_state_dict(state)
    except Exception as error:  # a module can override load_state_dict and raise anything
        backbone.load_state_dict(before)
        raise ValueError(f"backbone: the weights in {path} do not fit it: {error}") from error


@contextlib.contextmanager
def loaded_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> Iterator[None]:
    """Load a state; if the block raises, restore the old one."""
    before = optimizer.state, optimizer.param_groups  # load_state_dict replaces both
    try:
        try:
            optimizer.load_state_dict(state)
        except Exception as error:  # each kind of optimizer has its own errors
            raise ValueError(f"optimizer: the state in {path} does not fit it: {error!r}") from error
        yield
    except BaseException:
        optimizer.state, optimizer.param_groups = before
        raise


@contextlib.contextmanager
def loaded_scheduler(
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler, state: dict[str, Any], path: Path
) -> Iterator[None]:
    """Load a state; if the block raises, restore the old one."""
    before = copy.deepcopy(lr_scheduler.state_dict())
    try:
        try:
            lr_scheduler.load_state_dict(state)
        except Exception as error:  # each kind of schedule has its own errors
            raise ValueError(f"lr_scheduler: the state in {path} does not fit it: {error!r}") from error
        yield
    except BaseException:
        lr_scheduler.load_state_dict(before)
        raise


def check_finite(weight: Tensor, partial_fc: ShardedClasses, files: list[dict[str, Any]], folder: Path) -> None:
    """Raise ValueError if this rank's class weights, from these files, are not finite."""
    wrong = (~weight.isfinite().all(dim=1)).nonzero()
    if len(wrong):
        row = partial_fc.class_start + int(wrong[0])
        ends = accumulate(len(file["state_dict_softmax_fc"]["weight"]) for file in files)
        path = folder / CHECKPOINT.format(next(rank for rank, end in enumerate(ends) if row < end))
        raise ValueError(
            f"folder: expected finite class weights, got NaN or infinity in those of class {row} in {path}"
        )


def check_scheduler(saved: dict[str, Any], lr_scheduler: torch.optim.lr_scheduler.LRScheduler, path: Path) -> None:
    """Raise ValueError unless the saved schedule is of the same kind and has as many parameter groups."""
    expected_names, saved_names = (
        # Private entries depend on PyTorch's version, and older versions have "verbose".
        {name for name in state if not name.startswith("_")} - {"verbose"}
        for state in (lr_scheduler.state_dict(), saved)
    )
    if expected_names != saved_names:
        raise ValueError(
            f"lr_scheduler: expected the state of a {type(lr_scheduler).__name__} with "
            f"{', '.join(sorted(expected_names))}, got {', '.join(sorted(saved_names)) or 'nothing'} in {path}"
        )
    expected, rates = getattr(lr_scheduler, "base_lrs", None), saved.get("base_lrs")
    if rates is not None and expected is not None and len(rates) != len(expected):
        raise ValueError(
            f"lr_scheduler: expected a schedule of {len(expected)} parameter groups, got one of {len(rates)} in {path}"
        )


def own_rows(parts: Iterable[Tensor], partial_fc: ShardedClasses) -> Tensor:
    """This rank's rows of the concatenated parts."""
    rows, begin, end = [], partial_fc.class_start, partial_fc.class_start + partial_fc.num_local
    for part in parts:
        rows.append(part[max(begin, 0) : max(end, 0)])
        begin, end = begin - len(part), end - len(part)
    return torch.cat(rows)


def is_optimizer_state(saved: dict[str, Any]) -> bool:
    """Whether a dictionary has the structure of an optimizer's ``state_dict``."""
    state, groups = saved.get("state"), saved.get("param_groups")
    if not isinstance(state, dict) or not isinstance(groups, list):
        return False
    grouped = all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
    return grouped and all(isinstance(entry, dict) for entry in state.values())


def check_options(group: dict[str, Any], saved_group: dict[str, Any], index: int, path: Path) -> None:
    """Raise ValueError if the saved options are those of another kind of optimizer.

    Between versions of PyTorch, one optimizer lacks options of the other; between kinds, each lacks options of the
    other. Disabled options (None, False or 0) have no effect, so they are ignored.
    """
    unknown = {
        name
        for name, value in saved_group.items()
        if name not in group and name != "initial_lr" and value is not None and value != 0
    }
    missing = group.keys() - saved_group.keys() - {"initial_lr"}
    if unknown and missing:
        raise ValueError(
            f"optimizer: expected options {', '.join(sorted(group.keys() - {'params'}))} in group {index}, got "
            f"{', '.join(sorted(unknown))} of another kind of optimizer in {path}"
        )


def optimizer_state(
    files: list[dict[str, Any]],
    own: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    partial_fc: ShardedClasses,
    path: Path,
) -> dict[str, Any]:
    """The state of the rank's own file, at `path`, with the rows of this rank's classes, for this optimizer."""
    for rank, file in enumerate(files):
        if not is_optimizer_state(file["state_optimizer"]):
            other = path.with_name(CHECKPOINT.format(rank))
            raise ValueError(
                f"optimizer: expected a state of an optimizer and its parameter groups, got none in {other}"
            )
    saved, groups = own["state_optimizer"], optimizer.param_groups
    if len(groups) != len(saved["param_groups"]):
        raise ValueError(
            f"optimizer: expected {len(saved['param_groups'])} parameter groups as in {path}, got {len(groups)}"
        )
    state, merged_groups = dict(saved["state"]), []
    for index, (group, saved_group) in enumerate(zip(groups, saved["param_groups"], strict=True)):
        check_options(group, saved_group, index, path)
        merged_groups.append({**group, **saved_group})  # keeps options that the saved optimizer lacks
        if len(group["params"]) != len(saved_group["params"]):
            raise ValueError(
                f"optimizer: expected {len(saved_group['params'])} parameters in group {index} as in {path}, got "
                f"{len(group['params'])}"
            )
        for parameter, number in zip(group["params"], saved_group["params"], strict=True):
            if number not in state:
                if state and parameter is partial_fc.weight:
                    raise ValueError(f"optimizer: expected a state of the class weights, got none in {path}")
                continue
            if parameter is partial_fc.weight:
                parts = [file["state_optimizer"]["state"].get(number, {}) for file in files]
                if any(part.keys() != state[number].keys() for part in parts):
                    raise ValueError(
                        f"optimizer: expected the same state of the class weights in all ranks' files in {path.parent}"
                    )
                state[number] = {
                    name: class_weight_state(name, parts, partial_fc, path.parent) for name in state[number]
                }
            for name in ELEMENTWISE:
                value = state[number].get(name)
                if isinstance(value, Tensor) and value.shape != parameter.shape:
                    raise ValueError(
                        f"optimizer: expected {name} of shape {tuple(parameter.shape)} for parameter {number}, got "
                        f"{tuple(value.shape)} in {path}"
                    )
    return copy.deepcopy({"state": state, "param_groups": merged_groups})  # without memory maps of the files


def class_weight_state(name: str, parts: list[dict[str, Any]], partial_fc: ShardedClasses, folder: Path) -> Any:
    """An entry of the optimizer's state of the class weights: this rank's rows, as of momentum, or a common number."""
    values = [part[name] for part in parts]
    if not isinstance(values[0], Tensor) or values[0].dim() == 0:
        return values[0]
    if sum(map(len, values)) != partial_fc.num_classes:
        raise ValueError(
            f"optimizer: expected {name} of all {partial_fc.num_classes} classes, got {sum(map(len, values))} rows in "
            f"{folder}; None leaves them out"
        )
    return own_rows(values, partial_fc)


def unwrapped(backbone: nn.Module) -> nn.Module:
    return backbone.module if isinstance(backbone, nn.parallel.DistributedDataParallel) else backbone
