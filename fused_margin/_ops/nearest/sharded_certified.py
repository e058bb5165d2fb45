"""The nearest others of classes that are divided among ranks: anew, or by what every rank keeps of its own from step to step."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_margin._ops.inputs import DTYPES, compute_dtype
from fused_margin._ops.kernels import Kernels
from fused_margin._ops.nearest import cache, search
from fused_margin._ops.nearest.cache import FULL_SWEEP_SHARE, NearestState, capacity_for, worth_sweeping
from fused_margin._ops.nearest.search import Coded, Lists, Search, capacity_of
from fused_margin._ops.nearest.sharded_search import ShardedSearch, owners
from fused_margin.distributed import Shard


def new_state(shard: Shard, weight: Tensor) -> NearestState:
    """Of a rank's classes, whose lists hold classes of all ranks."""
    state = cache.new_state(weight)
    lists = Lists.empty(len(weight), capacity_for(shard.num_classes), weight.device)
    return state._replace(candidate=lists.candidate, value=lists.value)


def refresh(
    run: Kernels, shard: Shard, weight: Tensor, state: NearestState, workspace_bytes: int
) -> tuple[Tensor, Tensor]:
    """Cosine (C_rank,) float64 of every own class to its nearest other, and that class, as one device finds them."""
    classes = shard.num_classes
    before = state.swept.clone()
    kept = agree(shard, weight, state.code.dtype == torch.int8, before)
    state.swept.zero_()  # what a step that breaks off leaves is no state to go on from
    coded = Coded.around(weight.to(compute_dtype(weight)), state.code, state.scale)
    coded.measure(run)
    found = ShardedSearch(run, shard, coded, Lists(state.candidate, state.value, state.ceiling), workspace_bytes)
    whole, swept = not kept, classes
    if kept:
        found.look()
        renewed = chosen(shard, coded, found.search.tolerance())
        count = int(renewed.sum())
        whole = count * FULL_SWEEP_SHARE > classes
        if not whole:
            swept = sum(found.counts(found.sweep(renewed))) if count else 0
    if whole:
        found.sweep_all()
    counted = before if kept else torch.zeros_like(before)
    state.swept.copy_(counted + torch.tensor([swept, classes - swept, whole], device=weight.device))
    cosine, index = found.search.answers(torch.float64)
    return cosine.squeeze(1), index.squeeze(1)


def agree(shard: Shard, weight: Tensor, int8: bool, counted: Tensor) -> bool:
    """Whether what ranks have kept belongs together: they count alike, and from more than 0.

    Lists hold products with the codes of other ranks. A rank that has lost its own, or comes with those of another
    step, counts otherwise, and everybody begins anew.

    Raises:
        ValueError: on every rank, if one comes with other rows than the first: nobody waits for what never comes.
    """
    own = [weight.shape[1], DTYPES.index(weight.dtype), int8, *counted.tolist()]
    told = shard.gather(torch.tensor(own, device=weight.device)).tolist()
    for rank, theirs in enumerate(told):
        if theirs[:3] != told[0][:3]:
            said = [
                f"embedding_size {size}, {DTYPES[dtype]}, {'int8' if short else 'float'} codes"
                for size, dtype, short, *_ in (told[0], theirs)
            ]
            raise ValueError(f"weight: rank 0 has {said[0]}, rank {rank} {said[1]}")
    return any(told[0][3:]) and all(theirs == told[0] for theirs in told)


def chosen(shard: Shard, coded: Coded, tolerance: Tensor) -> Tensor:
    """(C,) flags of the classes of all ranks that are worth sweeping."""
    error, tolerance, scale = shard.of_every_class(
        torch.stack([coded.error.double(), tolerance, coded.scale.double()], 1)
    ).unbind(1)
    of_all = Coded.around(coded.rows, coded.code, scale.contiguous())
    of_all.error = error.contiguous()
    rows = worth_sweeping(of_all, tolerance.contiguous())
    flags = torch.zeros(shard.num_classes, dtype=torch.uint8, device=error.device)
    flags[rows] = 1
    # As every owner sees its own: processors that round differently must not wait for different rows.
    own = flags[shard.begin : shard.begin + len(coded.rows)]
    return shard.of_every_class(own).bool()


def find_nearest(run: Kernels, shard: Shard, weight: Tensor, workspace_bytes: int) -> tuple[Tensor, Tensor]:
    """As `refresh`, with nothing kept."""
    too_large = torch.tensor(not search.fits_int8(weight, workspace_bytes), dtype=torch.int64, device=weight.device)
    int8 = not shard.largest(too_large).item()
    agree(shard, weight, int8, too_large.new_zeros(0))
    coded = Coded.unmade(weight.to(compute_dtype(weight)), int8)
    lists = Lists.empty(len(weight), capacity_of(1, shard.num_classes, int8), weight.device)
    found = ShardedSearch(run, shard, coded, lists, workspace_bytes)
    found.sweep_all()
    cosine, index = found.search.answers(torch.float64)
    return cosine.squeeze(1), index.squeeze(1)


def frozen(
    run: Kernels, shard: Shard, weight: Tensor, index: Tensor, age: Tensor, every: int, counts: bool,
    workspace_bytes: int,
) -> Tensor:  # fmt: skip
    """Cosine (C_rank,) float64 of every own class with `index` (C_rank,), found anew every so many steps, or if ages differ."""
    alike = agree(shard, weight, False, age)
    if not alike or age.item() % every == 0:
        index.copy_(find_nearest(run, shard, weight, workspace_bytes)[1])
        age.zero_()  # ranks whose ages differed have one again
    age += counts
    return cosines_with(run, shard, weight, index)


def cosines_with(run: Kernels, shard: Shard, weight: Tensor, index: Tensor) -> Tensor:
    """Cosine (C_rank,) float64 of every own class with the one, of any rank, that `index` (C_rank,) names."""
    rows = weight.to(compute_dtype(weight))
    order, asked = owners(shard, index)
    counts = shard.gather(asked).tolist()
    sent, received = counts[shard.rank], [row[shard.rank] for row in counts]
    wanted = shard.exchange(index[order], sent, received) - shard.begin
    theirs = torch.empty_like(rows, memory_format=torch.contiguous_format)
    theirs[order] = shard.exchange(rows[wanted], received, sent)
    if not len(rows):
        return rows.new_zeros(0, dtype=torch.float64)
    coded, named = (Coded.around(t, t, t.new_empty(len(t), dtype=torch.float32)) for t in (rows, theirs))
    for side in (coded, named):
        side.encode(run)
        side.measure(run)
    lists = Lists.empty(len(rows), 1, rows.device)
    lists.candidate.copy_(torch.arange(len(rows), device=rows.device).unsqueeze(1))
    lists.value.fill_(torch.inf)
    found = Search(run, coded, named, lists, 1, 0)
    found.settle()
    return found.answers(torch.float64)[0].squeeze(1)
