"""The nearest other class of classes that are divided among ranks, by rounded products, where the exact search is off."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fused_margin._ops.backends.select import Kernels
from fused_margin._ops.inputs import CHUNK_BYTES, PORTABLE, LossInputs, whole_chunk
from fused_margin._ops.normalization import unit_rows
from fused_margin.distributed import Shard


def find_by_tiles(run: Kernels, shard: Shard, inputs: LossInputs, forward_chunks: Callable) -> tuple[Tensor, Tensor]:
    """Cosine (C_rank,) of the own classes to their nearest others of all ranks, and their numbers over all.

    Args:
        forward_chunks: finds the nearest among the own classes.
    """
    weight, workspace = inputs.weight, inputs.workspace_bytes
    unit = unit_rows(weight, inputs.compute)[0]
    best = torch.full_like(unit[:, 0], -4.0)  # below every cosine
    index = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
    begin = 0
    for owner, (remote,) in shard.iter_shards([unit], shard.sizes):  # ascending: the lowest class keeps a tie
        if owner == shard.rank and len(weight) > 1:
            alone = LossInputs(None, weight, workspace, PORTABLE, nearest=True, num_classes=len(weight))
            output = forward_chunks(run, alone, None, False, 0, False)
            offered, at = output.nearest_cosine, output.nearest_index
        elif owner != shard.rank and len(weight):
            offered, at = nearest_between(run, unit, remote, workspace)
        else:
            offered, at = torch.full_like(best, -4.0), index
        nearer = offered > best
        best, index = torch.where(nearer, offered, best), torch.where(nearer, at + begin, index)
        begin += len(remote)
    return best.masked_fill(best < -2.0, math.nan).clamp_(-1.0, 1.0), index


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
            scores = buffer[: height * width].view(height, width)
            torch.mm(query[top : top + height], reference[left : left + width].t(), out=scores)
            run.nearest_tile(
                scores=scores, cosine=cosine, index=index, rows=height, columns=width, row_begin=columns + top,
                column_begin=left,
            )  # fmt: skip
    return cosine[columns:], index[columns:]
