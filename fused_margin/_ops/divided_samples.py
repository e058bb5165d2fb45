"""Samples of all ranks, brought to the rank that has the row of their class, and their values brought back."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_margin import _checks
from fused_margin._ops import divided
from fused_margin._ops.class_pair_sums import pair_sums
from fused_margin._ops.collectives import gather_rows, scatter_rows
from fused_margin._ops.library import refuse_transforms
from fused_margin.distributed import Shard


class GatheredLabels(NamedTuple):
    """The labels of the M samples of all ranks, in the order of the ranks."""

    shard: Shard  # of the classes
    labels: Tensor  # (M,) int64
    counted: Tensor  # (V,) int64 positions of the labels that are not ignored
    samples: list[int]  # number of samples of every rank

    def own_positions(self) -> Tensor:
        """The positions (S,) of the samples whose class this rank has."""
        local = self.labels[self.counted] - self.shard.begin
        return self.counted[(local >= 0) & (local < self.shard.size)]

    def to_ranks(self, values: Tensor, positions: Tensor) -> Tensor:
        """Values of some samples (S,) to the values of this rank's samples (N,), summed over ranks; differentiable."""
        all_values = values.new_zeros(len(self.labels)).index_copy(0, positions, values)
        return scatter_rows(all_values, self.samples, self.shard.name)


def class_shard(weight: Tensor, ranks: Shard, at_least: int = 1) -> Shard:
    """The division of the classes whose weights (C_rank, D) the ranks have.

    Args:
        weight: of this rank.
        ranks: has the group.
        at_least: smallest number of classes of all ranks.

    Raises:
        ValueError: on every rank, if the ranks differ in D or dtype, or their numbers of classes are not those of a Shard.
    """
    _checks.not_meta(weight)
    refuse_transforms(weight)
    sizes = divided.gather_counts(ranks, weight, weight.requires_grad and torch.is_grad_enabled(), name="weight")
    if sum(sizes) < at_least:
        raise ValueError(f"weight: expected at least {at_least} classes on all ranks together, got {sum(sizes)}")
    shard = Shard(sum(sizes), ranks.group)
    if sizes != shard.sizes:
        raise ValueError(
            f"weight: expected {shard.sizes} of {shard.num_classes} classes on the ranks, as "
            f"fused_margin.distributed.slice_sizes divides them, got {sizes}"
        )
    _checks.shard(shard, weight, 1, 0.0)
    return shard


def gather_own_samples(
    embeddings: Tensor, labels: Tensor, shard: Shard, ignore_index: int
) -> tuple[Tensor, Tensor, GatheredLabels]:
    """The embeddings (S, D) of all ranks' samples whose class this rank has, their positions (S,), and all labels.

    Raises:
        ValueError: on every rank, if a label is out of range, or the ranks differ in D or dtype.
    """
    refuse_transforms(embeddings)
    samples = divided.gather_counts(shard, embeddings, embeddings.requires_grad and torch.is_grad_enabled())
    gathered = gather_labels(labels, shard, ignore_index, samples)
    positions = gathered.own_positions()
    return gather_rows(embeddings, samples, shard.name)[positions], positions, gathered


def gather_labels(labels: Tensor, shard: Shard, ignore_index: int, samples: list[int] | None = None) -> GatheredLabels:
    """The labels of all ranks.

    Args:
        labels: (N,) int64 of this rank. Ranks may have different N.
        samples: number of samples of every rank, if it is known.

    Raises:
        ValueError: on every rank, if a label of any rank is out of range.
    """
    if samples is None:
        samples = shard.all_gather(torch.tensor([len(labels)], device=labels.device)).flatten().tolist()
    gathered = gather_rows(labels, samples, shard.name)
    valid = gathered != ignore_index
    wrong = (valid & ((gathered < 0) | (gathered >= shard.num_classes))).nonzero().flatten().tolist()
    if wrong:
        rank = sum(end <= wrong[0] for end in accumulate(samples))
        raise _checks.bad_label_error(int(gathered[wrong[0]]), f"on rank {rank} for {shard.num_classes} classes")
    return GatheredLabels(shard, gathered, valid.nonzero().flatten(), samples)


def target_class_sums(
    weight: Tensor, classes: Tensor, shard: Shard, function: str, workspace_bytes: int
) -> tuple[Tensor, list[int]]:
    """The sums of `other_class_sums` for some classes, over the classes of this rank alone.

    Args:
        weight: (C_rank, D) of this rank.
        classes: (K,) int64 in ascending order, over the classes of all ranks and the same on every rank.

    Returns:
        (K,) float64, whose sum over ranks is over all classes; differentiable. How many of the classes every rank has.
    """
    ends = torch.tensor(list(accumulate(shard.sizes)), device=classes.device)
    last = [0, *torch.searchsorted(classes, ends).tolist()]
    own = classes[last[shard.rank] : last[shard.rank + 1]] - shard.begin
    counts = [end - begin for begin, end in pairwise(last)]
    rows = gather_rows(F.embedding(own, weight), counts, shard.name)
    return pair_sums(rows, weight, classes - shard.begin, function, workspace_bytes), counts
