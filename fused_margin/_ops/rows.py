"""Rows by their number, whose gradients are added up in float64 whatever dtype the rows have."""

import torch
from torch import Tensor

from fused_margin._ops.registration import FirstOrderFunction


def select_rows(rows: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """``rows[index]`` in `dtype`; rows (R, ...), index (N,) int64. Indexing would add the gradients of a row in its own dtype."""
    if torch.finfo(rows.dtype).bits >= 32:
        return rows[index].to(dtype)
    return _SelectRows.apply(rows, index, dtype)


class _SelectRows(FirstOrderFunction):
    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.dtype = rows.shape, rows.dtype
        return rows[index].to(dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (index,) = ctx.saved_tensors
        # The sum of a row is where its first sample would be if the samples were in the order of the rows.
        place = torch.searchsorted(index.sort().values, index)
        total = torch.zeros_like(upstream, dtype=torch.float64).index_put_((place,), upstream.double(), accumulate=True)
        gradient = upstream.new_zeros(ctx.shape, dtype=ctx.dtype)
        gradient[index] = total[place].to(ctx.dtype)  # samples of one row write the same sum
        return gradient, None, None
