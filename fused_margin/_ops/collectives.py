"""The ops that communicate between ranks: differentiable sums, samples of all ranks, and cosines to targets of any rank."""

import torch
from torch import Tensor

from fused_margin._ops import divided
from fused_margin._ops.library import refuse_batched_gradients, register
from fused_margin.distributed import Shard, named_shard, padded


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


def _gather_rows(rows: Tensor, counts: list[int], group: str) -> Tensor:
    """The rows (R, ...) of all ranks, in the order of the ranks; `counts` has the number of rows of every rank."""
    gathered = named_shard(group, 1).all_gather(padded(rows, max(counts)))
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


def _gather_rows_fake(rows, counts, _group):
    return rows.new_empty(sum(counts), *rows.shape[1:])


def _gather_context(ctx, inputs, output):
    _, ctx.counts, ctx.group = inputs


def _scattered_gradient(ctx, gradient):
    refuse_batched_gradients([gradient])
    return scatter_rows(gradient.double(), ctx.counts, ctx.group).to(gradient.dtype), None, None


def _scatter_rows(rows: Tensor, counts: list[int], group: str) -> Tensor:
    """The sum over the ranks of their rows (sum(counts), ...) for this rank."""
    shard = named_shard(group, 1)
    parts = torch.stack([padded(part, max(counts)) for part in rows.split(counts)])
    return shard.reduce_scatter(parts)[: counts[shard.rank]].clone()


def _scatter_rows_fake(rows, counts, group):
    return rows.new_empty(counts[named_shard(group, 1).rank], *rows.shape[1:])


def _gathered_gradient(ctx, gradient):
    refuse_batched_gradients([gradient])
    return gather_rows(gradient, ctx.counts, ctx.group), None, None


# Every rank differentiates its own part of a loss by the rows of all ranks, so the gradient of a row is the sum of theirs.
gather_rows = register(
    "gather_rows", _gather_rows, _gather_rows_fake, backward=_scattered_gradient, setup_context=_gather_context
)
# Each derivative is the other op: a sum over ranks becomes a part of the result of one rank, which has its gradient.
scatter_rows = register(
    "scatter_rows", _scatter_rows, _scatter_rows_fake, backward=_gathered_gradient, setup_context=_gather_context
)


def gather_batch(embeddings: Tensor, labels: Tensor, shard: Shard | None) -> tuple[Tensor, Tensor, int]:
    """The embeddings and labels of the samples of all ranks, and the position of the first sample of this rank.

    The embeddings are differentiable: their gradient is the sum over ranks of the derivatives of each rank's result.

    Args:
        embeddings: (N, D) of this rank. Ranks may have different N.
        labels: (N,) int64.
        shard: has the group of the ranks. None returns the arguments.

    Raises:
        ValueError: on every rank, if the embeddings of one differ from those of rank 0 in D or dtype.
    """
    if shard is None or shard.group is None:
        return embeddings, labels, 0
    counts = divided.gather_counts(shard, embeddings, embeddings.requires_grad and torch.is_grad_enabled())
    gathered = gather_rows(embeddings, counts, shard.name)
    return gathered, gather_rows(labels, counts, shard.name), sum(counts[: shard.rank])


def _divided_target_cosines_fake(embeddings, *_):
    return embeddings.new_empty(embeddings.shape[0], dtype=torch.float64)


divided_target_cosines = register(
    "divided_target_cosines", divided.divided_target_cosines, _divided_target_cosines_fake
)
