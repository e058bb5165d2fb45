"""Bias and length of the weight of each sample's target, on the rank that has the class, and their gradients."""

import torch
from torch import Tensor

from fused_margin._ops.inputs import ForwardOutput, LossInputs


def _own_rows(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Flags (N,) of the samples whose class is in `inputs.weight`, and the row (N,) of the class; row 0 for the others."""
    assert inputs.labels is not None
    known = (inputs.labels >= 0) & (inputs.labels < inputs.weight.shape[0])
    return known, torch.where(known, inputs.labels, 0)


def write(inputs: LossInputs, output: ForwardOutput) -> None:
    """Writes target_bias and target_length (N,), if they are needed. They are 0 for a class of another rank."""
    if not inputs.weight.shape[0]:
        output.target_bias.zero_()
        output.target_length.zero_()
        return
    known, rows = _own_rows(inputs)
    if inputs.bias is not None:
        output.target_bias.copy_(torch.where(known, inputs.bias[rows].double(), 0.0))
    if inputs.need_length:
        length = torch.linalg.vector_norm(inputs.weight[rows], dim=1, dtype=torch.float64)
        output.target_length.copy_(torch.where(known, length, 0.0))


def _class_sums(inputs: LossInputs, upstream: Tensor) -> Tensor:
    """Sums (C,) of upstream gradients (N,) over the samples of each class.

    In float64, because torch's index_put_ then adds in a fixed order.
    """
    known, rows = _own_rows(inputs)
    sums = upstream.new_zeros(inputs.weight.shape[0], dtype=torch.float64)
    return sums.index_put_((rows,), torch.where(known, upstream.double(), 0.0), accumulate=True)


def add_bias_gradient(inputs: LossInputs, gradient: Tensor, upstream: Tensor | None) -> Tensor:
    """The gradient (C,) of the bias, plus the gradient of target_bias."""
    if upstream is None or not inputs.weight.shape[0]:
        return gradient
    return (gradient.double() + _class_sums(inputs, upstream)).to(gradient.dtype)


def length_gradient(inputs: LossInputs, upstream: Tensor | None) -> Tensor | None:
    """The gradients (C,) float64 of the lengths of the class weights; None if target_length has no gradient."""
    return None if upstream is None or not inputs.weight.shape[0] else _class_sums(inputs, upstream)
