"""The gradient of cosines to nearest classes on other ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_margin._ops.inputs import LossInputs, compute_dtype
from fused_margin._ops.normalization import through_normalization, unit_rows
from fused_margin.distributed import Shard, named_shard


def sort_by_owner(shard: Shard, index: Tensor) -> tuple[Tensor, Tensor]:
    """The order (R,) that sorts classes by their owner, and the number of classes (world_size,) of each owner."""
    order = index.argsort(stable=True)  # slices of ranks are in ascending order
    ends = torch.tensor(shard.sizes, dtype=torch.int64, device=index.device).cumsum(0)
    owner = torch.bucketize(index[order], ends, right=True)
    return order, torch.bincount(owner, minlength=shard.world_size)


class RemoteRows:
    """Exchanges rows with the owners of the classes `index`, on any rank."""

    def __init__(self, shard: Shard, index: Tensor):
        self.shard = shard
        self.order, requests = sort_by_owner(shard, index)
        counts = shard.all_gather(requests).tolist()  # counts[a][b]: number of rows that a requests from b
        self.sent, self.received = counts[shard.rank], [row[shard.rank] for row in counts]
        self.requested = shard.all_to_all(index[self.order], self.sent, self.received) - shard.begin

    def fetch(self, rows: Tensor) -> Tensor:
        """Fetches the rows of the classes, in the order of `index`."""
        result = torch.empty_like(rows[:1]).new_empty(len(self.order), *rows.shape[1:])
        result[self.order] = self.shard.all_to_all(rows[self.requested], self.received, self.sent)
        return result

    def send_back(self, rows: Tensor, gradient: Tensor) -> None:
        """Adds a row per class to the gradient on the owner, in the order of ranks, so that results are reproducible."""
        received_rows = self.shard.all_to_all(rows[self.order], self.sent, self.received)
        gradient.index_put_((self.requested,), received_rows, accumulate=True)


def remote_gradient(inputs: LossInputs, index: Tensor, upstream: Tensor) -> Tensor:
    """The gradient (C_rank, D) of the cosines (C_rank,) to the classes `index` of any rank.

    Every class fetches the direction of its nearest class from the owner, and sends its own direction back.
    """
    unit = unit_rows(inputs.weight, compute_dtype(inputs.embeddings, inputs.weight))[0]
    remote = RemoteRows(named_shard(inputs.group, inputs.num_classes), index)
    scaled = upstream.to(unit.dtype).unsqueeze(1)
    gradient = scaled * remote.fetch(unit)
    remote.send_back(scaled * unit, gradient)
    through_normalization(gradient, inputs.weight)
    return gradient
