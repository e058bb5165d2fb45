"""References that are quantized once and searched for one block of queries after another."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_margin import _checks
from fused_margin._ops.backends.select import kernels_on
from fused_margin._ops.inputs import MIB
from fused_margin._ops.nearest.quantized import QuantizedRows, int8_is_fastest
from fused_margin._ops.nearest.search import search_quantized


class NearestIndex:
    """An exact index of rows by their cosines, as FAISS's IndexFlatIP is of inner products.

    int8 codes, where they are fastest, take one byte per element of the references.

    Args:
        reference: (R, D) float32 or float64, finite. The index refers to it.
        workspace_mb: bound on scratch memory of a search in MiB, beside the codes.

    Raises:
        RuntimeError: the device does not have the exact search.
    """

    def __init__(self, reference: Tensor, workspace_mb: float):
        _checks.exact_search_device("reference", reference)
        self.workspace_bytes = int(workspace_mb * MIB)
        with kernels_on(reference.device) as run:
            self.rows = QuantizedRows.of(run, reference, int8_is_fastest(reference))

    def search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Cosines (Q, k) float64 of queries (Q, D) to the k nearest references, descending, and these (Q, k) int64.

        The lowest row wins a tie. Equal rows have equal cosines, bit for bit.
        """
        with kernels_on(query.device) as run:
            rows = QuantizedRows.of(run, query, self.rows.codes.dtype == torch.int8)
            return search_quantized(run, rows, self.rows, k, self.workspace_bytes).answers(torch.float64)
