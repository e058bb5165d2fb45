"""The nearest other class at every step of a training, with a search only for classes whose answer may have changed.

Codes and candidate lists (csrc/kernels/search.h) stay between steps. The measured error of a code bounds how far its
class has rotated since the code was computed. An answer is certain if its cosine is above the upper bound of its list plus
the error of its row plus the largest error of all columns. docs/internals/nearest.md has the proof.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_margin._ops.backends.select import Kernels
from fused_margin._ops.inputs import compute_dtype
from fused_margin._ops.nearest.gradient import RemoteRows
from fused_margin._ops.nearest.quantized import CandidateLists, QuantizedRows, int8_is_fastest
from fused_margin._ops.nearest.search import NearestSearch, check_ranks, common_rows, find_nearest_others
from fused_margin.distributed import Shard

CANDIDATES = 80  # per class: more candidates delay the next search of a class, at the cost of more comparisons
THRESHOLDS = 64  # number of error thresholds to try at a step
# All classes are searched if more than a third of them would be: a full search scores only the upper triangle, so that it
# costs as much as refreshing half of the rows.
FULL_SEARCH_DIVISOR = 3


class NearestCache(NamedTuple):
    """The state of the classes between steps, written in place.

    The names are those of buffers in checkpoints.
    """

    code: Tensor  # (C, D) int8, or the compute type
    scale: Tensor  # (C,) float32
    candidate: Tensor  # (C, capacity) int32
    value: Tensor  # (C, capacity) float32
    ceiling: Tensor  # (C,) float32, upper bounds of the lists
    swept: Tensor  # (3,) int64: rows searched, rows that were not, full searches


def capacity_for(classes: int) -> int:
    """Number of candidates of each class."""
    return max(1, min(CANDIDATES, classes - 1))


def new_cache(weight: Tensor, num_classes: int) -> NearestCache:
    """A cache of classes that were not searched yet. The first step searches all of them.

    Args:
        weight: (C_rank, D), the classes of this rank.
        num_classes: C, over all ranks.
    """
    classes, device = len(weight), weight.device
    lists = CandidateLists.empty(classes, capacity_for(num_classes), device)
    code = torch.zeros(weight.shape, dtype=code_dtype(weight), device=device)
    return NearestCache(
        code, torch.zeros(classes, dtype=torch.float32, device=device), lists.candidate, lists.value,
        lists.upper_bound.fill_(math.inf), torch.zeros(3, dtype=torch.int64, device=device),
    )  # fmt: skip


def code_dtype(weight: Tensor) -> torch.dtype:
    return torch.int8 if int8_is_fastest(weight) else compute_dtype(weight)


def fits(cache: NearestCache, weight: Tensor) -> bool:
    """Whether a cache has the shape, the device and this processor's dtypes for these weights."""
    same_shape_and_device = (cache.code.shape, cache.code.device) == (weight.shape, weight.device)
    return (
        same_shape_and_device
        and cache.code.dtype == code_dtype(weight)
        and cache.value.dtype == cache.scale.dtype == torch.float32
    )


def certified_nearest(
    run: Kernels, shard: Shard, weight: Tensor, cache: NearestCache, workspace_bytes: int
) -> tuple[Tensor, Tensor]:
    """Cosine (C_rank,) float64 of every class of this rank to its nearest other class, and that class, exactly."""
    classes = shard.num_classes
    before = cache.swept.clone()
    # Lists contain products with the codes of other ranks. If a rank has lost its cache, or has the cache of another step,
    # its counts differ, and the caches of all ranks are invalid. A new cache is invalid too.
    is_valid = check_ranks(shard, weight, cache.code.dtype == torch.int8, before) and bool(before.any())
    cache.swept.zero_()  # an interrupted step leaves an invalid cache
    quantized = QuantizedRows.of_codes(common_rows(shard, weight), cache.code, cache.scale)
    lists = CandidateLists(cache.candidate, cache.value, cache.ceiling)
    search = NearestSearch(run, quantized, quantized, lists, 1, workspace_bytes, shard)
    full, searched = not is_valid, classes
    if is_valid:
        quantized.measure(run)
        search.rerank_all()
        refreshed = choose_refreshed(shard, quantized, search.slack())
        count = int(refreshed.sum())
        full = count * FULL_SEARCH_DIVISOR > classes
        if not full:
            searched = sum(search.rows_per_rank(search.refresh(refreshed))) if count else 0
    if full:
        quantized.quantize(run)
        quantized.measure(run)
        lists.clear()
        search.full_search()
    totals = before if is_valid else torch.zeros_like(before)
    cache.swept.copy_(totals + torch.tensor([searched, classes - searched, full], device=weight.device))
    cosine, index = search.answers(torch.float64)
    return cosine.squeeze(1), index.squeeze(1)


