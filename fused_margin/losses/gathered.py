"""The samples of all ranks, for the losses that compare them as rows: range, marginal and siamese loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_margin import _checks
from fused_margin._ops.collectives import gather_batch
from fused_margin._ops.inputs import compute_dtype
from fused_margin.losses.auxiliary_base import AuxiliaryLoss


class AllSamples(NamedTuple):
    """The samples of all ranks. Embeddings of ignored samples are 0, so that NaN in them reaches no gradient."""

    embeddings: Tensor  # (M, D) float32 or float64, differentiable
    labels: Tensor  # (M,) int64
    valid: Tensor  # (M,) whether a sample is not ignored
    own: slice  # the samples of this rank

    def of_one_class(self) -> Tensor:
        """(M, M), whether two samples have the same class. Each sample has its own; ignored samples have none."""
        same = self.labels.unsqueeze(1) == self.labels
        return same & self.valid.unsqueeze(1) & self.valid


class GatheredLoss(AuxiliaryLoss):
    """Base class of losses that compare the samples of a batch, on one rank or on all ranks of a group."""

    def gather(self, embeddings: Tensor, labels: Tensor) -> AllSamples:
        """Checks the samples of this rank, and gathers those of all ranks."""
        _checks.matrix("embeddings", embeddings, "(N, embedding_size)")
        _checks.per_sample_index("labels", labels, embeddings)
        rows, labels, begin = gather_batch(embeddings.to(compute_dtype(embeddings)), labels.to(torch.int64), self.shard)
        valid = labels != self.ignore_index
        rows = rows.masked_fill(~valid.unsqueeze(1), 0.0)
        return AllSamples(rows, labels, valid, slice(begin, begin + len(embeddings)))
