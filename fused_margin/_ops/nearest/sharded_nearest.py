"""The nearest other class over classes that are divided among ranks, and the gradient of its cosine, in memory O(shard)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_margin._ops import forward_backward
from fused_margin._ops.backends.select import PORTABLE, searches
from fused_margin._ops.inputs import Problem, compute_dtype
from fused_margin._ops.kernels import Kernels, kernels, on_device
from fused_margin._ops.nearest import sharded_certified
from fused_margin._ops.nearest.sharded_search import owners
from fused_margin._ops.normalization import through_normalization, unit_rows
from fused_margin._ops.plan import CHUNK_BYTES, whole_chunk
from fused_margin._ops.registration import FirstOrderFunction, refuse_batched_gradients
from fused_margin.distributed import Shard


@torch.no_grad()
def find(shard: Shard, weight: Tensor, workspace_bytes: int) -> tuple[Tensor, Tensor]:
    """Cosine (C_rank,) of the own classes to their nearest others of all ranks, and those classes' numbers over all."""
    with on_device(weight.device), torch.autocast(weight.device.type, enabled=False):
        run = kernels(weight.device)
        if searches(weight.device):
            return sharded_certified.find_nearest(run, shard, weight, workspace_bytes)
        return find_by_products(run, shard, weight, workspace_bytes)


def find_by_products(run: Kernels, shard: Shard, weight: Tensor, workspace_bytes: int) -> tuple[Tensor, Tensor]:
    """As `find`, between ranks by rounded products."""
    compute = compute_dtype(weight)
    best = weight.new_full((len(weight),), -4.0, dtype=compute)  # below every cosine
    index = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
    unit = unit_rows(weight, compute)[0]
    begin = 0
    for owner, (visitor,) in shard.visits([unit], shard.sizes):  # ascending: the lowest class keeps a tie
        if owner == shard.rank and len(weight) > 1:
            found = forward_backward.forward(
                Problem(None, weight, workspace_bytes, PORTABLE, nearest=True), False, 0, False
            )
            offered, at = found.nearest_cosine, found.nearest_index
        elif owner != shard.rank and len(weight):
            offered, at = nearest_between(run, unit, visitor, workspace_bytes)
        else:
            offered, at = torch.full_like(best, -4.0), index
        nearer = offered > best
        best, index = torch.where(nearer, offered, best), torch.where(nearer, at + begin, index)
        begin += len(visitor)
    return best.masked_fill(best < -2.0, math.nan).clamp_(-1.0, 1.0), index


class ShardedNearest(FirstOrderFunction):
    """Cosines (C_rank,) of the own classes to the ones, of any rank, that `index` (C_rank,) names: given, and differentiated."""

    @staticmethod
    def forward(ctx, shard: Shard, weight: Tensor, cosine: Tensor, index: Tensor) -> Tensor:
        ctx.shard = shard
        ctx.save_for_backward(weight, index)
        return cosine.to(compute_dtype(weight), copy=True)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        """Every class takes its nearest's direction from that one's rank, and sends it its own."""
        refuse_batched_gradients([upstream])
        (weight, index), shard = ctx.saved_tensors, ctx.shard
        compute = compute_dtype(weight)
        unit = unit_rows(weight, compute)[0]
        order, asked = owners(shard, index)
        counts = shard.gather(asked).tolist()  # counts[a][b]: what a asks b for
        sent, received = counts[shard.rank], [row[shard.rank] for row in counts]
        wanted = shard.exchange(index[order], sent, received) - shard.begin
        theirs = shard.exchange(unit[wanted], received, sent)
        scaled = upstream[order].to(compute).unsqueeze(1)
        gradient = torch.zeros_like(unit)
        gradient[order] = scaled * theirs
        offered = shard.exchange(scaled * unit[order], sent, received)
        gradient.index_put_((wanted,), offered, accumulate=True)  # in the order of ranks: repeats bit for bit
        through_normalization(gradient, weight)
        return None, gradient.to(weight.dtype), None, None


def nearest_between(run: Kernels, query: Tensor, reference: Tensor, workspace_bytes: int) -> tuple[Tensor, Tensor]:
    """Cosine (Q,) of unit rows to the nearest of others (R, D), and its row; ties to the lowest."""
    # The kernel compares parts of one list with itself: here references come first, and queries after them.
    rows, columns, item = len(query), len(reference), query.element_size()
    cosine = query.new_full((columns + rows,), -4.0)
    index = torch.zeros(columns + rows, dtype=torch.int64, device=query.device)
    room = min(CHUNK_BYTES[query.device.type], workspace_bytes)
    side = whole_chunk(max(rows, columns), math.isqrt(room // item))
    buffer = query.new_empty(side * side)
    for top in range(0, rows, side):
        height = min(side, rows - top)
        for left in range(0, columns, side):
            width = min(side, columns - left)
            products = buffer[: height * width].view(height, width)
            torch.mm(query[top : top + height], reference[left : left + width].t(), out=products)
            run.nearest_tile(
                products=products, cosine=cosine, index=index, rows=height, columns=width, row_begin=columns + top,
                column_begin=left,
            )  # fmt: skip
    return cosine[columns:], index[columns:]
