"""Pairs of the samples of a batch, or of a rank's samples and those of all ranks: distances and kinds."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_margin._ops.collectives import all_reduce_forward, gather_batch
from fused_margin._ops.inputs import compute_dtype
from fused_margin._ops.normalization import unit_rows
from fused_margin.distributed import Shard

DISTANCES = ("squared", "euclidean", "angle")
# Share of |a|^2 + |b|^2 up to which |a - b|^2 may be rounding only.
ROUNDING = 64 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class SamplePairs:
    """Pairs of the N samples of this rank and the M samples of all ranks.

    A pair with an ignored sample, or of a sample with itself, is neither genuine nor impostor.
    """

    distance: Tensor  # (N, M) float64, differentiable
    genuine: Tensor  # (N, M) bool: two samples of one class
    impostor: Tensor  # (N, M) bool: samples of two classes
    samples: Tensor  # (M, D) float64, differentiable; without their mean, unless normalized
    labels: Tensor  # (M,) int64
    valid: Tensor  # (M,) bool: not ignored
    group: str  # name of the process group, empty for one rank

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum of a rank's value over all ranks. Its gradient sums those of all ranks, by `gather_batch`."""
        return all_reduce_forward(value, self.group) if self.group else value


def make_pairs(
    embeddings: Tensor, labels: Tensor, distance: str, normalize: bool, ignore_index: int, shard: Shard | None
) -> SamplePairs:
    """The pairs of embeddings (N, D) with labels (N,) and those of the other ranks of a shard.

    Distances are computed in float64, because ``|a|^2 + |b|^2 - 2 a . b`` cancels where they are small. Memory is
    O(N * M + M * D).
    """
    count = len(embeddings)
    embeddings = embeddings.to(compute_dtype(embeddings))
    samples, labels, begin = gather_batch(embeddings, labels.to(torch.int64), shard)
    valid = labels != ignore_index
    samples = samples.to(torch.float64).masked_fill(~valid.unsqueeze(1), 0.0)  # an ignored NaN must not spread
    if normalize:
        samples = unit_rows(samples, torch.float64)[0]
    else:  # a shift changes no distance, and short rows cancel less
        mean = samples.detach().sum(0) / valid.sum().clamp(min=1)
        samples = samples - mean.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    own = slice(begin, begin + count)
    related = valid[own].unsqueeze(1) & valid
    equal = labels[own].unsqueeze(1) == labels
    itself = torch.arange(begin, begin + count, device=labels.device).unsqueeze(1) == torch.arange(
        len(labels), device=labels.device
    )
    return SamplePairs(
        distances(samples[own], samples, distance),
        genuine=related & equal & ~itself,
        impostor=related & ~equal,
        samples=samples,
        labels=labels,
        valid=valid,
        group="" if shard is None else shard.name,
    )


def distances(rows: Tensor, others: Tensor, distance: str) -> Tensor:
    """Distances (N, M) of rows (N, D) to others (M, D), float64. The angle is that of unit rows.

    Where a square root has no derivative, at a distance of 0 and at an angle of pi, its gradient is 0.
    """
    squares = rows.square().sum(1, keepdim=True) + others.square().sum(1)
    products = rows @ others.t()
    difference = squares - 2.0 * products
    if distance == "squared":
        return difference.clamp_min(0.0)
    length = _square_root(difference, squares)
    if distance == "euclidean":
        return length
    # The ratio of the rhombus's diagonals is the tangent of half the angle. arccos would be inaccurate near 0.
    return 2.0 * torch.atan2(length, _square_root(squares + 2.0 * products, squares))


def _square_root(value: Tensor, scale: Tensor) -> Tensor:
    """The square root; 0 with a gradient of 0 for a value that may be rounding beside `scale`."""
    zero = value <= ROUNDING * scale
    return value.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
