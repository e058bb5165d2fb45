"""The nearest other class at every step of a training, exactly, sweeping again only the rows whose answer may have changed.

Codes and lists (csrc/search.h) are kept from step to step. A code stands for its class for as long as its measured error
says how far the class has turned since: an answer is certain while it beats its list's ceiling by the row's own error and
the largest of all columns. docs/nearest.md has the proof.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_margin._ops.inputs import compute_dtype
from fused_margin._ops.kernels import Kernels
from fused_margin._ops.nearest.search import Coded, Lists, Search, find_nearest, int8_wins

CANDIDATES = 80  # of a class: more let it turn further before it is swept, and cost comparisons
THRESHOLDS = 64  # of errors that are tried at a step
FULL_SWEEP_SHARE = 3  # rows times all columns cost as much as the whole upper triangle from half of the rows on


class NearestState(NamedTuple):
    """What is kept of the classes between steps; all of it is written in place."""

    code: Tensor  # (C, D) int8, or the compute type
    scale: Tensor  # (C,) float32
    candidate: Tensor  # (C, capacity) int32
    value: Tensor  # (C, capacity) float32
    ceiling: Tensor  # (C,) float32
    swept: Tensor  # (3,) int64: rows swept, rows that were not, whole sweeps


def capacity_for(classes: int) -> int:
    """Candidates that are kept of each."""
    return max(1, min(CANDIDATES, classes - 1))


def new_state(weight: Tensor) -> NearestState:
    """Of classes that have not been looked at: the first step sweeps them all."""
    classes, device = len(weight), weight.device
    int8 = int8_wins(weight)
    lists = Lists.empty(classes, capacity_for(classes), device)
    code = torch.zeros(weight.shape, dtype=torch.int8 if int8 else compute_dtype(weight), device=device)
    return NearestState(
        code, torch.zeros(classes, dtype=torch.float32, device=device), lists.candidate, lists.value, lists.ceiling.fill_(math.inf),
        torch.zeros(3, dtype=torch.int64, device=device),
    )  # fmt: skip


def fits(state: NearestState, weight: Tensor) -> bool:
    """Whether a state is of such weights, and as this machine would have made it."""
    alike = (state.code.shape, state.code.device) == (weight.shape, weight.device)
    code = torch.int8 if int8_wins(weight) else compute_dtype(weight)
    return alike and state.code.dtype == code and state.value.dtype == state.scale.dtype == torch.float32


def refresh(run: Kernels, weight: Tensor, state: NearestState, workspace_bytes: int) -> tuple[Tensor, Tensor]:
    """Cosine (C,) float64 of every class to its nearest other, and that class (C,), as a full sweep finds them."""
    classes = len(weight)
    coded = Coded.around(weight, state.code, state.scale)
    coded.measure(run)
    lists = Lists(state.candidate, state.value, state.ceiling)
    search = Search(run, coded, coded, lists, 1, workspace_bytes)
    search.settle()
    rows = worth_sweeping(coded, search.tolerance())
    whole = len(rows) * FULL_SWEEP_SHARE > classes
    if whole:
        coded.encode(run)
        coded.measure(run)
        lists.clear()
        search.sweep()
        search.settle()
        rows = search.uncertain()
        search.resolve(rows)
    elif len(rows):
        renewed = torch.zeros(classes, dtype=torch.bool, device=weight.device)
        renewed[rows] = True
        coded.encode(run, rows)
        coded.measure_rows(run, rows)
        run.forget_renewed(lists=lists.arguments(), renewed_rows=renewed, renewed_candidates=renewed, count=classes)
        search.resolve(rows, renewed)
        uncertain = search.uncertain()
        uncertain = uncertain[~renewed[uncertain]]
        search.resolve(uncertain)
        rows = torch.cat([rows, uncertain])
    swept = classes if whole else len(rows)
    state.swept.add_(torch.tensor([swept, classes - swept, whole], device=weight.device))
    cosine, index = search.answers(torch.float64)
    return cosine.squeeze(1), index.squeeze(1)


def worth_sweeping(coded: Coded, tolerance: Tensor) -> Tensor:
    """The fewest rows (R,) to sweep, so that all answers are certain.

    With a threshold t on the columns' errors, those are the classes whose code is further off than t, and the rows whose
    answer does not stand an error of t. No threshold is worth trying below what a fresh code is off.
    """
    error = coded.error.clamp(min=0.0).double()  # -1 of a row with NaN
    integer = coded.code.dtype == torch.int8
    lowest = max(1e-6, 1.25 * float(coded.scale.max()) * math.sqrt(coded.size / 12) if integer else 0.0)
    highest = max(float(error.max()), lowest)
    thresholds = torch.logspace(
        math.log10(lowest), math.log10(highest), THRESHOLDS, dtype=torch.float64, device=error.device
    )
    thresholds[-1] = highest  # whatever the logarithm has rounded
    further, doubtful = (
        torch.bincount(torch.bucketize(values, thresholds), minlength=THRESHOLDS + 1) for values in (error, tolerance)
    )
    rows = doubtful.cumsum(0)[:THRESHOLDS] + len(error) - further.cumsum(0)[:THRESHOLDS]
    threshold = thresholds[rows.argmin()]
    return ((error > threshold) | ~(tolerance > threshold)).nonzero().squeeze(1)


def frozen(
    run: Kernels, weight: Tensor, index: Tensor, age: Tensor, every: int, counts: bool, workspace_bytes: int
) -> Tensor:
    """Cosine (C,) float64 of every class with `index` (C,), which is found anew when `age` (1,) is a multiple of `every`."""
    if age.item() % every == 0:
        found = find_nearest(run, weight, None, 1, False, workspace_bytes)
        index.copy_(found.answers(torch.float64)[1].squeeze(1))
    age += counts
    return cosines_with(run, weight, index)


def cosines_with(run: Kernels, weight: Tensor, index: Tensor) -> Tensor:
    """Cosine (C,) float64 of every class with the one that `index` (C,) names."""
    coded = Coded.around(weight, weight, weight.new_empty(len(weight), dtype=torch.float32))
    coded.encode(run)
    coded.measure(run)
    named = Lists.empty(len(weight), 1, weight.device)
    named.candidate.copy_(index.unsqueeze(1))
    named.value.fill_(math.inf)
    search = Search(run, coded, coded, named, 1, 0)
    search.settle()
    return search.answers(torch.float64)[0].squeeze(1)
