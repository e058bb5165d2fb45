"""Scores of probes to identities in float64, in blocks: for every rank, and for decisions at a threshold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .gallery import Gallery, identity_blocks, unit_rows

PROBES = 1024  # in a block
PAIR_ELEMENTS = 2**18  # of the templates of pairs in memory at a time: they stay in cache
MIB = 2**20


def probe_blocks(count: int) -> Iterator[slice]:
    return (slice(begin, min(begin + PROBES, count)) for begin in range(0, count, PROBES))


def pair_cosines(unit: np.ndarray, probe: np.ndarray, templates: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Cosines (n,) of pairs of a probe and a template, in float64.

    A pair has the same cosine, bit for bit, in whichever call it is, which matrix products do not promise. Thus equal
    templates tie, and a threshold taken from one result means the same to another.

    Args:
        unit: (P, D) float64 probes of unit length.
        probe: (n,) rows of ``unit``.
        templates: (T, D).
        row: (n,) rows of ``templates``.
    """
    cosine = np.empty(len(probe))
    size = max(1, PAIR_ELEMENTS // unit.shape[1])
    for begin in range(0, len(probe), size):
        part = slice(begin, begin + size)
        cosine[part] = np.einsum("ij,ij->i", unit[probe[part]], unit_rows(templates[row[part]]))
    return np.clip(cosine, -1, 1)


def mate_scores(probes: np.ndarray, gallery: Gallery, mate: np.ndarray) -> np.ndarray:
    """Scores (P,) of probes to an identity each, float64; NaN where `mate` (P,) is -1."""
    score = np.full(len(probes), np.nan)
    first = gallery.first_template
    for block in probe_blocks(len(probes)):
        probe = np.flatnonzero(mate[block] >= 0)
        if len(probe):
            identity = mate[block][probe]
            score[block.start + probe] = _identity_scores(unit_rows(probes[block]), probe, gallery, identity, first)
    return score


def _identity_scores(
    unit: np.ndarray, probe: np.ndarray, gallery: Gallery, identity: np.ndarray, first: np.ndarray
) -> np.ndarray:
    """Scores (n,) of pairs of a probe and an identity: the largest cosine of its templates."""
    count = first[identity + 1] - first[identity]
    begin = np.cumsum(count) - count
    row = np.arange(count.sum()) + np.repeat(first[identity] - begin, count)
    cosine = pair_cosines(unit, np.repeat(probe, count), gallery.templates, row)
    return np.maximum.reduceat(cosine, begin)


class IdentityScores(NamedTuple):
    """Scores of a block of probes to a block of identities.

    Attributes:
        begin: the first identity.
        scores: (P, identities) float64, within `tolerance` of :func:`pair_cosines`.
        tolerance: bound on the rounding errors of both.
        unit: (P, D) float64 probes of unit length.
        gallery: where the identities are.
        first: the first template of each identity of the gallery.
    """

    begin: int
    scores: np.ndarray
    tolerance: float
    unit: np.ndarray
    gallery: Gallery
    first: np.ndarray

    def exact(self, probe: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Scores (n,) of pairs of a row and a column of `scores`, from :func:`pair_cosines`."""
        score = np.empty(len(probe))
        most = int(np.diff(self.first[self.begin : self.begin + self.scores.shape[1] + 1]).max())
        size = max(1, self.scores.size // most)  # the pairs with templates take as much memory as the scores
        for begin in range(0, len(probe), size):
            part = slice(begin, begin + size)
            score[part] = _identity_scores(self.unit, probe[part], self.gallery, self.begin + column[part], self.first)
        return score

    def settle(self, bound: np.ndarray) -> None:
        """Makes scores exact that a rounding error could move across the bound (P,) of their probe."""
        probe, column = np.nonzero(np.abs(self.scores - bound[:, None]) <= self.tolerance)
        self.scores[probe, column] = self.exact(probe, column)


@torch.no_grad()
def score_blocks(
    unit: np.ndarray, gallery: Gallery, device: torch.device | str, workspace_mb: float
) -> Iterator[IdentityScores]:
    """Scores of a block of unit-length probes (P, D) float64 to all identities, in blocks of identities."""
    probes, width = unit.shape
    # Of a template: its float64 copies on both devices, its scores, and those of its identity with their flags.
    rows = max(1, int(workspace_mb * MIB) // (8 * (3 * width + 4 * probes)))
    tolerance = 8 * (width + 4) * 2.0**-53
    first = gallery.first_template
    query = torch.from_numpy(unit).to(device)
    for begin, end in identity_blocks(first, rows):
        templates = torch.from_numpy(unit_rows(gallery.templates[first[begin] : first[end]])).to(device)
        scores = templates @ query.T
        if len(scores) > end - begin:
            scores = _largest_of_groups(scores, np.diff(first[begin : end + 1]))
        yield IdentityScores(begin, scores.T.cpu().numpy(), tolerance, unit, gallery, first)


def _largest_of_groups(scores: Tensor, count: np.ndarray) -> Tensor:
    """The largest of each group of consecutive rows (T, P), column by column: (groups, P)."""
    lengths = torch.from_numpy(count).to(scores.device)
    return torch.segment_reduce(scores, "max", lengths=lengths, axis=0, unsafe=True)


def best_identities(
    unit: np.ndarray, gallery: Gallery, k: int, device: torch.device | str, workspace_mb: float
) -> tuple[np.ndarray, np.ndarray]:
    """The k best identities of each unit-length probe (P, D) float64: scores (P, k) and identities (P, k).

    The lowest identity wins a tie.
    """
    count = len(unit)
    probe, identity, score = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    bound = np.full(count, -np.inf)  # the k-th best score so far
    for block in score_blocks(unit, gallery, device, workspace_mb):
        columns = block.scores.shape[1]
        lowest = bound
        if columns >= k:
            kth = np.partition(block.scores, columns - k, axis=1)[:, columns - k]
            lowest = np.maximum(bound, kth - block.tolerance)
        row, column = np.nonzero(block.scores >= (lowest - block.tolerance)[:, None])
        probe = np.concatenate([probe, row])
        identity = np.concatenate([identity, block.begin + column])
        score = np.concatenate([score, block.exact(row, column)])
        order = np.lexsort((identity, -score, probe))
        first = np.searchsorted(probe[order], np.arange(count))
        order = order[np.arange(len(order)) - first[probe[order]] < k]
        probe, identity, score = probe[order], identity[order], score[order]
        full = np.bincount(probe, minlength=count) == k
        bound = np.where(full, score[np.searchsorted(probe, np.arange(count), side="right") - 1], -np.inf)
    return score.reshape(count, k), identity.reshape(count, k)


def mate_ranks(
    unit: np.ndarray,
    gallery: Gallery,
    mate: np.ndarray,
    score: np.ndarray,
    device: torch.device | str,
    workspace_mb: float,
) -> np.ndarray:
    """Ranks (P,) of an identity `mate` (P,) of each probe, with its `score` (P,): 1 plus the identities before it."""
    rank = np.ones(len(unit), np.int64)
    for block in score_blocks(unit, gallery, device, workspace_mb):
        block.settle(score)
        before = block.begin + np.arange(block.scores.shape[1]) < mate[:, None]
        rank += ((block.scores > score[:, None]) | ((block.scores == score[:, None]) & before)).sum(axis=1)
    return rank
