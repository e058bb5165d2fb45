"""Inputs, outputs and chunks of classes of one call."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PORTABLE = "portable"  # the backend for all inputs: torch.mm, and kernels around it
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # of embeddings and weights

# On a CPU, a chunk stays in cache between the matrix product that writes it and the kernel that reads it. On a GPU, large
# chunks need few launches.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}
MIN_CHUNK = 64
MIB = 2**20


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if a tensor is, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


@dataclass(frozen=True)
class LossInputs:
    """The arguments of forward and backward of one call."""

    embeddings: Tensor | None  # (N, D), or None in a call for the nearest classes only
    weight: Tensor  # (C, D), the classes of this rank, or their sub-centers
    workspace_bytes: int
    backend: str  # PORTABLE, or a name of backends/select.py
    labels: Tensor | None = None  # (N,) int64, over the classes of all ranks
    sample_scale: Tensor | None = None  # (N,) float64 scales of the logits, or None for scale_value
    scale_value: float = 1.0
    class_weight: Tensor | None = None  # (C,) float64, for label smoothing
    nearest: bool = False  # whether to search the nearest other class of every class
    known_cosine: Tensor | None = None  # (C,) cosines to the nearest classes, if they are known
    known_index: Tensor | None = None  # (C,) int64 nearest classes, if they are known
    # only in the portable backend
    sub_centers: int = 1  # rows of weight per class
    hard_threshold: Tensor | None = None  # (N,) float64, see margins.HardNegatives and FilteredNegatives
    hard_strength: Tensor | None = None  # (1,) float64; None: classes above the threshold are filtered
    inner_product: bool = False  # whether logits are inner products of unnormalized rows
    bias: Tensor | None = None  # (C,) float64, with inner products
    need_length: bool = False  # whether to return the length of the weight of every target
    # classes divided among ranks, or drawn
    group: str = ""  # name of the process group; empty for one rank
    num_classes: int = 0  # over all ranks
    sample_rate: float = 1.0  # share of the classes that take part
    sparse_gradient: bool = False  # whether the gradient of weight is sparse if classes are drawn

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, C and D."""
        return 0 if self.embeddings is None else self.embeddings.shape[0], *self.weight.shape

    @property
    def scale(self) -> float | Tensor:
        """The scale of all samples, or (N,) scales."""
        return self.scale_value if self.sample_scale is None else self.sample_scale

    @property
    def is_divided(self) -> bool:
        """Whether classes are divided among ranks, or drawn."""
        return self.group != "" or self.sample_rate < 1

    @property
    def uses_tiled_nearest(self) -> bool:
        """Whether tiles of W W^T find the nearest classes. On a GPU the exact search would synchronize."""
        if not self.nearest or self.known_index is not None or self.group:
            return False
        return self.weight.device.type != "cpu" or self.backend != PORTABLE

    @property
    def gradient_in_place(self) -> bool:
        """Whether the gradient of a chunk can be computed in the memory of the weight gradient."""
        return self.weight.dtype == compute_dtype(self.embeddings, self.weight) and self.weight.is_contiguous()


class ForwardOutput(NamedTuple):
    """Results of the forward, and the tensors that the backward needs. A tensor that is not needed has no elements.

    If classes are divided, every rank is padded to the largest number of samples of a rank, and M is this number times the
    number of ranks. Otherwise M is N.
    """

    largest_logit: Tensor  # (N,) float64, approximately, over the classes other than the target; without gradient
    relative_logsumexp: Tensor  # (N,) float64, of the logits of these classes minus largest_logit
    target_cosine: Tensor  # (N,) float64; with inner products, the inner product without the bias
    uniform_cosine: Tensor  # (N,) float64, sum_j class_weight_j cos_ij
    nearest_cosine: Tensor  # (C,)
    nearest_index: Tensor  # (C,) int64, over the classes of all ranks
    target_bias: Tensor  # (N,) float64
    target_length: Tensor  # (N,) float64
    # only for the backward
    target_row: Tensor  # (M,) int64 row of weight of every target, with sub-centers
    normalized_embeddings: Tensor  # (M, D)
    embedding_inverse_norm: Tensor  # (M,)
    weight_inverse_norm: Tensor  # (C,)
    exponent: Tensor  # (chunks, M) float64, or (1, M) if all chunks share the exponent of a row
    uniform_weight: Tensor  # (D,), sum_j class_weight_j w_hat_j
    saved_chunks: Tensor  # exponentials or operands of the first chunks
    # only if classes are divided or drawn
    drawn_rows: Tensor  # (R,) int64 rows of weight that took part
    gathered_labels: Tensor  # (M,) int64, indices of the rows of this rank that took part
    gathered_scale: Tensor  # (M,) float64
    gathered_threshold: Tensor  # (M,) float64
    gathered_largest: Tensor  # (M,) float64, largest_logit over the classes of all ranks
    gathered_logsumexp: Tensor  # (M,) float64, relative_logsumexp over the classes of all ranks


class Gradients(NamedTuple):
    """Gradients of the inputs. A gradient that is not needed has no elements."""

    embeddings: Tensor  # (N, D)
    weight: Tensor  # (C, D), or (R, D) of drawn rows if sparse
    bias: Tensor  # (C,)
    sample_scale: Tensor  # (N,)


class OutputGradients(NamedTuple):
    """Upstream gradients of the results. None for a result that the loss does not depend on."""

    logsumexp: Tensor | None
    target_cosine: Tensor | None
    uniform_cosine: Tensor | None
    nearest_cosine: Tensor | None
    target_bias: Tensor | None
    target_length: Tensor | None


class ChunkPlan(NamedTuple):
    """The chunks of classes of a call, and the number of chunks that the forward saves within the workspace."""

    classes: int
    chunk: int  # classes per chunk, except the last
    chunks: int
    saved: int  # number of leading chunks that the forward saves for the backward
    saved_elements: int
    saved_dtype: torch.dtype
    exponents: int  # rows of ForwardOutput.exponent

    def bounds(self, k: int) -> tuple[int, int]:
        return k * self.chunk, min((k + 1) * self.chunk, self.classes)


def whole_chunk(classes: int, limit: int, sub_centers: int = 1) -> int:
    """The largest multiple of MIN_CHUNK up to `limit`, but at least MIN_CHUNK and at most `classes`."""
    smallest = MIN_CHUNK * sub_centers  # the sub-centers of a class stay together
    return min(max(limit // smallest * smallest, smallest), max(classes, 1))
