"""The exact search for the rows of a gallery that are nearest to probes, in blocks of probes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fused_margin.nearest import NearestIndex

from .cosines import cosine_tolerance, pair_cosines, scaled_rows, unit_rows

Progress = Callable[[int, int], None]
MAX_ROWS = 32  # nearest rows per probe that the search can find
BLOCK_PROBES = 4096


@torch.no_grad()
def search_rows(
    probes: np.ndarray,
    references: np.ndarray,
    k: int,
    device: torch.device | str,
    workspace_mb: float,
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k references with the largest cosine to each probe, in descending order; the lowest row wins a tie.

    Rounding errors of the search do not decide the order: cosines that are equal up to them are compared by
    `pair_cosines`. To see whether the last row is such a case, the search finds one row more, and then 32. Which of such
    rows are among the 32, it decides.

    Args:
        probes: (P, D) floats, finite.
        references: (R, D) float32 or float64, finite.
        k: at most 32, and at most R.
        progress: called with the number of probes that are done, and P.

    Returns:
        (P, k) float64 cosines, and (P, k) int64 rows of ``references``. The first cosine is that of `pair_cosines`.
    """
    dtype = np.float64 if max(probes.dtype.itemsize, references.dtype.itemsize) >= 8 else np.float32
    # PyTorch warns of arrays that cannot be written, which read-only memory maps are; these are copied.
    searched = torch.from_numpy(np.require(references, dtype, ["C", "W"])).to(device)
    index = NearestIndex(searched, workspace_mb)
    tolerance = cosine_tolerance(references.shape[1])
    most = min(MAX_ROWS, len(references))
    cosine, row = np.empty((len(probes), k)), np.empty((len(probes), k), np.int64)
    for begin in range(0, len(probes), BLOCK_PROBES):
        part = slice(begin, min(begin + BLOCK_PROBES, len(probes)))
        query = torch.from_numpy(np.require(scaled_rows(probes[part]), dtype, ["C", "W"])).to(device)
        unit = unit_rows(probes[part])
        found, found_row = (result.cpu().numpy() for result in index.search(query, min(k + 1, most)))
        settle_order(found, found_row, unit, references, tolerance)
        cosine[part], row[part] = found[:, :k], found_row[:, :k]
        if k < most:
            again = np.flatnonzero(found[:, k - 1] - found[:, k] <= tolerance)
            if len(again):
                found, found_row = (result.cpu().numpy() for result in index.search(query[again], most))
                settle_order(found, found_row, unit[again], references, tolerance)
                cosine[part][again], row[part][again] = found[:, :k], found_row[:, :k]
        if progress is not None:
            progress(part.stop, len(probes))
    return cosine, row


def settle_order(
    cosine: np.ndarray, row: np.ndarray, unit: np.ndarray, references: np.ndarray, tolerance: float
) -> None:
    """Sort lists of references by `pair_cosines`, in place, where their cosines differ by rounding errors only.

    Args:
        cosine: (P, n) in descending order. The first of each probe, and those that are near others, become that of
            `pair_cosines`.
        row: (P, n) rows of ``references``; of equal cosines, the lowest is first.
        unit: (P, D) float64 probes of unit length.
        references: (R, D).
        tolerance: of `cosine_tolerance`.
    """
    is_near = cosine[:, :-1] - cosine[:, 1:] <= tolerance
    is_settled = np.zeros(cosine.shape, bool)
    is_settled[:, 0] = True  # thresholds are taken from it, and must mean the same to every comparison of a pair
    is_settled[:, :-1] |= is_near
    is_settled[:, 1:] |= is_near
    probe, place = np.nonzero(is_settled)
    cosine[probe, place] = pair_cosines(unit, probe, references, row[probe, place])
    unordered = np.flatnonzero(is_near.any(axis=1))
    order = np.lexsort((row[unordered], -cosine[unordered]), axis=-1)
    for values in (cosine, row):
        values[unordered] = np.take_along_axis(values[unordered], order, axis=1)
