"""The nearest other class for classes divided among ranks, by rounded products, on devices without the exact search."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fused_margin._ops.backends.select import Kernels
from fused_margin._ops.inputs import CHUNK_BYTES, PORTABLE, LossInputs, compute_dtype, whole_chunk
from fused_margin._ops.normalization import unit_rows
from fused_margin.distributed import Shard


def find_by_tiles(run: Kernels, shard: Shard, inputs: LossInputs, forward_chunks: Callable) -> tuple[Tensor, Tensor]:
    """Cosine (C_rank,) of the classes of this rank to their nearest other classes, and these, over all ranks.

    Args:
        forward_chunks: finds the nearest among the classes of this rank.
    """
    weight, workspace = inputs.weight, inputs.workspace_bytes
    unit = unit_rows(weight, compute_dtype(inputs.embeddings, weight))[0]
    best = torch.full_like(unit[:, 0], -4.0)  # below every cosine
    index = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
    begin = 0
    for owner, (remote,) in shard.iter_shards([unit], shard.sizes):  # in ascending order: the lowest class wins a tie
        if owner == shard.rank and len(weight) > 1:
            local = LossInputs(None, weight, workspace, PORTABLE, nearest=True, num_classes=len(weight))
            output = forward_chunks(run, local, None, False, 0, False)
            cosine, row = output.nearest_cosine, output.nearest_index
        elif owner != shard.rank and len(weight):
            cosine, row = nearest_between(run, unit, remote, workspace)
        else:
            cosine, row = torch.full_like(best, -4.0), index
        nearer = cosine > best
        best, index = torch.where(nearer, cosine, best), torch.where(nearer, row + begin, index)
        begin += len(remote)
    return best.masked_fill(best < -2.0, math.nan).clamp_(-1.0, 1.0), index


def nearest_between(run: Kernels, query: Tensor, reference: Tensor, workspace_bytes: int) -> tuple[Tensor, Tensor]:
    """Cosine (Q,) of unit rows to the nearest reference (R, D), and its row. The lowest row wins a tie."""
    # nearest_tile numbers both sides of a tile in one array of rows: here the references, then the queries. Only the results
    # of the queries are returned.
    rows, columns, item = len(query), len(reference), query.element_size()
    cosine = query.new_full((columns + rows,), -4.0)
    index = torch.zeros(columns + rows, dtype=torch.int64, device=query.device)
    available = min(CHUNK_BYTES[query.device.type], workspace_bytes)
    side = whole_chunk(max(rows, columns), math.isqrt(available // item))
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
