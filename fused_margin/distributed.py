"""Classes divided among the ranks of a process group: the slice of each rank, and the collectives between them.

One device is a group of one rank: its collectives return their input.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Shard", "slice_of", "slice_sizes"]


def slice_of(num_classes: int, rank: int, world_size: int) -> tuple[int, int]:
    """First class of a rank, and the first class after its slice.

    Slices are contiguous. The first C % world_size ranks have one more class.

    Examples:
        >>> from fused_margin.distributed import slice_of
        >>> [slice_of(10, rank, world_size=3) for rank in range(3)]
        [(0, 4), (4, 7), (7, 10)]
    """
    share, remainder = divmod(num_classes, world_size)
    begin = rank * share + min(rank, remainder)
    return begin, begin + share + (rank < remainder)


def slice_sizes(num_classes: int, world_size: int) -> list[int]:
    """Number of classes of every rank.

    Examples:
        >>> from fused_margin.distributed import slice_sizes
        >>> slice_sizes(10, world_size=3)
        [4, 3, 3]
    """
    slices = (slice_of(num_classes, rank, world_size) for rank in range(world_size))
    return [end - begin for begin, end in slices]


def averaging_module(tensor: Tensor) -> DistributedDataParallel | None:
    """The DistributedDataParallel that makes a parameter or buffer equal on all ranks, if its forward is running."""
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is None:
        return None
    named = chain(wrapper.module.named_parameters(), wrapper.module.named_buffers())
    averages = any(t is tensor and name not in wrapper.parameters_to_ignore for name, t in named)
    return wrapper if averages else None


@dataclass(frozen=True, eq=False)
class Shard:
    """A rank's slice of C classes, and the collectives of its group.

    Args:
        num_classes: C, over all ranks.
        group: process group whose ranks have different samples. Every rank must make every call. None means one rank.
        sample_rate: share of a rank's classes that take part in a step: the classes of the samples, and other classes
            drawn at random.

    Attributes:
        name: name of the group, empty without a group. The ops take the name, because they cannot take a group.
        rank: rank of this process in the group.
        world_size: number of ranks.
        begin: first class of this rank.
        size: number of classes of this rank.

    Raises:
        TypeError, ValueError: for a number of classes that is no integer or below 1, or a sample rate outside (0, 1].

    Examples:
        Without a group, one rank has all classes:

        >>> from fused_margin.distributed import Shard
        >>> shard = Shard(num_classes=10)
        >>> shard.rank, shard.world_size, shard.begin, shard.size
        (0, 1, 0, 10)

        With ``group=torch.distributed.group.WORLD`` on three ranks, ``begin, size`` are 0, 4 on the first rank, 4, 3 on
        the second and 7, 3 on the third.
    """

    num_classes: int
    group: dist.ProcessGroup | None = None
    sample_rate: float = 1.0
    rank: int = field(init=False, repr=False)
    world_size: int = field(init=False, repr=False)
    name: str = field(init=False, repr=False)
    begin: int = field(init=False, repr=False)
    size: int = field(init=False, repr=False)

    def __post_init__(self):
        if isinstance(self.num_classes, bool) or not isinstance(self.num_classes, (int, np.integer, torch.SymInt)):
            raise TypeError(f"num_classes: expected an integer, got {type(self.num_classes).__name__}")
        if self.num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {self.num_classes}")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate: expected a number in (0, 1], got {self.sample_rate}")
        rank, world_size, name = 0, 1, ""
        if self.group is not None:
            rank, world_size, name = dist.get_rank(self.group), dist.get_world_size(self.group), self.group.group_name
            _groups[name] = self.group
        begin, end = slice_of(self.num_classes, rank, world_size)
        for attribute, value in (
            ("rank", rank), ("world_size", world_size), ("name", name), ("begin", begin), ("size", end - begin)
        ):  # fmt: skip
            object.__setattr__(self, attribute, value)

    @property
    def sizes(self) -> list[int]:
        """Number of classes of every rank."""
        return slice_sizes(self.num_classes, self.world_size)

    def __deepcopy__(self, memo: dict[int, Any]) -> Shard:
        return self  # a process group cannot be copied

    def is_averaged(self, tensor: Tensor) -> bool:
        """Whether DistributedDataParallel gives ranks of the group one parameter or buffer, although their classes differ."""
        if self.group is None or torch.compiler.is_compiling() or (wrapper := averaging_module(tensor)) is None:
            return False
        own, averaged = (set(dist.get_process_group_ranks(g)) for g in (self.group, wrapper.process_group))
        return len(own & averaged) > 1

    def all_gather(self, rows: Tensor) -> Tensor:
        """Gathers the rows (R, ...) of every rank, with the same R, as (world_size, R, ...)."""
        gathered, wait = self.start_all_gather(rows)
        wait()
        return gathered

    def start_all_gather(self, rows: Tensor) -> tuple[Tensor, Callable[[], Any]]:
        """As :meth:`all_gather`, but the result may be read only after calling the returned function."""
        if self.group is None:
            return rows.unsqueeze(0), lambda: None
        gathered = rows.new_empty(self.world_size, *rows.shape)
        work = _all_gather(gathered.view(-1), rows.contiguous().view(-1), group=self.group, async_op=True)
        return gathered, work.wait

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        """(world_size, ...) -> (...): the sum over ranks of the part for this rank."""
        if self.group is None:
            return parts[0]
        own = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
        _reduce_scatter(own.view(-1), parts.contiguous().view(-1), group=self.group)
        return own

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value

    def all_reduce_max(self, value: Tensor) -> Tensor:
        """The maximum over ranks, in place."""
        if self.group is not None:
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return value

    def reduce_sum(self, value: Tensor, target: int) -> None:
        """Sums over ranks, in place on rank `target`. On the other ranks the values become undefined."""
        if self.group is not None:
            dist.reduce(value, dist.get_global_rank(self.group, target), group=self.group)

    def broadcast(self, rows: Tensor, source: int) -> dist.Work | None:
        """Starts to copy the rows of rank `source` over those of all other ranks."""
        if self.group is None:
            return None
        return dist.broadcast(rows, dist.get_global_rank(self.group, source), group=self.group, async_op=True)

    def all_to_all(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Sends `sent[r]` of the rows, in order, to rank r. Returns `received[r]` rows from each rank r, ordered by rank."""
        if self.group is None:
            return rows
        output = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(output, rows.contiguous(), received, sent, group=self.group)
        return output

    def iter_shards(
        self, own: list[Tensor], counts: list[int], block_rows: int | None = None
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Iterates over the rows of every rank, on all ranks: (owner, rows of each tensor).

        Args:
            own: this rank's (R, ...) tensors, `counts[rank]` rows each.
            counts: number of rows of every rank, the same on all ranks.
            block_rows: maximum number of rows per block. At most two remote blocks are resident.
        """
        block_rows = block_rows or max(1, *counts)
        blocks = [
            (owner, begin, min(begin + block_rows, count))
            for owner, count in enumerate(counts)
            for begin in range(0, count, block_rows)
        ]

        def start(owner: int, begin: int, end: int) -> tuple[list[Tensor], list[dist.Work | None]]:
            local = owner == self.rank
            rows = [t[begin:end].contiguous() if local else t.new_empty(end - begin, *t.shape[1:]) for t in own]
            return rows, [self.broadcast(t, owner) for t in rows]

        started = [start(*block) for block in blocks[:1]]
        for k, (owner, *_) in enumerate(blocks):
            rows, pending = started.pop()
            started += [start(*block) for block in blocks[k + 1 : k + 2]]
            for work in pending:
                if work is not None:
                    work.wait()
            yield owner, rows

    def gather_classes(self, rows: Tensor) -> Tensor:
        """Gathers the rows (C_rank, ...) of every rank's classes as (C, ...), on all ranks. For small rows."""
        if self.group is None:
            return rows
        sizes = self.sizes
        parts = self.all_gather(padded(rows, sizes[0]))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def gather_to_first(self, rows: Tensor) -> Tensor | None:
        """The rows of all classes on the first rank's CPU, one shard at a time; None on the other ranks."""
        if self.group is None:
            return rows.cpu()
        rows_per_class = torch.tensor(rows.shape[0] // self.size if self.size else 0, device=rows.device)
        most_rows_per_class = int(self.all_reduce_max(rows_per_class))
        if self.rank:
            if self.size:
                dist.send(rows.contiguous(), dist.get_global_rank(self.group, 0), group=self.group)
            return None
        parts = [rows.cpu()]
        for owner in range(1, self.world_size):
            begin, end = slice_of(self.num_classes, owner, self.world_size)
            if end > begin:
                part = rows.new_empty((end - begin) * most_rows_per_class, *rows.shape[1:])
                dist.recv(part, dist.get_global_rank(self.group, owner), group=self.group)
                parts.append(part.cpu())
        return torch.cat(parts)

    def local_part(self, rows: Tensor) -> Tensor:
        """This rank's rows of the rows of all classes."""
        rows_per_class = rows.shape[0] // self.num_classes
        return rows[self.begin * rows_per_class : (self.begin + self.size) * rows_per_class]

    def sharded_tensor(self, rows: Tensor) -> Any:
        """This rank's rows, a multiple of its classes, as its part of a ShardedTensor over the rows of all classes.

        For torch.distributed.checkpoint: ``dcp.save`` writes each part from its rank; ``dcp.load`` fills `rows` in place,
        for any number of ranks that wrote the checkpoint. Without a group, `rows` itself is returned.
        """
        if self.group is None:
            return rows
        # Imported here, because not every build of torch has these. DTensor, their successor, divides rows differently.
        from torch.distributed._shard.metadata import ShardMetadata
        from torch.distributed._shard.sharded_tensor import Shard as LocalShard
        from torch.distributed._shard.sharded_tensor import ShardedTensor

        rows_per_class = rows.shape[0] // self.size if self.size else 1
        offsets = [self.begin * rows_per_class, *[0] * (rows.dim() - 1)]
        placement = f"rank:{dist.get_rank()}/{rows.device}"
        parts = [LocalShard(rows, ShardMetadata(offsets, list(rows.shape), placement))] if self.size else []
        most_rows_per_class = int(self.all_reduce_max(torch.tensor(rows_per_class, device=rows.device)))
        total = [self.num_classes * most_rows_per_class, *rows.shape[1:]]
        return ShardedTensor._init_from_local_shards(parts, total, process_group=self.group)


# The groups of all shards, by name. torch has such a table, but no public function to read it.
_groups: weakref.WeakValueDictionary[str, dist.ProcessGroup] = weakref.WeakValueDictionary()


def named_shard(name: str, num_classes: int) -> Shard:
    """The shard of an op's arguments: the name of a group (empty for one rank), and C."""
    if name and name not in _groups:
        raise RuntimeError(f"shard: the process group {name!r} was destroyed")
    return Shard(num_classes, _groups[name] if name else None)


def padded(rows: Tensor, count: int) -> Tensor:
    """The rows, followed by zero rows up to `count`."""
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])]) if len(rows) < count else rows


# torch 2.13 renamed these collectives.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
