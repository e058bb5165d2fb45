"""Rows of unit length, and gradients through making them so, by torch: where no kernel makes the products."""

import math

import torch
from torch import Tensor

from fused_margin import _C
from fused_margin._ops.inputs import SMALLEST_CHUNK


def unit_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows (R, D) of length one in `dtype`, and what they were multiplied by, (R, 1); zero for a row that counts as zero.

    A row whose norm is not finite is NaN: one with NaN or infinity, and a float64 row longer than about 1e154.
    """
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)  # squares of 1e-25 count too
    short = norm < _C.SMALLEST_NORM
    inverse = (1.0 / norm.masked_fill(short, 1.0)).masked_fill(short, 0.0)
    inverse = inverse.masked_fill(norm.isinf(), math.nan).to(dtype)
    return rows.to(dtype) * inverse, inverse


def through_normalization(gradient: Tensor, rows: Tensor) -> None:
    """The gradient of unit rows to that of the rows, in place: ``(g - (g . r) r) / |rows|``."""
    for begin in range(0, len(rows), 8 * SMALLEST_CHUNK):
        part = gradient[begin : begin + 8 * SMALLEST_CHUNK]
        unit, inverse = unit_rows(rows[begin : begin + 8 * SMALLEST_CHUNK], gradient.dtype)
        part.sub_((part * unit).sum(1, keepdim=True) * unit).mul_(inverse)


def own_cosines(embeddings: Tensor, weight: Tensor, labels: Tensor, sub_centers: int) -> Tensor:
    """Cosines (N, sub_centers) float64 of samples with the rows of their own class; of no class, anything."""
    centers = weight.unflatten(0, (-1, sub_centers))
    own = centers[labels.clamp(0, len(centers) - 1)].flatten(0, 1)  # (N * sub_centers, D)
    own = unit_rows(own, torch.float64)[0].unflatten(0, (-1, sub_centers))
    return (unit_rows(embeddings, torch.float64)[0].unsqueeze(1) * own).sum(dim=2).clamp(-1.0, 1.0)


def target_cosines(embeddings: Tensor, weight: Tensor, labels: Tensor, sub_centers: int) -> Tensor:
    """Cosines (N,) float64 of samples with their own class, the nearest sub-center of it; of no class, anything."""
    return own_cosines(embeddings, weight, labels, sub_centers).amax(dim=1)
