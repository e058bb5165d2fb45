"""Sums over the pairs of all classes, divided among ranks: the class weights of other ranks arrive a block at a time.

Of the classes of two ranks each pair is computed once. The rank that computes it returns the sum and the gradient of the
other rank's class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_margin._ops import class_pair_sums
from fused_margin._ops.class_pair_sums import FUNCTIONS, tiles
from fused_margin._ops.collectives import scatter_rows
from fused_margin._ops.inputs import MIN_CHUNK, compute_dtype
from fused_margin._ops.library import refuse_batched_gradients, refuse_second_order, register
from fused_margin._ops.normalization import through_normalization, unit_rows
from fused_margin.distributed import Shard, named_shard, slice_of


class Block(NamedTuple):
    """Classes of a rank, and those of their pairs with classes of this rank that this rank computes."""

    owner: int
    classes: slice  # of the owner's
    tensors: list[Tensor]  # rows of the classes
    own: slice  # of the classes of this rank
    part: slice  # of the classes of the block


def _blocks(shard: Shard, own: list[Tensor], workspace_bytes: int) -> Iterator[Block]:
    """The classes of every rank. The two resident blocks and a gradient take at most half of the workspace."""
    row_bytes = own[0].shape[1] * own[0].element_size()
    block_rows = max(MIN_CHUNK, workspace_bytes // 6 // row_bytes)
    begin, previous = 0, 0
    for owner, tensors in shard.iter_shards(own, shard.sizes, block_rows):
        begin, previous, count = 0 if owner != previous else begin, owner, len(tensors[0])
        # The lower of two ranks computes the pairs of the first half of the other's classes.
        half = shard.sizes[max(owner, shard.rank)] // 2
        rows, part = slice(0, shard.size), slice(0, max(0, min(half - begin, count)))
        if owner < shard.rank:
            rows, part = slice(half, shard.size), slice(0, count)
        elif owner == shard.rank:
            rows = part = slice(0, 0)
        yield Block(owner, slice(begin, begin + count), tensors, rows, part)
        begin += count


def forward(weight: Tensor, function: str, workspace_bytes: int, shard: Shard) -> Tensor:
    dtype, half_workspace = compute_dtype(weight), workspace_bytes // 2
    sums = weight.new_zeros(shard.num_classes, dtype=torch.float64)
    own_sums = shard.local_part(sums)
    own_sums += class_pair_sums.forward(None, weight, None, function, half_workspace)
    for block in _blocks(shard, [weight], workspace_bytes):
        rows, remote = weight[block.own], block.tensors[0][block.part]
        row_sums = own_sums[block.own]
        first = slice_of(shard.num_classes, block.owner, shard.world_size)[0] + block.classes.start
        remote_sums = sums[first : first + len(remote)]
        for tile in tiles(len(rows), remote, False, dtype, half_workspace):
            cosine = unit_rows(rows[tile.rows], dtype)[0] @ unit_rows(remote[tile.columns], dtype)[0].t()
            values = FUNCTIONS[function].value(cosine)
            row_sums[tile.rows] += values.sum(1, dtype=torch.float64)
            remote_sums[tile.columns] += values.sum(0, dtype=torch.float64)
    return scatter_rows(sums, shard.sizes, shard.name)


def backward(upstream: Tensor, weight: Tensor, function: str, workspace_bytes: int, shard: Shard) -> Tensor:
    dtype, half_workspace = compute_dtype(weight), workspace_bytes // 2
    d_weight = torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    eps = torch.finfo(dtype).eps
    for block in _blocks(shard, [weight, upstream.to(dtype)], workspace_bytes):
        remote, remote_upstream = block.tensors
        d_remote = torch.zeros_like(remote, dtype=dtype)
        columns, column_upstream, d_columns = remote[block.part], remote_upstream[block.part], d_remote[block.part]
        rows, row_upstream, d_rows = weight[block.own], upstream[block.own].to(dtype), d_weight[block.own]
        for tile in tiles(len(rows), columns, False, dtype, half_workspace):
            left, right = unit_rows(rows[tile.rows], dtype)[0], unit_rows(columns[tile.columns], dtype)[0]
            derivative = FUNCTIONS[function].derivative(left @ right.t(), eps)
            derivative.mul_(row_upstream[tile.rows].unsqueeze(1) + column_upstream[tile.columns])
            d_rows[tile.rows].addmm_(derivative, right)
            d_columns[tile.columns].addmm_(derivative.t(), left)
        shard.reduce_sum(d_remote, block.owner)
        if block.owner == shard.rank:
            d_weight[block.classes] += d_remote
    through_normalization(d_weight, weight)
    among_own = class_pair_sums.backward(upstream, None, weight, None, function, half_workspace)[1]
    return d_weight.to(weight.dtype).add_(among_own)


def _divided_pair_sums(weight: Tensor, function: str, workspace_bytes: int, group: str, num_classes: int) -> Tensor:
    """``sum_{j != i} f(cos(weight_i, weight_j))`` over the classes of all ranks, for the classes i of this rank."""
    with torch.autocast(weight.device.type, enabled=False):
        return forward(weight, function, workspace_bytes, named_shard(group, num_classes))


def _divided_pair_sums_fake(weight, *_):
    return weight.new_empty(weight.shape[0], dtype=torch.float64)


def _divided_pair_sums_backward(
    upstream: Tensor, weight: Tensor, function: str, workspace_bytes: int, group: str, num_classes: int
) -> Tensor:
    with torch.autocast(weight.device.type, enabled=False):
        return backward(upstream, weight, function, workspace_bytes, named_shard(group, num_classes))


divided_pair_sums_backward = register(
    "divided_pair_sums_backward",
    _divided_pair_sums_backward,
    lambda _upstream, weight, *_: torch.empty_like(weight, memory_format=torch.contiguous_format),
    backward=refuse_second_order,
)


def _context(ctx, inputs, output):
    weight, *ctx.settings = inputs
    ctx.save_for_backward(weight)


def _gradient(ctx, upstream):
    refuse_batched_gradients([upstream])
    (weight,) = ctx.saved_tensors
    return divided_pair_sums_backward(upstream, weight, *ctx.settings), None, None, None, None


divided_pair_sums = register(
    "divided_pair_sums", _divided_pair_sums, _divided_pair_sums_fake, backward=_gradient, setup_context=_context
)
