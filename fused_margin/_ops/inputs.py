"""What a sweep is asked, and what it finds."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # of embeddings and weights


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def workspace_bytes(workspace_mb: float) -> int:
    return math.floor(workspace_mb * 2**20)


@dataclass(frozen=True)
class Problem:
    """The arguments that forward and backward of one sweep share."""

    embeddings: Tensor | None  # (N, D), or None where only the nearest classes are wanted
    weight: Tensor  # (C, D), C classes, or their sub-centers
    workspace_bytes: int
    products: str  # a name of ops.dispatch
    labels: Tensor | None = None  # (N,) int64
    scale: Tensor | None = None  # (N,) float64, or None for scale_value
    scale_value: float = 1.0
    class_weight: Tensor | None = None  # (C,) float64, of label smoothing
    nearest: bool = False
    known_cosine: Tensor | None = None  # (C,) float64, and known_index (C,) int64: the nearest, found before
    known_index: Tensor | None = None
    # by portable products only
    sub_centers: int = 1  # rows of weight a class
    hard_threshold: Tensor | None = None  # (N,) float64, see margins.HardNegatives and FilteredNegatives
    hard_strength: Tensor | None = None  # (1,) float64; None: what is above the threshold is filtered
    inner_product: bool = False  # nothing is normalised
    bias: Tensor | None = None  # (C,), of inner products

    @property
    def samples(self) -> int:
        return 0 if self.embeddings is None else self.embeddings.shape[0]

    @property
    def classes(self) -> int:
        return self.weight.shape[0]

    @property
    def size(self) -> int:
        return self.weight.shape[1]

    @property
    def compute(self) -> torch.dtype:
        return compute_dtype(self.embeddings, self.weight)

    @property
    def scales(self) -> float | Tensor:
        return self.scale_value if self.scale is None else self.scale


class Sweep(NamedTuple):
    """What a sweep finds. The first six are its results, the others what its backward needs."""

    largest_logit: Tensor  # (N,) float64, about that of the classes that are not the label's; it has no gradient
    relative_logsumexp: Tensor  # (N,) float64, of their logits less the largest
    target_cosine: Tensor  # (N,) float64; an inner product without its bias, where those are asked for
    uniform_cosine: Tensor  # (N,) float64, sum_j class_weight_j cos_ij, or (0,)
    nearest_cosine: Tensor  # (C,) or (0,)
    nearest_index: Tensor  # (C,) int64 or (0,)
    target_row: Tensor  # (N,) int64 row of weight that is the target's, or (0,) where the label is
    normalized_embeddings: Tensor  # (N, D)
    embedding_inverse_norm: Tensor  # (N,)
    weight_inverse_norm: Tensor  # (C,)
    exponent: Tensor  # (chunks, N) float64, or (1, N) where one exponent of a row serves all chunks
    uniform_weight: Tensor  # (D,), sum_j class_weight_j w_hat_j, or (0,)
    kept: Tensor  # what the forward has room to keep for the backward, chunk after chunk

    @property
    def negative_logsumexp(self) -> Tensor:
        """(N,) float64, over the classes that are not the label's. Where it is huge, the sum hides its second term."""
        return self.largest_logit + self.relative_logsumexp


class Gradients(NamedTuple):
    """Of a problem's tensors; no elements where not asked for."""

    embeddings: Tensor  # (N, D)
    weight: Tensor  # (C, D)
    bias: Tensor  # (C,); the target's part is left to whoever added the target's bias
    scale: Tensor  # (N,)


class SweepGradients(NamedTuple):
    """Upstream gradients of a sweep's results; None where nothing depends on them."""

    negative_logsumexp: Tensor | None
    target_cosine: Tensor | None
    uniform_cosine: Tensor | None
    nearest_cosine: Tensor | None
