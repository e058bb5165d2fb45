"""Classes divided among the ranks of a process group: which classes are whose, and the messages between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_margin._ops.registration import FirstOrderFunction


def slice_of(num_classes: int, rank: int, world: int) -> tuple[int, int]:
    """First class of a rank and the first that is not its: contiguous, the first C % world ranks have one more."""
    share, more = divmod(num_classes, world)
    begin = rank * share + min(rank, more)
    return begin, begin + share + (rank < more)


@dataclass(frozen=True, eq=False)
class Shard:
    """A rank's part of C classes, and how it talks to the others.

    Args:
        num_classes: C, over all ranks.
        group: of ranks that have other samples each; every one of them must make every call. None: one rank, no messages.
        sample_rate: share of its classes that a rank takes at a step: those of the samples, and others drawn at random.
    """

    num_classes: int
    group: dist.ProcessGroup | None = None
    sample_rate: float = 1.0

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def world(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def begin(self) -> int:
        return slice_of(self.num_classes, self.rank, self.world)[0]

    @property
    def size(self) -> int:
        begin, end = slice_of(self.num_classes, self.rank, self.world)
        return end - begin

    @property
    def sizes(self) -> list[int]:
        """Classes of every rank."""
        slices = (slice_of(self.num_classes, rank, self.world) for rank in range(self.world))
        return [end - begin for begin, end in slices]

    def __deepcopy__(self, memo: dict[int, Any]) -> Shard:
        return self  # a group cannot be copied, and its copy would be the same ranks

    def gather(self, rows: Tensor) -> Tensor:
        """(R, ...) of every rank, R the same on all, as (world, R, ...)."""
        everyone, wait = self.start_gather(rows)
        wait()
        return everyone

    def start_gather(self, rows: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """As `gather`, but the rows are only there when what comes with them has been called."""
        if self.group is None:
            return rows.unsqueeze(0), lambda: None
        everyone = rows.new_empty(self.world, *rows.shape)
        arrival = _all_gather(everyone.view(-1), rows.contiguous().view(-1), group=self.group, async_op=True)
        return everyone, lambda: arrival.wait()

    def scatter_sums(self, parts: Tensor) -> Tensor:
        """(world, ...): the sum over ranks of what is for this one, (...)."""
        if self.group is None:
            return parts[0]
        own = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
        _reduce_scatter(own.view(-1), parts.contiguous().view(-1), group=self.group)
        return own

    def add_up(self, value: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value

    def largest(self, value: Tensor) -> Tensor:
        """The largest over ranks, in place."""
        if self.group is not None:
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return value

    def spread(self, rows: Tensor, owner: int) -> dist.Work | None:
        """Starts to copy `owner`'s rows over everyone else's."""
        if self.group is None:
            return None
        return dist.broadcast(rows, dist.get_global_rank(self.group, owner), group=self.group, async_op=True)

    def visits(
        self, own: list[Tensor], counts: list[int], most: int | None = None
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Rows of every rank in turn, on all ranks: (owner, rows of each tensor).

        Args:
            own: this rank's (R, ...) tensors, `counts[rank]` rows each.
            counts: rows of every rank, the same on all of them.
            most: rows that come together. Two such visitors are here at a time: one, and the next on its way.
        """
        most = most or max(1, *counts)
        stops = [
            (owner, begin, min(begin + most, count))
            for owner, count in enumerate(counts)
            for begin in range(0, count, most)
        ]

        def set_out(owner: int, begin: int, end: int) -> tuple[list[Tensor], list[dist.Work | None]]:
            home = owner == self.rank
            rows = [t[begin:end].contiguous() if home else t.new_empty(end - begin, *t.shape[1:]) for t in own]
            return rows, [self.spread(t, owner) for t in rows]

        ahead = set_out(*stops[0]) if stops else None
        for k, (owner, *_) in enumerate(stops):
            rows, arrivals = ahead
            ahead = set_out(*stops[k + 1]) if k + 1 < len(stops) else None
            for arrival in arrivals:
                if arrival is not None:
                    arrival.wait()
            yield owner, rows

    def of_every_class(self, rows: Tensor) -> Tensor:
        """(C, ...) of the rows (C_rank, ...) that ranks have of their classes: for what is small."""
        sizes = self.sizes
        if len(rows) < sizes[0]:
            rows = torch.cat([rows, rows.new_zeros(sizes[0] - len(rows), *rows.shape[1:])])
        return torch.cat([part[:size] for part, size in zip(self.gather(rows), sizes, strict=True)])

    def exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Sends `sent[r]` of the rows, in order, to rank r; returns what the others sent, in the order of ranks."""
        if self.group is None:
            return rows
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=self.group)
        return arrived

    def collect(self, rows: Tensor) -> Tensor | None:
        """The rows of all classes on the first rank's CPU, None on the others; a shard at a time goes there."""
        if self.group is None:
            return rows.cpu()
        each = self.largest(torch.tensor(rows.shape[0] // self.size if self.size else 0, device=rows.device)).item()
        if self.rank:
            if self.size:
                dist.send(rows.contiguous(), dist.get_global_rank(self.group, 0), group=self.group)
            return None
        parts = [rows.cpu()]
        for owner in range(1, self.world):
            begin, end = slice_of(self.num_classes, owner, self.world)
            if end > begin:
                arrived = rows.new_empty((end - begin) * each, *rows.shape[1:])
                dist.recv(arrived, dist.get_global_rank(self.group, owner), group=self.group)
                parts.append(arrived.cpu())
        return torch.cat(parts)

    def part_of(self, rows: Tensor) -> Tensor:
        """What `collect` had from this rank, or would have from this number of ranks."""
        each = rows.shape[0] // self.num_classes
        return rows[self.begin * each : (self.begin + self.size) * each]

    def of_all(self, rows: Tensor) -> Tensor:
        """A rank's rows (a multiple of its classes) as its part of those of all classes, for torch.distributed.checkpoint.

        ``dcp.save`` writes each part from its rank; ``dcp.load`` fills `rows` in place, whatever ranks had written.
        """
        if self.group is None:
            return rows
        # here, because not every build of torch has them; DTensor, their successor, divides rows in another way
        from torch.distributed._shard.metadata import ShardMetadata
        from torch.distributed._shard.sharded_tensor import Shard as LocalShard
        from torch.distributed._shard.sharded_tensor import ShardedTensor

        each = rows.shape[0] // self.size if self.size else 1
        offsets = [self.begin * each, *[0] * (rows.dim() - 1)]
        placement = f"rank:{dist.get_rank()}/{rows.device}"
        parts = [LocalShard(rows, ShardMetadata(offsets, list(rows.shape), placement))] if self.size else []
        most = self.largest(torch.tensor(each, device=rows.device)).item()
        total = [self.num_classes * most, *rows.shape[1:]]
        return ShardedTensor._init_from_local_shards(parts, total, process_group=self.group)


# their names from torch 2.13 on, and before
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Total(FirstOrderFunction):
    """The sum of a number over all ranks, of which each one's own part is differentiated on its rank."""

    @staticmethod
    def forward(ctx, shard: Shard, value: Tensor) -> Tensor:
        return shard.add_up(value.clone())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class Shared(FirstOrderFunction):
    """A number that is the same on every rank and that each uses for its own samples: its gradient is that of all."""

    @staticmethod
    def forward(ctx, shard: Shard, value: Tensor) -> Tensor:
        ctx.shard = shard
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, ctx.shard.add_up(gradient.to(torch.float64, copy=True)).to(gradient.dtype)


class DenseGradient(torch.autograd.Function):
    """Its input; what comes back as some rows goes on as all of them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.to_dense() if gradient.is_sparse else gradient

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)
