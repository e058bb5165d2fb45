"""Weighted L1 distances of all pairs of rows, in tiles of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_margin._ops.inputs import MIB
from fused_margin._ops.library import refuse_second_order, register

TILE_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}  # on a CPU, larger tiles leave the cache between the passes over them


def weighted_l1_distances(rows: Tensor, alpha: Tensor, *, workspace_mb: float = 256) -> Tensor:
    """``sum_d alpha_d |rows_id - rows_jd|`` of all pairs i < j, computed in tiles of the (N, N, D) differences.

    Args:
        rows: (N, D), float32 or float64.
        alpha: (D,) of either sign, of the same dtype.
        workspace_mb: bound on scratch memory in MiB. A tile has at least one pair of rows.

    Returns:
        (N, N), 0 on and below the diagonal; differentiable once. Where two numbers are equal, the derivative of their
        absolute difference is taken as 0.
    """
    return l1_distances(rows, alpha, int(workspace_mb * MIB))


def tiles(rows: Tensor, workspace_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of tiles that cover all pairs i < j, and pairs i >= j beside the diagonal."""
    count, size = rows.shape
    available = min(TILE_BYTES.get(rows.device.type, TILE_BYTES["cpu"]), workspace_bytes)
    pairs = max(1, available // (2 * rows.element_size() * max(1, size)))  # a tile, and a temporary
    width = min(count, pairs)
    height = max(1, pairs // max(1, width))
    for top in range(0, count, height):
        for left in range(top, count, max(1, width)):
            yield slice(top, min(top + height, count)), slice(left, min(left + width, count))


def forward(rows: Tensor, alpha: Tensor, workspace_bytes: int) -> Tensor:
    distances = rows.new_zeros(len(rows), len(rows))
    for across, along in tiles(rows, workspace_bytes):
        differences = (rows[across].unsqueeze(1) - rows[along]).abs_()
        distances[across, along] = differences @ alpha
    return distances.triu_(1)


def backward(upstream: Tensor, rows: Tensor, alpha: Tensor, workspace_bytes: int) -> tuple[Tensor, Tensor]:
    """Gradients of rows and alpha, from one sum over the pairs.

    With ``s_id = sum_{j != i} upstream_ij sign(rows_id - rows_jd)``, the gradient of rows is ``alpha_d s_id`` and that of
    alpha is ``sum_i rows_id s_id``, because ``|a - b| = sign(a - b) a + sign(b - a) b``.
    """
    upstream = upstream.triu(1)
    sums = torch.zeros_like(rows, memory_format=torch.contiguous_format)
    for across, along in tiles(rows, workspace_bytes):
        signs = (rows[across].unsqueeze(1) - rows[along]).sign_()
        signs.mul_(upstream[across, along].unsqueeze(2))
        sums[across] += signs.sum(1)
        sums[along] -= signs.sum(0)
    # The sums of a column of s are 0, so a shift of the rows changes nothing but the rounding error.
    centered = rows - rows.mean(0)
    return alpha * sums, (centered * sums).sum(0)


def _l1_distances(rows: Tensor, alpha: Tensor, workspace_bytes: int) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        return forward(rows, alpha, workspace_bytes)


def _l1_distances_fake(rows, alpha, workspace_bytes):
    return rows.new_empty(rows.shape[0], rows.shape[0])


def _l1_distances_backward(
    upstream: Tensor, rows: Tensor, alpha: Tensor, workspace_bytes: int
) -> tuple[Tensor, Tensor]:
    with torch.autocast(rows.device.type, enabled=False):
        return backward(upstream, rows, alpha, workspace_bytes)


def _l1_distances_backward_fake(upstream, rows, alpha, workspace_bytes):
    return torch.empty_like(rows, memory_format=torch.contiguous_format), torch.empty_like(alpha)


l1_distances_backward = register(
    "l1_distances_backward", _l1_distances_backward, _l1_distances_backward_fake, backward=refuse_second_order
)


def _context(ctx, inputs, output):
    rows, alpha, ctx.workspace_bytes = inputs
    ctx.save_for_backward(rows, alpha)


def _gradient(ctx, upstream):
    return *l1_distances_backward(upstream, *ctx.saved_tensors, ctx.workspace_bytes), None


l1_distances = register("l1_distances", _l1_distances, _l1_distances_fake, backward=_gradient, setup_context=_context)
