"""The optimizer step of rows of a matrix from their gradient: the settings of a step, and calls of its kernel."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fused_margin._ops.backends.select import Kernels
from fused_margin._ops.inputs import MIN_CHUNK, ForwardOutput, LossInputs

# The gradient of a part of the rows stays in cache between the matrix product that writes it and the step that reads it.
PART_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
NAME = "fused_margin.optim.step_in_backward"
# Names of the losses whose weights are stepped in the backward, by the identity of the weight. Not the losses, which would
# keep their weights alive.
STEPPED: dict[int, str] = {}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # of the matrix


def refuse_stepped(weight: Tensor) -> None:
    """Raises RuntimeError for a computation that would need the gradient of a weight that has none."""
    if torch.compiler.is_compiling() or id(weight) not in STEPPED:
        return
    if torch.is_grad_enabled() and weight.requires_grad:
        raise RuntimeError(
            f"{NAME}: another term of the loss uses the class weights, which the backward of {STEPPED[id(weight)]} "
            "steps by its own gradient only; remove the handle, or the term"
        )


class Rule(enum.IntEnum):
    """UpdateRule of csrc/kernels/step.h, which has the formulas."""

    SGD = 0
    NESTEROV = 1
    ADAM = 2
    ADAMW = 3


class WeightStepper(Protocol):
    """Steps the class weights of a loss in its backward; fused_margin.optim.StepInBackward implements it."""

    parameter: nn.Parameter

    def run_forward(self, inputs: LossInputs, uniform: bool, ignore_index: int) -> ForwardOutput:
        """As library.run_forward."""


class RowUpdate(NamedTuple):
    """The step of an optimizer. The names of the numbers are those of csrc/kernels/step.h."""

    momentum: Tensor | None  # (C, D) of the dtype of the matrix; the first moment
    second_moment: Tensor | None  # (C, D) of the same dtype
    rule: int
    lr: float
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0
    correction1: float = 1.0
    correction2: float = 1.0
    project: bool = False  # whether each row is divided by its norm after the step
    stochastic: bool = False  # whether bfloat16 rows are rounded stochastically
    seed: int = 0
    step: int = 0  # of the random bits

    def numbers(self) -> dict[str, Any]:
        """The fields of `Update` in csrc/kernels/step.h."""
        names = ("rule", "lr", "beta1", "beta2", "eps", "weight_decay", "correction1", "correction2")
        return {name: getattr(self, name) for name in names}

    def needs_whole_gradient(self) -> bool:
        """Whether the step cannot be divided into ``m = beta1 m + a``, then ``m += b`` and the rest."""
        return self.rule != Rule.SGD or self.beta1 == 0


# Arguments of project_weight_gradient that add nothing to a gradient.
NO_COMPLETION = {
    **dict.fromkeys(
        ("inverse_norm", "dense_scale", "normalized_embeddings", "sorted_labels", "label_order", "target_gradient",
         "uniform_direction", "class_weight", "length_gradient", "nearest", "sorted_nearest", "nearest_order",
         "nearest_gradient")
    ),
    "samples": 0, "inner_product": True,
}  # fmt: skip


def check_rows(name: str, value: Tensor | None, weight: Tensor) -> None:
    """Raises ValueError unless the kernel can write a matrix with the shape, dtype and device of weight."""
    if value is None:
        return
    like = value.shape == weight.shape and value.dtype == weight.dtype and value.device == weight.device
    if value.dtype not in DTYPES or not value.is_contiguous() or not like:
        raise ValueError(
            f"{name}: expected a contiguous matrix {tuple(weight.shape)} in {weight.dtype} on {weight.device}, got "
            f"{tuple(value.shape)} in {value.dtype} on {value.device}"
            f"{'' if value.is_contiguous() else ', which is not contiguous'}"
        )


class RowStepper:
    """Steps rows of a matrix, a part after the other."""

    def __init__(
        self,
        run: Kernels,
        weight: Tensor,
        update: RowUpdate,
        *,
        selected: Tensor | None = None,
        first_row: int = 0,
        skip: Tensor | None = None,
    ):
        """
        Args:
            weight: (C, D), contiguous.
            selected: (R,) int64, ascending rows of weight that are stepped; None for all.
            first_row: row 0 of weight has this number in the stream of random bits.
            skip: (1,) bool; if true, the kernel changes nothing.

        Raises:
            ValueError: for a matrix that the kernel cannot write, or a moment that is not like weight.
        """
        check_rows("weight", weight, weight)
        check_rows("momentum", update.momentum, weight)
        check_rows("second_moment", update.second_moment, weight)
        self.run, self.weight, self.update, self.selected = run, weight, update, selected
        self.common = {
            "parameter": weight, "momentum": update.momentum, "second_moment": update.second_moment,
            "project": update.project, "stochastic": update.stochastic, "step": update.step, "first_row": first_row,
            "skip": skip,
        }  # fmt: skip

    def step(self, completion: dict[str, Any], added: Tensor | None = None) -> None:
        """Completes the gradient of a part, and steps its rows. The gradient is overwritten.

        Args:
            completion: arguments of `project_weight_gradient`.
            added: (C, D) in the dtype of the gradient, added to the completed gradient.
        """
        begin, count = completion["class_begin"], completion["chunk"]
        self.run.step_rows(
            **completion, **self.common, **self.update.numbers(), added=added, momentum_only=False,
            seed=self.update.seed, selected=None if self.selected is None else self.selected[begin : begin + count],
        )  # fmt: skip

    def add_to_momentum(self, completion: dict[str, Any]) -> None:
        """``m = beta1 m + g`` with the completed gradient g of a part. `after_momentum` must do the rest of the step."""
        self.run.step_rows(
            **completion, **self.common, **self.update.numbers(), added=None, momentum_only=True,
            seed=self.update.seed ^ MOMENTUM_STREAM, selected=None,
        )  # fmt: skip

    def after_momentum(self) -> None:
        """Makes `step` the rest of a step whose momentum already contains ``beta1 m``."""
        self.update = self.update._replace(beta1=1.0)


MOMENTUM_STREAM = 0x5DEECE66D  # differs from the random bits of `step`


def parts(begin: int, end: int, rows: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of parts of at most `rows` rows."""
    return ((first, min(first + rows, end)) for first in range(begin, end, rows))


def rows_per_part(weight: Tensor, dtype: torch.dtype, workspace_bytes: int | None = None, multiple: int = 1) -> int:
    """Rows of a part: a multiple of `multiple` and of MIN_CHUNK, at most a quarter of the workspace if it is larger."""
    limit = PART_BYTES["cuda" if weight.device.type == "cuda" else "cpu"]
    if workspace_bytes is not None:
        limit = min(limit, workspace_bytes // 4)
    smallest = MIN_CHUNK * multiple
    return max(limit // (max(weight.shape[1], 1) * dtype.itemsize) // smallest * smallest, smallest)
