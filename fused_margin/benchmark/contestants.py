"""A contestant of a comparison, and the step that is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from .problems import Inputs
from .timing import Step

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (embeddings, weight, labels) -> scalar
S = TypeVar("S", bound=Step)
Build = Callable[[Inputs], Step]


@dataclass(frozen=True)
class Contestant(Generic[S]):
    """One row of the tables. The fastest of its variants is reported, with its name."""

    name: str
    objective: str  # "arcface", "normface" or "exclusive"; "kernel"; "products" for bare matrix products
    variants: Mapping[str, Callable[[Inputs], S]]
    reference: str = "ours"  # contestant to which the ratio of times is taken
    compiled: bool = False
    # A contestant with a larger relative error computes something else, and is not timed.
    loss_tolerance: float = 1e-5
    tolerance: float = 1e-3  # of gradients, and of the results of kernels
    work: float | None = None  # bytes or operations of one step, for contestants whose rate is reported
