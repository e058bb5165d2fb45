"""Inputs and outputs of one call, and its chunks of classes."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PORTABLE = "portable"  # the backend that takes everything: torch.mm, and kernels around it
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # of embeddings and weights

# A chunk stays in cache between the product that writes it and the kernel that reads it. On a GPU a chunk is so large
# that there are few launches.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}
SMALLEST_CHUNK = 64
MIB = 2**20


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


@dataclass(frozen=True)
class LossInputs:
    """The arguments that forward and backward of one call share."""

    embeddings: Tensor | None  # (N, D), or None where only the nearest classes are wanted
    weight: Tensor  # (C, D), this rank's classes, or their sub-centers
    workspace_bytes: int
    backend: str  # PORTABLE, or a name of backends/select.py
    labels: Tensor | None = None  # (N,) int64, over the classes of all ranks
    scale: Tensor | None = None  # (N,) float64, or None for scale_value
    scale_value: float = 1.0
    class_weight: Tensor | None = None  # (C,) float64, of label smoothing
    nearest: bool = False  # whether to find every class's nearest other class
    known_cosine: Tensor | None = None  # (C,), and known_index (C,) int64: the nearest classes, found before
    known_index: Tensor | None = None
    # by the portable backend only
    sub_centers: int = 1  # rows of weight per class
    hard_threshold: Tensor | None = None  # (N,) float64, see margins.HardNegatives and FilteredNegatives
    hard_strength: Tensor | None = None  # (1,) float64; None: classes above the threshold are filtered
    inner_product: bool = False  # nothing is normalised
    bias: Tensor | None = None  # (C,) float64, of inner products
    need_length: bool = False  # whether to return the length of every target's weight
    # classes divided among ranks, or drawn
    group: str = ""  # name of the process group; empty: one rank
    num_classes: int = 0  # over all ranks
    sample_rate: float = 1.0  # share of the classes that take part
    sparse_gradient: bool = False  # of weight, where classes are drawn

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, C and D."""
        return 0 if self.embeddings is None else self.embeddings.shape[0], *self.weight.shape

    @property
    def compute(self) -> torch.dtype:
        embeddings = self.weight if self.embeddings is None else self.embeddings
        return torch.float64 if torch.float64 in (embeddings.dtype, self.weight.dtype) else torch.float32

    @property
    def scales(self) -> float | Tensor:
        return self.scale_value if self.scale is None else self.scale

    @property
    def is_divided(self) -> bool:
        """Whether a step is more than one pass over this rank's samples and classes."""
        return self.group != "" or self.sample_rate < 1

    @property
    def uses_tiled_nearest(self) -> bool:
        """Whether nearest classes come from tiles of W W^T: on a GPU the exact search would wait for answers."""
        if not self.nearest or self.known_index is not None or self.group:
            return False
        return self.weight.device.type != "cpu" or self.backend != PORTABLE

    @property
    def gradient_in_place(self) -> bool:
        """Whether the weight gradient can hold that of a chunk while it is computed."""
        return self.weight.dtype == self.compute and self.weight.is_contiguous()


class ForwardOutput(NamedTuple):
    """Results of the forward, then the tensors that the backward needs; a tensor that nobody asked for has no elements.

    M samples: those of all ranks, padded to equal numbers, where classes are divided, else N.
    """

    largest_logit: Tensor  # (N,) float64, about that of the classes other than the target; has no gradient
    relative_logsumexp: Tensor  # (N,) float64, of their logits minus the largest
    target_cosine: Tensor  # (N,) float64; with inner products, the product without its bias
    uniform_cosine: Tensor  # (N,) float64, sum_j class_weight_j cos_ij
    nearest_cosine: Tensor  # (C,)
    nearest_index: Tensor  # (C,) int64, over the classes of all ranks
    target_bias: Tensor  # (N,) float64
    target_length: Tensor  # (N,) float64
    # for the backward
    target_row: Tensor  # (M,) int64 row of weight of every target, with sub-centers
    normalized_embeddings: Tensor  # (M, D)
    embedding_inverse_norm: Tensor  # (M,)
    weight_inverse_norm: Tensor  # (C,)
    exponent: Tensor  # (chunks, M) float64, or (1, M) where one exponent of a row serves all chunks
    uniform_weight: Tensor  # (D,), sum_j class_weight_j w_hat_j
    saved_chunks: Tensor  # of the first chunks: exponentials, or operands
    # where classes are divided or drawn
    drawn_rows: Tensor  # (R,) int64 rows of weight that took part
    gathered_labels: Tensor  # (M,) int64, over this rank's rows that took part
    gathered_scale: Tensor  # (M,) float64
    gathered_threshold: Tensor  # (M,) float64
    gathered_largest: Tensor  # (M,) float64, as largest_logit, over all ranks
    gathered_logsumexp: Tensor  # (M,) float64, as relative_logsumexp


class Gradients(NamedTuple):
    """Of the inputs; no elements where not asked for."""

    embeddings: Tensor  # (N, D)
    weight: Tensor  # (C, D), or (R, D) of drawn rows if sparse
    bias: Tensor  # (C,)
    scale: Tensor  # (N,)


class OutputGradients(NamedTuple):
    """Upstream gradients of the results; None where nothing depends on them."""

    logsumexp: Tensor | None
    target_cosine: Tensor | None
    uniform_cosine: Tensor | None
    nearest_cosine: Tensor | None
    target_bias: Tensor | None
    target_length: Tensor | None


class ChunkPlan(NamedTuple):
    """How a call divides the classes into chunks, and what it saves of the first chunks, within the workspace."""

    classes: int
    chunk: int  # classes in every chunk but the last
    chunks: int
    saved: int  # leading chunks of which the forward saves something for the backward
    saved_elements: int
    saved_dtype: torch.dtype
    exponents: int  # rows of ForwardOutput.exponent

    def bounds(self, k: int) -> tuple[int, int]:
        return k * self.chunk, min((k + 1) * self.chunk, self.classes)


def whole_chunk(classes: int, most: int, sub_centers: int = 1) -> int:
    """A chunk of at most `most` classes, a multiple of SMALLEST_CHUNK and at least that, unless there are fewer."""
    smallest = SMALLEST_CHUNK * sub_centers  # the sub-centers of a class stay together
    return min(max(most // smallest * smallest, smallest), max(classes, 1))
