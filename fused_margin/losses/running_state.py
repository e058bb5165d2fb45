"""Running state: buffers that every forward in training mode updates, once under activation checkpointing."""

from __future__ import annotations

import functools
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_margin._ops.library import register
from fused_margin._ops.recomputation import recomputing
from fused_margin.losses.settings import Settings

RECOMPUTED = (
    "activation checkpointing recomputes a forward {reason}; its gradient is computed with the current running state. "
    "Call the loss outside of the checkpointed function."
)


def _update_running_state(state: Tensor, value: Tensor, rows: Tensor | None) -> None:
    """Within a compiled graph: writes `value`, or adds it to `rows`, unless a backward recomputes the graph."""
    if torch._C._current_graph_task_id() != -1:
        warnings.warn(f"fused_margin: {RECOMPUTED.format(reason='compiled by torch.compile')}", stacklevel=2)
    elif rows is None:
        state.copy_(value)
    else:
        state.index_put_((rows,), value, accumulate=True)


update_running_state = register(
    "update_running_state", _update_running_state, lambda state, value, rows: None, mutates=("state",)
)


@dataclass(eq=False)
class _PendingForward:
    """A forward in training mode: a fingerprint of its inputs, and the state before it."""

    inputs: list[Tensor]  # sums of the inputs, which identify the batch without storing it
    shape: torch.Size
    needs_gradient: bool
    state: list[Tensor]
    recomputations: int = 0  # number of recomputations

    def has_inputs(self, inputs: list[Tensor], shape: torch.Size) -> bool:
        return self.shape == shape and all(map(torch.equal, self.inputs, inputs))


class RunningState(Settings):
    """A module whose buffers `RUNNING_BUFFERS` are updated by every forward in training mode.

    ``.to(dtype)``, ``.half()``, ``load_state_dict`` and similar calls do not change the dtype of these buffers, because
    half precision would round small updates to 0.
    """

    RUNNING_BUFFERS: ClassVar[tuple[str, ...]] = ()
    MAX_PENDING = 32  # maximum number of forwards that may wait for their backward
    LABELS_OPTIONAL = False
    _pending: deque[_PendingForward] | None = None
    _warned_of_recomputation = False

    def state_before(self, labels: Tensor | None) -> list[Tensor]:
        """A copy of the state that a forward of these labels reads and updates."""
        return [value.clone() for value in self._running_buffers().values()]

    @torch.no_grad()
    def restore_state(self, labels: Tensor | None, state: list[Tensor]) -> None:
        """Writes the result of `state_before` to the buffers."""
        for own, value in zip(self._running_buffers().values(), state, strict=True):
            own.copy_(value)

    @torch.no_grad()
    def update_state(self, name: str, value: Tensor, rows: Tensor | None = None) -> None:
        """Writes `value` to a buffer, or adds it to some of the buffer's rows."""
        state = self._buffers[name]
        assert state is not None
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
                    f"{type(self).__name__}: torch.vmap cannot update {name}, which all batches share; call eval() before"
                ) from error

    def _running_buffers(self) -> dict[str, Tensor]:
        buffers = ((name, self._buffers.get(name)) for name in self.RUNNING_BUFFERS)
        return {name: buffer for name, buffer in buffers if buffer is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._pending = None  # their state may be on another device
        before = self._running_buffers()
        result = super()._apply(fn, recurse)
        for name, new in self._running_buffers().items():
            if new.dtype != before[name].dtype:  # converts the old value again, because the new one is rounded
                self._buffers[name] = before[name].to(new.device)
        return result

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        before = self._running_buffers()
        super()._load_from_state_dict(*arguments, **options)
        for name, new in self._running_buffers().items():  # load_state_dict(assign=True) sets the dtypes of the file
            if new.dtype != before[name].dtype:
                self._buffers[name] = new.to(before[name].dtype)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pending": None}


def once_per_step(forward: Callable) -> Callable:
    """Decorates ``forward(self, embeddings, labels)`` of a RunningState, so that a recomputation does not update the state.

    A recomputation starts from the state before the first run, and restores the current state.
    """

    @functools.wraps(forward)
    def step(self: RunningState, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        unsupported = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if unsupported or not self.training or not _are_tensors(embeddings, labels, self.LABELS_OPTIONAL):
            return forward(self, embeddings, labels)
        before, inputs = self.state_before(labels), _fingerprint(embeddings, labels)
        if not recomputing():
            loss = forward(self, embeddings, labels)
            self._pending = self._pending or deque(maxlen=self.MAX_PENDING)
            self._pending.append(_PendingForward(inputs, embeddings.shape, torch.is_grad_enabled(), before))
            return loss
        # Among runs of equal batches, prefer those that were recomputed least and need a gradient. Of these take the
        # last run, because a backward begins with the last.
        matching = [run for run in reversed(self._pending or ()) if run.has_inputs(inputs, embeddings.shape)]
        first = min(matching, key=lambda run: (run.recomputations, not run.needs_gradient), default=None)
        if first is not None:
            first.recomputations += 1
            self.restore_state(labels, first.state)
        elif not self._warned_of_recomputation:
            self._warned_of_recomputation = True
            reason = (
                f"whose state is no longer stored (more than {self.MAX_PENDING} forwards ago), or that had other inputs"
            )
            warnings.warn(f"{type(self).__name__}: {RECOMPUTED.format(reason=reason)}", stacklevel=3)
        try:
            return forward(self, embeddings, labels)
        finally:
            self.restore_state(labels, before)

    return step


def _are_tensors(embeddings: Tensor, labels: Tensor | None, optional: bool) -> bool:
    """Whether embeddings and labels are tensors of values. For other arguments the checks of the forward raise."""
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
        return False
    if type(embeddings).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # a fake tensor has no values to compare
        return False
    return isinstance(labels, Tensor) or (labels is None and optional)


@torch.no_grad()
def _fingerprint(embeddings: Tensor, labels: Tensor | None) -> list[Tensor]:
    sums = [embeddings.sum(dtype=torch.float64).nan_to_num_()]  # NaN is not equal to itself
    return sums if labels is None else [*sums, labels.sum()]
