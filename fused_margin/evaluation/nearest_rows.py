"""The exact search for the rows of a gallery that are nearest to probes, in blocks of probes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fused_margin.nearest import NearestIndex

from .cosines import pair_cosines, scaled_rows, unit_rows

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
    cosine, row = np.empty((len(probes), k)), np.empty((len(probes), k), np.int64)
    for begin in range(0, len(probes), BLOCK_PROBES):
        part = slice(begin, min(begin + BLOCK_PROBES, len(probes)))
        query = torch.from_numpy(np.require(scaled_rows(probes[part]), dtype, ["C", "W"])).to(device)
        for result, found in zip((cosine, row), index.search(query, k), strict=True):
            result[part] = found.cpu().numpy()
        # Thresholds are taken from the largest cosines, and must mean the same to every comparison of a pair.
        first = pair_cosines(unit_rows(probes[part]), np.arange(len(query)), references, row[part, 0])
        cosine[part, 0] = first
        np.minimum(cosine[part], first[:, None], out=cosine[part])  # rounding errors may have another order
        if progress is not None:
            progress(part.stop, len(probes))
    return cosine, row