def choose_refreshed(shard: Shard, quantized: QuantizedRows, slack: Tensor) -> Tensor:
    """Flags (C,) of the classes of all ranks to search."""
    error, slack, scale = shard.gather_classes(
        torch.stack([quantized.error.double(), slack, quantized.scale.double()], 1)
    ).unbind(1)
    lowest = 1e-6
    if quantized.codes.dtype == torch.int8:
        lowest = max(lowest, 1.25 * float(scale.float().max()) * math.sqrt(quantized.size / 12))
    flags = rows_to_search(error.float(), slack.contiguous(), lowest)
    # Every rank uses the owner's flags, because processors that round differently could choose different rows.
    return shard.gather_classes(shard.local_part(flags).to(torch.uint8)).bool()


def rows_to_search(error: Tensor, slack: Tensor, lowest: float) -> Tensor:
    """Flags (C,) of the fewest rows whose search makes all answers certain.

    With a threshold t on the error of columns, they are the classes whose error is above t, and the rows whose slack is
    at most t.

    Args:
        error: (C,) float32 distances of rows to their codes; -1 for a row with NaN.
        slack: (C,) float64 slacks of the answers.
        lowest: error of a new code, the lowest threshold to try.
    """
    error = error.clamp(min=0.0).double()
    highest = max(float(error.max()), lowest)
    thresholds = torch.logspace(
        math.log10(lowest), math.log10(highest), THRESHOLDS, dtype=torch.float64, device=error.device
    )
    thresholds[-1] = highest  # without the rounding of the logarithm
    errors, slacks = (
        torch.bincount(torch.bucketize(values, thresholds), minlength=THRESHOLDS + 1) for values in (error, slack)
    )
    rows = slacks.cumsum(0)[:THRESHOLDS] + len(error) - errors.cumsum(0)[:THRESHOLDS]
    threshold = thresholds[rows.argmin()]
    return (error > threshold) | ~(slack > threshold)


def periodic_nearest(
    run: Kernels, shard: Shard, weight: Tensor, index: Tensor, age: Tensor, every: int, is_training: bool,
    workspace_bytes: int,
) -> Tensor:  # fmt: skip
    """Cosine (C_rank,) float64 of every class of this rank to `index` (C_rank,), which a search updates periodically.

    Args:
        age: (1,) number of steps. If the ages of ranks differ, all ranks search and reset their age.
        every: number of steps between searches.
        is_training: whether this step increments `age`.
    """
    same_age = check_ranks(shard, weight, False, age)
    if not same_age or age.item() % every == 0:
        index.copy_(find_nearest_others(run, shard, weight, workspace_bytes)[1])
        if not same_age:
            age.zero_()
    else:
        check_classes(shard, index)
    age += is_training
    return cosines_with(run, shard, weight, index)


def check_classes(shard: Shard, index: Tensor) -> None:
    """Raises ValueError, on every rank, if an element of `index` on any rank is no class: a buffer may be damaged."""
    low, high = index.aminmax() if len(index) else index.new_zeros(2).unbind()
    high, negative_low = shard.all_reduce_max(torch.stack([high, -low])).tolist()
    if negative_low > 0 or high >= shard.num_classes:
        wrong = -negative_low if negative_low > 0 else high
        raise ValueError(f"exclusive.index: expected classes in [0, {shard.num_classes}), got {wrong}")


def cosines_with(run: Kernels, shard: Shard, weight: Tensor, index: Tensor) -> Tensor:
    """Cosine (C_rank,) float64 of every class of this rank to the class `index` (C_rank,) of any rank."""
    rows = common_rows(shard, weight)
    if shard.world_size > 1:
        fetched = RemoteRows(shard, index).fetch(rows)
        index = torch.arange(len(rows), device=rows.device)
    if not len(rows):
        return rows.new_zeros(0, dtype=torch.float64)
    query = reference = QuantizedRows.of_codes(rows, rows, rows.new_empty(len(rows), dtype=torch.float32))
    if shard.world_size > 1:
        reference = QuantizedRows.of_codes(fetched, fetched, torch.empty_like(query.scale))
    for side in (query, reference):
        side.quantize(run)
        side.measure(run)
    lists = CandidateLists.empty(len(rows), 1, rows.device)
    lists.candidate.copy_(index.unsqueeze(1))
    lists.value.fill_(math.inf)
    search = NearestSearch(run, query, reference, lists, 1, 0)
    search.rerank_all()
    return search.answers(torch.float64)[0].squeeze(1)
