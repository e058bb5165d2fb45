"""A forward whose backward steps the class weights instead of computing their gradient."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fused_margin._ops import forward_backward, library
from fused_margin._ops.inputs import ForwardOutput, LossInputs, OutputGradients, compute_dtype
from fused_margin._ops.library import FIELDS, IS_TENSOR
from fused_margin._ops.row_update import NAME, RowUpdate, rows_per_part
from fused_margin._ops.weight_steps import backward_step

DIFFERENTIABLE = (
    "relative_logsumexp", "target_cosine", "uniform_cosine", "nearest_cosine", "target_bias", "target_length",
)  # fmt: skip


class Steps(Protocol):
    """What a backward needs to step class weights; fused_margin.optim.StepInBackward implements it."""

    forwards: weakref.WeakSet  # the autograd nodes of forwards

    def check_forward(self, inputs: LossInputs) -> None:
        """Raises RuntimeError for a call whose weight cannot be stepped in its backward."""

    def begin_step(self, node: Any, upstream: OutputGradients) -> RowUpdate:
        """The step that the backward of an autograd node makes. Raises RuntimeError if it cannot be made."""

    def end_step(self) -> None:
        """Called when the step has been made."""


@library.untraced
def run_forward(stepper: Steps, inputs: LossInputs, uniform: bool, ignore_index: int) -> ForwardOutput:
    """As library.run_forward with gradients, with a backward that steps `inputs.weight`."""
    stepper.check_forward(inputs)
    # The backward needs memory for the gradient of a part of the rows.
    dtype, (_, _, size) = compute_dtype(inputs.embeddings, inputs.weight), inputs.shape
    reserved = rows_per_part(inputs.weight, dtype, inputs.workspace_bytes, inputs.sub_centers) * size * dtype.itemsize
    inputs = replace(inputs, workspace_bytes=max(inputs.workspace_bytes - reserved, 1))
    values = [getattr(inputs, field.name) for field in FIELDS]
    library.refuse_unsupported(values)
    output = ForwardOutput(*_StepInBackward.apply(stepper, uniform, ignore_index, *values))
    stepper.forwards.add(output.relative_logsumexp.grad_fn)
    return output


class _StepInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stepper: Steps, uniform: bool, ignore_index: int, *values: Any) -> tuple[Tensor, ...]:
        inputs = LossInputs(*values)
        output = forward_backward.forward(inputs, uniform, ignore_index, save_for_backward=True)
        ctx.mark_non_differentiable(*(t for name, t in output._asdict().items() if name not in DIFFERENTIABLE))
        ctx.set_materialize_grads(False)
        # Not the weight: autograd would not say why it cannot be used any more.
        tensors = [
            None if field.name == "weight" else v
            for field, v, tensor in zip(FIELDS, values, IS_TENSOR, strict=True)
            if tensor
        ]
        ctx.save_for_backward(*tensors, *output)
        ctx.settings = [value for value, tensor in zip(values, IS_TENSOR, strict=True) if not tensor]
        ctx.stepper, ctx.weight, ctx.version = stepper, inputs.weight, inputs.weight._version
        return tuple(output)

    @staticmethod
    @library.untraced
    def backward(ctx: Any, *gradients_of_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        stepper, tensors, settings = ctx.stepper, list(ctx.saved_tensors), iter(ctx.settings)
        saved = ForwardOutput(*tensors[sum(IS_TENSOR) :])
        values = [tensors.pop(0) if tensor else next(settings) for tensor in IS_TENSOR]
        values[[field.name for field in FIELDS].index("weight")] = ctx.weight
        needed = dict(zip((field.name for field in FIELDS), ctx.needs_input_grad[3:], strict=True))
        upstream = library.upstream_of(LossInputs(*values), saved, gradients_of_outputs)
        if ctx.weight._version != ctx.version:
            raise RuntimeError(
                f"{NAME}: the class weights changed after this forward, so that its backward would use other weights; "
                "call backward once after each forward, before the next step"
            )
        is_stepped, needed["weight"] = weight_use(ctx.weight)
        if not is_stepped or all(g is None for g in upstream):
            return (None, None, None, *library.input_gradients(values, upstream, saved, needed).values())
        if torch.is_grad_enabled():
            raise RuntimeError(library.SECOND_ORDER)
        library.refuse_batched_gradients(upstream)
        update = stepper.begin_step(ctx, upstream)
        embeddings, bias, scale = backward_step(
            *values, *upstream, *saved, needed["embeddings"], needed["bias"], *update
        )
        stepper.end_step()
        stepped = {"embeddings": embeddings, "bias": bias, "sample_scale": scale}
        return (None, None, None, *(stepped.get(name) if need else None for name, need in needed.items()))


def weight_use(weight: Tensor) -> tuple[bool, bool]:
    """In a backward: whether it accumulates the gradient of weight, as ``loss.backward()`` does, and whether it returns it.

    ``torch.autograd.grad`` returns gradients. Other calls need neither, such as ``loss.backward(inputs=[embeddings])``.
    """
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(weight).node), False
    except RuntimeError:  # a leaf in torch.autograd.grad
        return False, True
