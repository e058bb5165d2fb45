"""Normalisation of rows in torch, its gradient, and cosines of samples to their own classes."""

import math

import torch
from torch import Tensor

from fused_margin import _C
from fused_margin._ops.inputs import MIN_CHUNK


def unit_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit rows (R, D) in `dtype`, and the inverse norms (R, 1). Both are zero for a row shorter than 1e-12.

    A row whose norm is not finite becomes NaN: a row with NaN or infinity, or a float64 row longer than about 1e154.
    """
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)  # no underflow of squares
    short = norm < _C.SMALLEST_NORM
    inverse = (1.0 / norm.masked_fill(short, 1.0)).masked_fill(short, 0.0)
    inverse = inverse.masked_fill(norm.isinf(), math.nan).to(dtype)
    return rows.to(dtype) * inverse, inverse


def through_normalization(gradient: Tensor, rows: Tensor) -> None:
    """Turns the gradient of unit rows r into the gradient of the rows, in place: ``(g - (g . r) r) / |rows|``."""
    for begin in range(0, len(rows), 8 * MIN_CHUNK):
        part = gradient[begin : begin + 8 * MIN_CHUNK]
        unit, inverse = unit_rows(rows[begin : begin + 8 * MIN_CHUNK], gradient.dtype)
        part.sub_((part * unit).sum(1, keepdim=True) * unit).mul_(inverse)


def own_cosines(embeddings: Tensor, weight: Tensor, labels: Tensor, sub_centers: int) -> Tensor:
    """Cosines (N, sub_centers) float64 of samples to the rows of their own class; undefined for an ignored label."""
    centers = weight.unflatten(0, (-1, sub_centers))
    own = centers[labels.clamp(0, len(centers) - 1)].flatten(0, 1)  # (N * sub_centers, D)
    own = unit_rows(own, torch.float64)[0].unflatten(0, (-1, sub_centers))
    return (unit_rows(embeddings, torch.float64)[0].unsqueeze(1) * own).sum(dim=2).clamp(-1.0, 1.0)


def target_cosines(embeddings: Tensor, weight: Tensor, labels: Tensor, sub_centers: int) -> Tensor:
    """Cosines (N,) float64 of samples to the nearest sub-center of their class; undefined for an ignored label."""
    return own_cosines(embeddings, weight, labels, sub_centers).amax(dim=1)
