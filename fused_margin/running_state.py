"""State that every forward in training mode moves: it keeps its precision, and activation checkpointing moves it once."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor


def recomputing() -> bool:
    """Whether this forward runs within a backward, as activation checkpointing runs it again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class RunningState:
    """For a module whose buffers `RUNNING` a forward in training mode moves.

    ``.to(dtype)``, ``.half()`` and their like leave their dtype as it is: a small step would vanish in a half.
    """

    RUNNING: tuple[str, ...] = ()
    _first_run: tuple[tuple, list[Tensor]] | None = None  # the last step's labels, and the state that it began with
    _warned_of_recomputation = False

    def running_state(self) -> list[Tensor]:
        return [self._buffers[name] for name in self.RUNNING if self._buffers.get(name) is not None]

    def _apply(self, fn, *arguments, **options):
        dtypes = {name: self._buffers[name] for name in self.RUNNING if self._buffers.get(name) is not None}
        result = super()._apply(fn, *arguments, **options)
        for name, before in dtypes.items():
            moved = self._buffers[name]
            if moved.dtype != before.dtype:  # the value from before: `moved` is rounded
                self._buffers[name] = before.to(moved.device)
        return result


def once_per_step(forward: Callable) -> Callable:
    """Of ``forward(self, embeddings, labels)`` of a RunningState: one that is run again sees and leaves the state of the first."""

    @functools.wraps(forward)
    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not self.training:
            return forward(self, embeddings, labels)
        state = self.running_state()
        before = [value.clone() for value in state]
        if not recomputing():
            loss = forward(self, embeddings, labels)
            self._first_run = (_identity(labels), before)
            return loss
        if self._first_run is not None and self._first_run[0] == _identity(labels):
            _write(state, self._first_run[1])
        elif not self._warned_of_recomputation:
            self._warned_of_recomputation = True
            warnings.warn(
                f"{type(self).__name__}: activation checkpointing runs again a forward that is not the last one; its "
                "gradient is computed with the running statistics of now. Leave the loss out of what is checkpointed.",
                stacklevel=3,
            )
        try:
            return forward(self, embeddings, labels)
        finally:
            _write(state, before)

    return step


def _identity(labels: Tensor) -> tuple:
    return labels.data_ptr(), tuple(labels.shape), labels.dtype


@torch.no_grad()
def _write(state: list[Tensor], values: list[Tensor]) -> None:
    for own, value in zip(state, values, strict=True):
        own.copy_(value)
