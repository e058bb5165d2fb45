"""Detects whether activation checkpointing recomputes a forward within a backward."""

import torch
from torch import Tensor


def recomputing() -> bool:
    """Whether this forward runs within a backward, as in a recomputation by activation checkpointing.

    A training forward within a backward hook cannot be distinguished from a recomputation.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def current_age(age: Tensor) -> Tensor:
    """The number (1,) of training steps so far; 1 in a recomputed forward, so that it does not search again."""
    return torch.ones_like(age) if recomputing() else age
