"""Scores of probes to identities in float64, in blocks: for every rank, and for decisions at a threshold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .cosines import cosine_tolerance, pair_cosines, unit_rows
from .gallery import Gallery, identity_blocks

PROBES = 1024  # in a block, at most
MIB = 2**20


def probe_blocks(count: int, gallery: Gallery, workspace_mb: float) -> Iterator[slice]:
    """Blocks of probes, so small that their cosines to the templates of one identity fit into the workspace."""
    size = int(min(PROBES, max(1, workspace_mb * MIB // (64 * np.diff(gallery.first_template).max()))))
    return (slice(begin, min(begin + size, count)) for begin in range(0, count, size))


def mate_scores(probes: np.ndarray, gallery: Gallery, mate: np.ndarray, workspace_mb: float) -> np.ndarray:
    """Scores (P,) of probes to an identity each, float64; NaN where `mate` (P,) is -1."""
    score = np.full(len(probes), np.nan)
    first = gallery.first_template
    mated = np.flatnonzero(mate >= 0)
    for block in probe_blocks(len(mated), gallery, workspace_mb):
        rows = mated[block]
        pair, template = _template_pairs(mate[rows], first)
        score[rows] = _largest_cosines(unit_rows(probes[rows]), pair, pair, gallery.templates, template)
    return score


def _largest_cosines(
    unit: np.ndarray, probe: np.ndarray, group: np.ndarray, templates: np.ndarray, row: np.ndarray
) -> np.ndarray:
    """The largest of :func:`pair_cosines` in each group; `group` ascends from 0 without gaps."""
    cosine = pair_cosines(unit, probe, templates, row)
    return np.maximum.reduceat(cosine, np.flatnonzero(np.diff(group, prepend=-1)))


def _template_pairs(identity: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The templates of each of the identities (n,): indices into `identity`, ascending, and rows of templates."""
    count = first[identity + 1] - first[identity]
    begin = np.cumsum(count) - count
    row = np.arange(count.sum()) + np.repeat(first[identity] - begin, count)
    return np.repeat(np.arange(len(identity)), count), row


class IdentityScores(NamedTuple):
    """Scores of a block of probes to a block of identities.

    Attributes:
        begin: the first identity.
        scores: (P, identities) float64.
        cosines: (T, P) float64 cosines of the templates of these identities, on the device.
        tolerance: twice the rounding errors of `scores` and `cosines`, beside :func:`pair_cosines`, are below it.
        unit: (P, D) float64 probes of unit length.
        gallery: where the identities are.
        first: the first template of each identity of the gallery.
    """

    begin: int
    scores: np.ndarray
    cosines: Tensor
    tolerance: float
    unit: np.ndarray
    gallery: Gallery
    first: np.ndarray

    def exact(self, probe: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Scores (n,) of pairs of a row and a column of `scores`, from :func:`pair_cosines`."""
        score = np.empty(len(probe))
        identity = self.begin + column
        most = np.diff(self.first[self.begin : self.begin + self.scores.shape[1] + 1]).max()
        size = max(1, self.cosines.numel() // int(most))  # no more templates at a time than there are cosines
        for begin in range(0, len(probe), size):
            part = slice(begin, begin + size)
            score[part] = self._exact(probe[part], identity[part], self.scores[probe[part], column[part]])
        return score

    def _exact(self, probe: np.ndarray, identity: np.ndarray, score: np.ndarray) -> np.ndarray:
        pair, row = _template_pairs(identity, self.first)
        if len(pair) > len(probe):  # of several templates, those that may have the largest cosine
            device = self.cosines.device
            at = (row - self.first[self.begin], probe[pair])
            cosine = self.cosines[tuple(torch.from_numpy(index).to(device) for index in at)].cpu().numpy()
            near = cosine >= score[pair] - self.tolerance
            pair, row = pair[near], row[near]
        return _largest_cosines(self.unit, probe[pair], pair, self.gallery.templates, row)

    def settle(self, bound: np.ndarray) -> None:
        """Makes scores exact that a rounding error could move across the bound (P,) of their probe."""
        probe, column = np.nonzero(np.abs(self.scores - bound[:, None]) <= self.tolerance)
        if len(probe):
            self.scores[probe, column] = self.exact(probe, column)


@torch.no_grad()
def score_blocks(
    unit: np.ndarray, gallery: Gallery, device: torch.device | str, workspace_mb: float
) -> Iterator[IdentityScores]:
    """Scores of a block of unit-length probes (P, D) float64 to all identities, in blocks of identities."""
    probes, width = unit.shape
    # Each template has three float64 copies (as read, of unit length, on the device) and four numbers per probe: its
    # cosine, the score of its identity, and copies that comparisons make of it.
    rows = max(1, int(workspace_mb * MIB) // (8 * (3 * width + 4 * probes)))
    tolerance = cosine_tolerance(width)
    first = gallery.first_template
    query = torch.from_numpy(unit).to(device)
    for begin, end in identity_blocks(first, rows):
        templates = torch.from_numpy(unit_rows(gallery.templates[first[begin] : first[end]])).to(device)
        cosines = templates @ query.T
        scores = cosines
        if len(cosines) > end - begin:
            scores = _largest_of_groups(cosines, np.diff(first[begin : end + 1]))
        yield IdentityScores(begin, scores.T.cpu().numpy(), cosines, tolerance, unit, gallery, first)


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
        is_full = np.bincount(probe, minlength=count) == k
        bound[is_full] = score[np.searchsorted(probe, np.flatnonzero(is_full), side="right") - 1]
    return score.reshape(count, k), identity.reshape(count, k)


def mate_ranks(
    probes: np.ndarray, gallery: Gallery, mate: np.ndarray, device: torch.device | str, workspace_mb: float
) -> np.ndarray:
    """Ranks (P,) of an identity `mate` (P,) of each probe of a block: 1 plus the number of identities before it."""
    rank = np.ones(len(probes), np.int64)
    unit, score = unit_rows(probes), mate_scores(probes, gallery, mate, workspace_mb)
    for block in score_blocks(unit, gallery, device, workspace_mb):
        block.settle(score)
        before = block.begin + np.arange(block.scores.shape[1]) < mate[:, None]
        rank += ((block.scores > score[:, None]) | ((block.scores == score[:, None]) & before)).sum(axis=1)
    return rank
