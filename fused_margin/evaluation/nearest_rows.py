"""The exact search for the rows of a gallery that are nearest to probes, in blocks of probes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fused_margin import functional

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
        (P, k) float64 cosines, and (P, k) int64 rows of ``references``.
    """
    dtype = np.float64 if max(probes.dtype.itemsize, references.dtype.itemsize) >= 8 else np.float32
    # PyTorch warns of arrays that cannot be written, which read-only memory maps are; these are copied.
    searched = torch.from_numpy(np.require(references, dtype, ["C", "W"])).to(device)
    cosine, index = np.empty((len(probes), k)), np.empty((len(probes), k), np.int64)
    for begin in range(0, len(probes), BLOCK_PROBES):
        part = slice(begin, min(begin + BLOCK_PROBES, len(probes)))
        query = torch.from_numpy(np.require(scaled_rows(probes[part]), dtype, ["C", "W"])).to(device)
        found = functional.nearest_class(query, searched, k=k, workspace_mb=workspace_mb).index
        index[part] = found.view(-1, k).cpu().numpy()
        # The search compares in float64 but returns the cosines of float32 rows in float32.
        pairs = np.repeat(np.arange(len(query)), k), index[part].ravel()
        cosine[part] = pair_cosines(unit_rows(probes[part]), pairs[0], references, pairs[1]).reshape(-1, k)
        if progress is not None:
            progress(part.stop, len(probes))
    return cosine, index
