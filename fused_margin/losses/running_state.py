"""State that every forward in training mode updates: it keeps its precision, and activation checkpointing updates it once."""

from __future__ import annotations

import functools
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_margin._ops.library import register
from fused_margin._ops.recomputation import recomputing

RECOMPUTED = (
    "activation checkpointing runs a forward again that {reason}; its gradient is computed with the running state of now. "
    "Leave the loss out of what is checkpointed."
)


def _update_running_state(state: Tensor, value: Tensor, rows: Tensor | None) -> None:
    """Within a compiled graph: writes `value`, or adds it to these rows, unless the graph is run again in a backward."""
    if torch._C._current_graph_task_id() != -1:
        warnings.warn(f"fused_margin: {RECOMPUTED.format(reason='torch.compile has compiled')}", stacklevel=2)
    elif rows is None:
        state.copy_(value)
    else:
        state.index_put_((rows,), value, accumulate=True)


update_running_state = register(
    "update_running_state", _update_running_state, lambda state, value, rows: None, mutates=("state",)
)


@dataclass(eq=False)
class _Run:
    """A forward in training mode: what its inputs were, and the state that it began with."""

    inputs: list[Tensor]  # sums, which tell one batch from another without keeping it
    shape: torch.Size
    differentiated: bool
    state: list[Tensor]
    repeated: int = 0  # times that it was run again

    def has(self, inputs: list[Tensor], shape: torch.Size) -> bool:
        return self.shape == shape and all(map(torch.equal, self.inputs, inputs))


class RunningState:
    """For a module whose buffers `RUNNING` a forward in training mode updates.

    ``.to(dtype)``, ``.half()``, ``load_state_dict`` and their like leave their dtype as it is: a small update would be
    rounded away in a half.
    """

    RUNNING: tuple[str, ...] = ()
    REMEMBERED = 32  # forwards whose backward may still come
    LABELS_OPTIONAL = False
    _runs: deque[_Run] | None = None
    _warned_of_recomputation = False

    def state_before(self, labels: Tensor | None) -> list[Tensor]:
        """A copy of what a forward of these labels reads and updates."""
        return [value.clone() for value in self._running_buffers().values()]

    @torch.no_grad()
    def restore_state(self, labels: Tensor | None, state: list[Tensor]) -> None:
        """Writes what `state_before` has returned."""
        for own, value in zip(self._running_buffers().values(), state, strict=True):
            own.copy_(value)

    @torch.no_grad()
    def update_state(self, name: str, value: Tensor, rows: Tensor | None = None) -> None:
        """Writes a buffer, or adds to some of its rows."""
        state = self._buffers[name]
        if torch.compiler.is_compiling():
            update_running_state(state, value, rows)
        elif rows is not None:
            state.index_put_((rows,), value, accumulate=True)
        else:
            try:
                state.copy_(value)
            except RuntimeError as error:
                if not torch._C._are_functorch_transforms_active():
                    raise
                raise RuntimeError(
                    f"{type(self).__name__}: torch.vmap cannot update {name}, of which there is one for all batches; "
                    "call eval() before"
                ) from error

    def _running_buffers(self) -> dict[str, Tensor]:
        return {name: self._buffers[name] for name in self.RUNNING if self._buffers.get(name) is not None}

    def _keep_dtypes(self, before: dict[str, Tensor]) -> None:
        for name, old in before.items():
            new = self._buffers[name]
            if new.dtype != old.dtype:
                self._buffers[name] = new.to(old.dtype)

    def _apply(self, fn, *arguments, **options):
        self._runs = None  # of another device, perhaps
        before = self._running_buffers()
        result = super()._apply(fn, *arguments, **options)
        for name, old in before.items():
            if self._buffers[name].dtype != old.dtype:  # the value from before: the new one is rounded
                self._buffers[name] = old.to(self._buffers[name].device)
        return result

    def _load_from_state_dict(self, *arguments, **options):
        before = self._running_buffers()
        super()._load_from_state_dict(*arguments, **options)
        self._keep_dtypes(before)  # load_state_dict(assign=True) takes the dtypes of the file

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_runs": None}


def once_per_step(forward: Callable) -> Callable:
    """Of ``forward(self, embeddings, labels)`` of a RunningState: one that is run again sees and leaves the state of the first."""

    @functools.wraps(forward)
    def step(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        plain = torch.compiler.is_compiling() or not self.training or torch._C._are_functorch_transforms_active()
        if plain or not _are_tensors(embeddings, labels, self.LABELS_OPTIONAL):
            return forward(self, embeddings, labels)
        before, inputs = self.state_before(labels), _fingerprint(embeddings, labels)
        if not recomputing():
            loss = forward(self, embeddings, labels)
            self._runs = self._runs or deque(maxlen=self.REMEMBERED)
            self._runs.append(_Run(inputs, embeddings.shape, torch.is_grad_enabled(), before))
            return loss
        # Of equal batches, one that has been run again, or whose gradient is not wanted, is not the one, and the backward
        # begins with the last.
        found = [run for run in reversed(self._runs or ()) if run.has(inputs, embeddings.shape)]
        first = min(found, key=lambda run: (run.repeated, not run.differentiated), default=None)
        if first is not None:
            first.repeated += 1
            self.restore_state(labels, first.state)
        elif not self._warned_of_recomputation:
            self._warned_of_recomputation = True
            reason = "is too long ago, or whose inputs were others"
            warnings.warn(f"{type(self).__name__}: {RECOMPUTED.format(reason=reason)}", stacklevel=3)
        try:
            return forward(self, embeddings, labels)
        finally:
            self.restore_state(labels, before)

    return step


def _are_tensors(embeddings: Tensor, labels: Tensor | None, optional: bool) -> bool:
    """Whether they are what a forward takes, and have values; its own checks say what is wrong with others."""
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
        return False
    if type(embeddings).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # a fake tensor has no values to compare
        return False
    return isinstance(labels, Tensor) or (labels is None and optional)


@torch.no_grad()
def _fingerprint(embeddings: Tensor, labels: Tensor | None) -> list[Tensor]:
    sums = [embeddings.sum(dtype=torch.float64).nan_to_num_()]  # NaN is not equal to itself
    return sums if labels is None else [*sums, labels.sum()]
