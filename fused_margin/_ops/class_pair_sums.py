"""Sums over all other classes of a function of the cosine to their weights, in tiles of bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_margin import _checks
from fused_margin._ops.inputs import CHUNK_BYTES, MIB, compute_dtype, whole_chunk
from fused_margin._ops.library import refuse_second_order, register
from fused_margin._ops.normalization import through_normalization, unit_rows


class Function(NamedTuple):
    """A function of a tile of cosines, and its derivative, both in place. eps bounds the derivative at a pole."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, float], Tensor]


def _angle(cosine: Tensor) -> Tensor:
    return cosine.clamp_(-1.0, 1.0).acos_()


def _angle_derivative(cosine: Tensor, eps: float) -> Tensor:
    """-1 / sin(theta)"""
    return cosine.square_().neg_().add_(1.0).clamp_(min=eps).rsqrt_().neg_()


def _potential(cosine: Tensor) -> Tensor:
    return cosine.mul_(-2.0).add_(2.0).clamp_(min=0.0).sqrt_().add_(1.0).reciprocal_()


def _potential_derivative(cosine: Tensor, eps: float) -> Tensor:
    """1 / (d * (1 + d)^2), because d = sqrt(2 - 2 cos) has the derivative -1 / d"""
    distance = cosine.mul_(-2.0).add_(2.0).clamp_(min=eps).sqrt_()
    return (distance + 1.0).square_().mul_(distance).reciprocal_()


FUNCTIONS = {"angle": Function(_angle, _angle_derivative), "potential": Function(_potential, _potential_derivative)}


def other_class_sums(
    rows: Tensor | None, weight: Tensor, own: Tensor | None, function: str, *, workspace_mb: float = 256
) -> Tensor:
    """``sum_{j != own_i} f(cos(rows_i, weight_j))`` for every row, computed in tiles of the cosines.

    Values are added in float64. A row shorter than 1e-12 counts as zero: its cosines and gradients are 0.

    Args:
        rows: (R, D), which need not be normalized. None uses the class weights, in half the time.
        weight: (C, D), which need not be normalized.
        own: (R,) int64 class to exclude from the sum of each row; an index out of range excludes none. None with
            ``rows=None``.
        function: ``"angle"``, arccos(cos), or ``"potential"``, 1 / (1 + d) with the distance d = sqrt(2 - 2 cos) of the
            unit vectors. In the derivatives sin(theta) and d are bounded below by the square root of the dtype's epsilon.
        workspace_mb: bound on scratch memory in MiB. A tile has at least 64 rows and classes. Gradients need
            O((R + C) * D) more.

    Returns:
        (R,) float64, or (C,) with ``rows=None``; differentiable once.

    Raises:
        ValueError, TypeError: for wrong shapes, dtypes or values.
    """
    _checks.class_weights(weight)
    if rows is not None:
        _checks.embeddings_for(rows, weight)
        _checks.per_sample_index("own", own, rows)
    if own is not None:
        own = own.to(torch.int64)
    if function not in FUNCTIONS:
        raise ValueError(f"function: expected one of {', '.join(map(repr, FUNCTIONS))}, got {function!r}")
    _checks.number("workspace_mb", workspace_mb, 0.0, open_low=True)
    return pair_sums(rows, weight, own, function, int(workspace_mb * MIB))


class Tile(NamedTuple):
    """A block of the cosines. A mirrored tile is above the diagonal of W W^T, and also stands for its transpose."""

    rows: slice
    columns: slice
    mirrored: bool


