"""Whether a forward is run again: activation checkpointing recomputes it within the backward."""

import torch
from torch import Tensor


def recomputing() -> bool:
    """Whether this forward runs within a backward, as activation checkpointing runs it again.

    A training forward within a backward hook cannot be told from a recomputation.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def current_age(age: Tensor) -> Tensor:
    """Steps (1,) since something was computed; 1 while a forward is recomputed, so that it is not computed again."""
    return torch.ones_like(age) if recomputing() else age
