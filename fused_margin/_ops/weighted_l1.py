"""Weighted L1 distances of all pairs of rows, in tiles of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_margin._ops.inputs import MIB
from fused_margin._ops.library import refuse_second_order, register

TILE_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}  # on a CPU, larger tiles leave the cache between the passes over them


def weighted_l1_distances(
    rows: Tensor, alpha: Tensor, own: slice | None = None, *, workspace_mb: float = 256
) -> Tensor:
    """``sum_d alpha_d |rows_id - rows_jd|`` of pairs i < j, computed in tiles of the (N, M, D) differences.

    Args:
        rows: (M, D), float32 or float64.
        alpha: (D,) of either sign, of the same dtype.
        own: the N rows i. By default all.
        workspace_mb: bound on scratch memory in MiB. A tile has at least one pair of rows.

    Returns:
        (N, M), 0 where j <= i; differentiable once. Where two numbers are equal, the derivative of their absolute
        difference is taken as 0.
    """
    begin, end = (0, len(rows)) if own is None else (own.start, own.stop)
    return l1_distances(rows, alpha, begin, end - begin, int(workspace_mb * MIB))


def tiles(rows: Tensor, begin: int, count: int, workspace_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Tiles that cover all pairs i < j of the rows i from `begin` on with all rows j, and a few pairs i >= j.

    Yields:
        The rows i of a tile, counted from `begin`, and its rows j.
    """
    total, size = rows.shape
    available = min(TILE_BYTES.get(rows.device.type, TILE_BYTES["cpu"]), workspace_bytes)
    pairs = max(1, available // (2 * rows.element_size() * max(1, size)))  # a tile, and a temporary
    width = max(1, min(total, pairs))
    height = max(1, pairs // width)
    for top in range(0, count, height):
        for left in range(begin + top, total, width):
            yield slice(top, min(top + height, count)), slice(left, min(left + width, total))


def forward(rows: Tensor, alpha: Tensor, begin: int, count: int, workspace_bytes: int) -> Tensor:
    distances = rows.new_zeros(count, len(rows))
    own = rows[begin : begin + count]
    for across, along in tiles(rows, begin, count, workspace_bytes):
        differences = (own[across].unsqueeze(1) - rows[along]).abs_()
        distances[across, along] = differences @ alpha
    return distances.triu_(1 + begin)


def backward(
    upstream: Tensor, rows: Tensor, alpha: Tensor, begin: int, count: int, workspace_bytes: int
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and alpha, from one sum over the pairs.

    With ``s_id = sum_{j != i} upstream_ij sign(rows_id - rows_jd)``, the gradient of rows is ``alpha_d s_id`` and that of
    alpha is ``sum_i rows_id s_id``, because ``|a - b| = sign(a - b) a + sign(b - a) b``.
    """
    upstream = upstream.triu(1 + begin)
    sums = torch.zeros_like(rows, memory_format=torch.contiguous_format)
    own, own_sums = rows[begin : begin + count], sums[begin : begin + count]
    for across, along in tiles(rows, begin, count, workspace_bytes):
        signs = (own[across].unsqueeze(1) - rows[along]).sign_()
        signs.mul_(upstream[across, along].unsqueeze(2))
        own_sums[across] += signs.sum(1)
        sums[along] -= signs.sum(0)
    # The sums of a column of s are 0, so a shift of the rows changes nothing but the rounding error.
    centered = rows - rows.mean(0)
    return alpha * sums, (centered * sums).sum(0)


def _l1_distances(rows: Tensor, alpha: Tensor, begin: int, count: int, workspace_bytes: int) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        return forward(rows, alpha, begin, count, workspace_bytes)


def _l1_distances_fake(rows, alpha, begin, count, workspace_bytes):
    return rows.new_empty(count, rows.shape[0])


def _l1_distances_backward(
    upstream: Tensor, rows: Tensor, alpha: Tensor, begin: int, count: int, workspace_bytes: int
) -> tuple[Tensor, Tensor]:
    with torch.autocast(rows.device.type, enabled=False):
        return backward(upstream, rows, alpha, begin, count, workspace_bytes)


def _l1_distances_backward_fake(upstream, rows, alpha, begin, count, workspace_bytes):
    return torch.empty_like(rows, memory_format=torch.contiguous_format), torch.empty_like(alpha)


l1_distances_backward = register(
    "l1_distances_backward", _l1_distances_backward, _l1_distances_backward_fake, backward=refuse_second_order
)


def _context(ctx, inputs, output):
    rows, alpha, *ctx.options = inputs
    ctx.save_for_backward(rows, alpha)


def _gradient(ctx, upstream):
    return *l1_distances_backward(upstream, *ctx.saved_tensors, *ctx.options), None, None, None


l1_distances = register("l1_distances", _l1_distances, _l1_distances_fake, backward=_gradient, setup_context=_context)
