"""The gradient of cosines to nearest classes of other ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_margin._ops.inputs import LossInputs
from fused_margin._ops.normalization import through_normalization, unit_rows
from fused_margin.distributed import Shard, named_shard, slice_of


def sort_by_owner(shard: Shard, index: Tensor) -> tuple[Tensor, Tensor]:
    """The order (R,) that sorts classes by their ranks, and the number that each rank owns (world_size,)."""
    order = index.argsort(stable=True)  # the classes of ranks ascend
    ends = [slice_of(shard.num_classes, rank, shard.world_size)[1] for rank in range(shard.world_size)]
    ends = torch.tensor(ends, dtype=torch.int64, device=index.device)
    owner = torch.bucketize(index[order], ends, right=True)
    return order, torch.bincount(owner, minlength=shard.world_size)


class RemoteRows:
    """The exchange of rows with the owners of some classes, of any rank."""

    def __init__(self, shard: Shard, index: Tensor):
        self.shard = shard
        self.order, asked = sort_by_owner(shard, index)
        counts = shard.all_gather(asked).tolist()  # counts[a][b]: number of rows that a asks b for
        self.sent, self.received = counts[shard.rank], [row[shard.rank] for row in counts]
        self.wanted = shard.all_to_all(index[self.order], self.sent, self.received) - shard.begin

    def fetch(self, rows: Tensor) -> Tensor:
        """The rows of the classes, in their order."""
        result = torch.empty_like(rows[:1]).new_empty(len(self.order), *rows.shape[1:])
        result[self.order] = self.shard.all_to_all(rows[self.wanted], self.received, self.sent)
        return result

    def send_back(self, rows: Tensor, gradient: Tensor) -> None:
        """Adds a row for each of the classes to its owner's gradient, in the order of ranks, which repeats bit for bit."""
        arrived = self.shard.all_to_all(rows[self.order], self.sent, self.received)
        gradient.index_put_((self.wanted,), arrived, accumulate=True)


def add_remote_gradient(inputs: LossInputs, d_weight: Tensor, index: Tensor, upstream: Tensor) -> None:
    """Adds the gradient of the own classes' cosines (C_rank,) to the classes in `index`, of any rank, to d_weight.

    Every class takes its nearest's direction from that class's rank, and sends its own direction there.
    """
    unit = unit_rows(inputs.weight, inputs.compute)[0]
    remote = RemoteRows(named_shard(inputs.group, inputs.num_classes), index)
    scaled = upstream.to(unit.dtype).unsqueeze(1)
    gradient = scaled * remote.fetch(unit)
    remote.send_back(scaled * unit, gradient)
    through_normalization(gradient, inputs.weight)
    d_weight.add_(gradient.to(d_weight.dtype))
