"""The ops that step class weights: in the backward of a loss, and by a gradient that exists."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from fused_margin._ops import forward_backward
from fused_margin._ops.backends.select import kernels_on
from fused_margin._ops.inputs import ForwardOutput, LossInputs, OutputGradients, compute_dtype
from fused_margin._ops.library import (
    FIELDS,
    INPUTS_SCHEMA,
    arguments_schema,
    register,
)
from fused_margin._ops.row_update import NO_COMPLETION, RowStepper, RowUpdate, parts, rows_per_part

UPDATE_SCHEMA = (
    "Tensor(b!)? momentum, Tensor(c!)? second_moment, int rule, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, float correction1, float correction2, bool project, bool stochastic, int seed, int step"
)


def _step_rows(weight: Tensor, gradient: Tensor, selected: Tensor | None, *values) -> None:
    """Steps all rows of weight (C, D), or the selected ones, by their gradient (C, D) or (R, D)."""
    dtype = compute_dtype(weight, gradient)
    count, rows = len(gradient), rows_per_part(weight, dtype)
    buffer = gradient.new_empty(min(rows, count), weight.shape[1], dtype=dtype)
    with kernels_on(weight.device) as run:
        stepper = RowStepper(run, weight, RowUpdate(*values), selected=selected)
        for begin, end in parts(0, count, rows):
            part = buffer[: end - begin].copy_(gradient[begin:end])
            stepper.step(
                NO_COMPLETION
                | {"gradient": part, "weight": weight, "classes": len(weight), "size": weight.shape[1],
                   "class_begin": begin, "chunk": end - begin}
            )  # fmt: skip


step_rows = register(
    "step_rows",
    _step_rows,
    lambda *_: None,
    schema=f"(Tensor(a!) weight, Tensor gradient, Tensor? selected, {UPDATE_SCHEMA}) -> ()",
    mutates=("weight", "momentum", "second_moment"),
)


def _backward_step(*values) -> tuple[Tensor, Tensor, Tensor]:
    rest = iter(values)
    inputs = LossInputs(*islice(rest, len(FIELDS)))
    upstream = OutputGradients(*islice(rest, len(OutputGradients._fields)))
    saved = ForwardOutput(*islice(rest, len(ForwardOutput._fields)))
    need_embeddings, need_bias, *update = rest
    gradients = forward_backward.backward(
        inputs, upstream, saved, need_embeddings, False, need_bias, RowUpdate(*update)
    )  # fmt: skip
    return gradients.embeddings, gradients.bias, gradients.sample_scale


def _backward_step_fake(*values):
    inputs = LossInputs(*values[: len(FIELDS)])
    need_embeddings, need_bias = values[-len(RowUpdate._fields) - 2 :][:2]
    embeddings, bias, scale, new = inputs.embeddings, inputs.bias, inputs.sample_scale, inputs.weight.new_empty
    d_embeddings = new(0)
    if need_embeddings and embeddings is not None:
        d_embeddings = torch.empty_like(embeddings, memory_format=torch.contiguous_format)
    d_bias = bias.new_empty(bias.shape) if need_bias and bias is not None else new(0)
    return d_embeddings, d_bias, torch.empty_like(scale) if scale is not None else new(0, dtype=torch.float64)


# As backward_chunks, but steps the weight instead of returning its gradient.
backward_step = register(
    "backward_step",
    _backward_step,
    _backward_step_fake,
    schema=f"({INPUTS_SCHEMA.replace('Tensor weight', 'Tensor(a!) weight')}, {arguments_schema(OutputGradients, 'd_')}, "
    f"{arguments_schema(ForwardOutput)}, bool need_embeddings, bool need_bias, {UPDATE_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    mutates=("weight", "momentum", "second_moment"),
)