def tiles(rows: int, weight: Tensor, symmetric: bool, dtype: torch.dtype, workspace_bytes: int) -> Iterator[Tile]:
    """Tiles that cover all pairs once. In the symmetric case, only the tiles on and above the diagonal."""
    classes, size = weight.shape
    available = min(CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES["cpu"]), workspace_bytes)
    item = dtype.itemsize + 8  # a value, and its float64 copy or a temporary
    per_row = size * item  # a unit vector, and its float64 copy or a temporary
    # the largest side s of a square tile that needs at most `available` bytes: item * s^2 + 2 * per_row * s
    side = int((math.sqrt(per_row**2 + item * available) - per_row) / item)
    height = whole_chunk(rows, side)
    width = height if symmetric else whole_chunk(classes, (available - height * per_row) // (height * item + per_row))
    for top in range(0, rows, height):
        for left in range(top if symmetric else 0, classes, width):
            yield Tile(slice(top, top + height), slice(left, left + width), symmetric and left > top)


def own_entries(tile: Tile, cosine: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """The column (rows, 1) of the own class of every row of a tile, and whether the tile contains it."""
    if own is None:
        own = torch.arange(tile.rows.start, tile.rows.start + len(cosine), device=cosine.device)
    else:
        own = own[tile.rows]
    column = (own - tile.columns.start).unsqueeze(1)
    return column.clamp(0, cosine.shape[1] - 1), (column >= 0) & (column < cosine.shape[1])


def without_own(values: Tensor, column: Tensor, present: Tensor) -> Tensor:
    """The values with 0 for the own class of every row, in place."""
    return values.scatter_(1, column, values.gather(1, column).masked_fill_(present, 0.0))


def forward(rows: Tensor | None, weight: Tensor, own: Tensor | None, function: str, workspace_bytes: int) -> Tensor:
    symmetric, dtype = rows is None, compute_dtype(rows, weight)
    rows = weight if rows is None else rows
    sums = weight.new_zeros(len(rows), dtype=torch.float64)
    for tile in tiles(len(rows), weight, symmetric, dtype, workspace_bytes):
        cosine = unit_rows(rows[tile.rows], dtype)[0] @ unit_rows(weight[tile.columns], dtype)[0].t()
        entries = own_entries(tile, cosine, own)
        values = without_own(FUNCTIONS[function].value(cosine), *entries)
        sums[tile.rows] += values.sum(1, dtype=torch.float64)
        if tile.mirrored:
            sums[tile.columns] += values.sum(0, dtype=torch.float64)
    return sums


def backward(
    upstream: Tensor, rows: Tensor | None, weight: Tensor, own: Tensor | None, function: str, workspace_bytes: int
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weight. Without rows, the first has no elements."""
    symmetric, dtype = rows is None, compute_dtype(rows, weight)
    d_weight = torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    d_rows = d_weight
    if rows is not None:
        d_rows = torch.zeros_like(rows, dtype=dtype, memory_format=torch.contiguous_format)
    rows = weight if rows is None else rows
    upstream, eps = upstream.to(dtype), torch.finfo(dtype).eps
    for tile in tiles(len(rows), weight, symmetric, dtype, workspace_bytes):
        left, right = unit_rows(rows[tile.rows], dtype)[0], unit_rows(weight[tile.columns], dtype)[0]
        cosine = left @ right.t()
        entries = own_entries(tile, cosine, own)
        derivative = without_own(FUNCTIONS[function].derivative(cosine, eps), *entries)
        factor = upstream[tile.rows].unsqueeze(1)
        derivative.mul_(factor + upstream[tile.columns] if tile.mirrored else factor)
        d_rows[tile.rows].addmm_(derivative, right)
        d_weight[tile.columns].addmm_(derivative.t(), left)
    through_normalization(d_weight, weight)
    if symmetric:
        return weight.new_empty(0), d_weight.to(weight.dtype)
    through_normalization(d_rows, rows)
    return d_rows.to(rows.dtype), d_weight.to(weight.dtype)


def _pair_sums(rows: Tensor | None, weight: Tensor, own: Tensor | None, function: str, workspace_bytes: int) -> Tensor:
    with torch.autocast(weight.device.type, enabled=False):
        return forward(rows, weight, own, function, workspace_bytes)


def _pair_sums_fake(rows, weight, *_):
    return weight.new_empty((weight if rows is None else rows).shape[0], dtype=torch.float64)


def _pair_sums_backward(
    upstream: Tensor, rows: Tensor | None, weight: Tensor, own: Tensor | None, function: str, workspace_bytes: int
) -> tuple[Tensor, Tensor]:
    with torch.autocast(weight.device.type, enabled=False):
        return backward(upstream, rows, weight, own, function, workspace_bytes)


def _pair_sums_backward_fake(_upstream, rows, weight, *_):
    contiguous = torch.contiguous_format
    d_rows = weight.new_empty(0) if rows is None else torch.empty_like(rows, memory_format=contiguous)
    return d_rows, torch.empty_like(weight, memory_format=contiguous)


pair_sums_backward = register(
    "pair_sums_backward", _pair_sums_backward, _pair_sums_backward_fake, backward=refuse_second_order
)


def _context(ctx, inputs, output):
    rows, weight, own, *ctx.settings = inputs
    ctx.save_for_backward(rows, weight, own)


def _gradient(ctx, upstream):
    rows, weight, own = ctx.saved_tensors
    d_rows, d_weight = pair_sums_backward(upstream, rows, weight, own, *ctx.settings)
    return None if rows is None else d_rows, d_weight, None, None, None


pair_sums = register("pair_sums", _pair_sums, _pair_sums_fake, backward=_gradient, setup_context=_context)
