"""The ops that communicate between ranks: differentiable sums, and the cosines to targets of any rank."""

import torch
from torch import Tensor

from fused_margin._ops import divided
from fused_margin._ops.library import refuse_batched_gradients, register
from fused_margin.distributed import named_shard


def _all_reduce_forward(value: Tensor, group: str) -> Tensor:
    """The sum over all ranks. Each rank differentiates its own summand."""
    return named_shard(group, 1).all_reduce_sum(value.clone())


def _all_reduce_backward(value: Tensor, group: str) -> Tensor:
    """A value that is the same on every rank and used for each rank's samples: its gradient is the sum over ranks."""
    return value.clone()


def _like_value(value, group):
    return torch.empty_like(value)


def _group_context(ctx, inputs, output):
    ctx.group = inputs[1]


def _unchanged_gradient(ctx, gradient):
    return gradient, None


def _summed_gradient(ctx, gradient):
    refuse_batched_gradients([gradient])
    return all_reduce_forward(gradient.double(), ctx.group).to(gradient.dtype), None


all_reduce_forward = register(
    "all_reduce_forward", _all_reduce_forward, _like_value, backward=_unchanged_gradient, setup_context=_group_context
)
all_reduce_backward = register(
    "all_reduce_backward", _all_reduce_backward, _like_value, backward=_summed_gradient, setup_context=_group_context
)


def _divided_target_cosines_fake(embeddings, *_):
    return embeddings.new_empty(embeddings.shape[0], dtype=torch.float64)


divided_target_cosines = register(
    "divided_target_cosines", divided.divided_target_cosines, _divided_target_cosines_fake
)
