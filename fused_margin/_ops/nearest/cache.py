"""The nearest other class at every step of a training, searching again only for classes whose answer may have changed.

Codes and candidate lists (csrc/kernels/search.h) are kept from step to step. A code stands for its class for as long as
its measured error bounds how far the class has turned since: an answer is certain while it exceeds the upper bound of
its list by the row's own error and the largest error of all columns. docs/nearest.md has the proof.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_margin._ops.backends.select import Kernels
from fused_margin._ops.inputs import compute_dtype
from fused_margin._ops.nearest.gradient import RemoteRows
from fused_margin._ops.nearest.quantized import CandidateLists, QuantizedRows, int8_wins
from fused_margin._ops.nearest.search import NearestSearch, check_ranks, common_rows, find_nearest_others
from fused_margin.distributed import Shard

CANDIDATES = 80  # of a class: with more, a class may turn further before it is searched again, at more comparisons
THRESHOLDS = 64  # of errors that are tried at a step
FULL_SEARCH_SHARE = 3  # rows times all columns cost as much as the whole upper triangle from half of the rows on


class NearestCache(NamedTuple):
    """The state of the classes between steps; all of it is written in place.

    The names are those of buffers in checkpoints.
    """

    code: Tensor  # (C, D) int8, or the compute type
    scale: Tensor  # (C,) float32
    candidate: Tensor  # (C, capacity) int32
    value: Tensor  # (C, capacity) float32
    ceiling: Tensor  # (C,) float32, upper bounds of the lists
    swept: Tensor  # (3,) int64: rows searched, rows that were not, full searches


def capacity_for(classes: int) -> int:
    """Candidates that are kept of each class."""
    return max(1, min(CANDIDATES, classes - 1))


def new_cache(weight: Tensor, num_classes: int) -> NearestCache:
    """Of classes that have not been searched: the first step searches for all.

    Args:
        weight: (C_rank, D) of this rank.
        num_classes: C, of all ranks.
    """
    classes, device = len(weight), weight.device
    lists = CandidateLists.empty(classes, capacity_for(num_classes), device)
    code = torch.zeros(weight.shape, dtype=code_dtype(weight), device=device)
    return NearestCache(
        code, torch.zeros(classes, dtype=torch.float32, device=device), lists.candidate, lists.value,
        lists.upper_bound.fill_(math.inf), torch.zeros(3, dtype=torch.int64, device=device),
    )  # fmt: skip


def code_dtype(weight: Tensor) -> torch.dtype:
    return torch.int8 if int8_wins(weight) else compute_dtype(weight)


def fits(cache: NearestCache, weight: Tensor) -> bool:
    """Whether a cache is of such weights, and as this machine would have made it."""
    alike = (cache.code.shape, cache.code.device) == (weight.shape, weight.device)
    return alike and cache.code.dtype == code_dtype(weight) and cache.value.dtype == cache.scale.dtype == torch.float32


def certified_nearest(
    run: Kernels, shard: Shard, weight: Tensor, cache: NearestCache, workspace_bytes: int
) -> tuple[Tensor, Tensor]:
    """Cosine (C_rank,) float64 of every own class to its nearest other, and that class, as a full search finds them."""
    classes = shard.num_classes
    before = cache.swept.clone()
    # Lists hold products with the codes of other ranks. A rank that has lost its cache, or comes with that of another
    # step, has other counts, and all ranks begin anew; so does a cache that was never filled.
    kept = check_ranks(shard, weight, cache.code.dtype == torch.int8, before) and bool(before.any())
    cache.swept.zero_()  # an interrupted step leaves no cache to go on from
    quantized = QuantizedRows.of_codes(common_rows(shard, weight), cache.code, cache.scale)
    lists = CandidateLists(cache.candidate, cache.value, cache.ceiling)
    search = NearestSearch(run, quantized, quantized, lists, 1, workspace_bytes, shard)
    full, searched = not kept, classes
    if kept:
        quantized.measure(run)
        search.rerank_all()
        refreshed = choose_refreshed(shard, quantized, search.slack())
        count = int(refreshed.sum())
        full = count * FULL_SEARCH_SHARE > classes
        if not full:
            searched = sum(search.counts(search.refresh(refreshed))) if count else 0
    if full:
        quantized.quantize(run)
        quantized.measure(run)
        lists.clear()
        search.full_search()
    counted = before if kept else torch.zeros_like(before)
    cache.swept.copy_(counted + torch.tensor([searched, classes - searched, full], device=weight.device))
    cosine, index = search.answers(torch.float64)
    return cosine.squeeze(1), index.squeeze(1)


def choose_refreshed(shard: Shard, quantized: QuantizedRows, slack: Tensor) -> Tensor:
    """(C,) flags of the classes of all ranks that are worth searching for."""
    error, slack, scale = shard.gather_classes(
        torch.stack([quantized.error.double(), slack, quantized.scale.double()], 1)
    ).unbind(1)
    lowest = 1e-6
    if quantized.codes.dtype == torch.int8:
        lowest = max(lowest, 1.25 * float(scale.float().max()) * math.sqrt(quantized.size / 12))
    flags = worth_searching(error.float(), slack.contiguous(), lowest)
    # As every owner computes for its own classes: processors that round differently must choose the same rows.
    return shard.gather_classes(shard.local_part(flags).to(torch.uint8)).bool()


def worth_searching(error: Tensor, slack: Tensor, lowest: float) -> Tensor:
    """Flags (C,) of the fewest rows to search for, so that all answers are certain.

    With a threshold t on the columns' errors, those are the classes whose error is above t, and the rows whose slack is
    at most t.

    Args:
        error: (C,) float32 distances of rows to their codes; -1 of a row with NaN.
        slack: (C,) float64 of the rows' answers.
        lowest: error of a new code; no threshold below it is worth trying.
    """
    error = error.clamp(min=0.0).double()
    highest = max(float(error.max()), lowest)
    thresholds = torch.logspace(
        math.log10(lowest), math.log10(highest), THRESHOLDS, dtype=torch.float64, device=error.device
    )
    thresholds[-1] = highest  # whatever the logarithm has rounded
    further, doubtful = (
        torch.bincount(torch.bucketize(values, thresholds), minlength=THRESHOLDS + 1) for values in (error, slack)
    )
    rows = doubtful.cumsum(0)[:THRESHOLDS] + len(error) - further.cumsum(0)[:THRESHOLDS]
    threshold = thresholds[rows.argmin()]
    return (error > threshold) | ~(slack > threshold)


def periodic_nearest(
    run: Kernels, shard: Shard, weight: Tensor, index: Tensor, age: Tensor, every: int, counts: bool,
    workspace_bytes: int,
) -> Tensor:  # fmt: skip
    """Cosine (C_rank,) float64 of every own class to `index` (C_rank,), which is searched anew every so many steps.

    `age` (1,) counts the steps, if `counts`. Where the ages of ranks differ, all search, and have one age again.
    """
    alike = check_ranks(shard, weight, False, age)
    if not alike or age.item() % every == 0:
        index.copy_(find_nearest_others(run, shard, weight, workspace_bytes)[1])
        if not alike:
            age.zero_()
    age += counts
    return cosines_with(run, shard, weight, index)


def cosines_with(run: Kernels, shard: Shard, weight: Tensor, index: Tensor) -> Tensor:
    """Cosine (C_rank,) float64 of every own class to the class, of any rank, that `index` (C_rank,) names."""
    rows = common_rows(shard, weight)
    if shard.world_size > 1:
        named = RemoteRows(shard, index).fetch(rows)
        index = torch.arange(len(rows), device=rows.device)
    if not len(rows):
        return rows.new_zeros(0, dtype=torch.float64)
    query = reference = QuantizedRows.of_codes(rows, rows, rows.new_empty(len(rows), dtype=torch.float32))
    if shard.world_size > 1:
        reference = QuantizedRows.of_codes(named, named, torch.empty_like(query.scale))
    for side in (query, reference):
        side.quantize(run)
        side.measure(run)
    lists = CandidateLists.empty(len(rows), 1, rows.device)
    lists.candidate.copy_(index.unsqueeze(1))
    lists.value.fill_(math.inf)
    search = NearestSearch(run, query, reference, lists, 1, 0)
    search.rerank_all()
    return search.answers(torch.float64)[0].squeeze(1)
