"""The exact search for nearest others where classes are divided among ranks: rows visit every rank, answers go home.

What is compared, and how, is ops/search.py's, so that any number of ranks gives the bits of one. Memory is O(shard), and
a few numbers a class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_margin._ops.kernels import Kernels
from fused_margin._ops.nearest.search import Coded, Lists, Search, chunks
from fused_margin._ops.plan import SMALLEST_CHUNK
from fused_margin.distributed import Shard, slice_of


@dataclass
class Visitor:
    """Rows of one rank on all ranks."""

    owner: int
    coded: Coded
    number: Tensor  # (R,) int64 over all classes, ascending
    cosine: Tensor  # (R, 1) float64, and index (R, 1) int64: their answers when they set out
    index: Tensor


class ShardedSearch:
    """A rank's classes, coded and measured, their lists, which hold numbers over all classes, and their answers.

    All ranks make the same calls in the same order.
    """

    def __init__(self, run: Kernels, shard: Shard, coded: Coded, lists: Lists, workspace_bytes: int):
        self.run, self.shard, self.coded, self.lists = run, shard, coded, lists
        self.search = Search(run, coded, coded, lists, 1, workspace_bytes)
        self.sizes, self.classes = shard.sizes, len(coded.rows)
        self.number = torch.arange(shard.begin, shard.begin + self.classes, device=coded.rows.device)
        # of visitors whose lists come home from every rank: all of these together are no larger than a shard's
        self.block = max(SMALLEST_CHUNK, self.sizes[0] // shard.world)

    def visitors(self, places: Tensor | None, coded: bool, most: int | None = None):
        """Own classes, or those in `places`, visit all ranks in turn, ascending; with their codes, if `coded`."""
        at = slice(None) if places is None else places
        own, answers = self.coded, self.search
        numbers = [
            self.number, own.inverse_norm, own.scale, own.length, own.error, answers.cosine[:, 0], answers.index[:, 0]
        ]  # fmt: skip
        mine = [own.rows[at], torch.stack([t.double() for t in numbers], dim=1)[at]]  # all of them fit a float64
        if coded:
            mine.append(own.code[at])
        for owner, (rows, numbers, *code) in self.shard.visits(mine, self.counts(places), most):
            number, inverse_norm, scale, length, error, cosine, index = numbers.t().contiguous().unbind(0)
            scale, length, error = scale.float(), length.float(), error.float()
            coded_rows = Coded(rows, code[0] if code else rows, scale, False, inverse_norm, None, length, error)
            yield Visitor(owner, coded_rows, number.long(), cosine.unsqueeze(1), index.long().unsqueeze(1))

    def counts(self, places: Tensor | None) -> list[int]:
        """Of every rank: how many of its classes it means."""
        if places is None:
            return self.sizes
        return self.shard.gather(torch.tensor([len(places)], device=places.device)).flatten().tolist()

    def settle(self, visitor: Visitor) -> None:
        """Compares own classes with their candidates in a whole shard."""
        if self.classes:
            self.run.settle_candidates(
                query=self.coded.arguments(), reference=visitor.coded.arguments(), lists=self.lists.arguments(),
                answers=(self.search.cosine, self.search.index), reference_place=None, reference_first=int(visitor.number[0]), references=len(visitor.number),
                query_first=self.shard.begin, one_set=True, queries=self.classes, size=self.coded.size,
            )  # fmt: skip

    def look(self) -> None:
        """Compares all classes with their candidates, wherever these are."""
        for visitor in self.visitors(None, coded=False):
            self.settle(visitor)

    def uncertain(self) -> Tensor:
        """Own classes whose lists do not prove their answers."""
        largest = self.shard.largest(self.coded.largest_error().clone())
        return (~(self.search.tolerance() > largest)).nonzero().squeeze(1)

    def sweep_all(self) -> None:
        """Makes all codes and lists anew, and compares what they leave open."""
        self.coded.encode(self.run)
        self.coded.measure(self.run)
        self.lists.clear()
        for visitor in self.visitors(None, coded=True):
            self.offer_to_own(visitor)
            self.settle(visitor)
        self.resolve(self.uncertain())

    def offer_to_own(self, visitor: Visitor) -> None:
        """Offers a whole shard to the own classes; of the own one, over the upper triangle."""
        own, home = self.coded, visitor.owner == self.shard.rank
        lists = self.lists.arguments()
        for column_begin, column_end in chunks(len(visitor.number), self.search.side):
            columns = visitor.coded.operand(slice(column_begin, column_end))
            for row_begin, row_end in chunks(column_end if home else self.classes, self.search.side):
                products = self.search.products(own.operand(slice(row_begin, row_end)), columns)
                self.run.offer_tile(
                    products=products, row_place=None, row_begin=row_begin, row_number=self.number[row_begin:row_end],
                    column_begin=column_begin, column_first=int(visitor.number[0]), one_set=True, row_scale=own.scale,
                    column_scale=visitor.coded.scale, of_rows=lists,
                    of_columns=lists if home and row_begin != column_begin else None, renewed=None,
                )  # fmt: skip

    def sweep(self, renewed: Tensor) -> Tensor:
        """Makes codes and lists of some classes, of (C,) all, anew, and compares what that leaves open.

        Returns:
            Those of the own classes (R,) that were compared with all others.
        """
        begin, own = self.shard.begin, self.coded
        of_own = renewed[begin : begin + self.classes].contiguous()
        places = of_own.nonzero().squeeze(1)
        if len(places):
            own.encode(self.run, places)
            own.measure_rows(self.run, places)
        if self.classes:
            self.run.forget_renewed(
                lists=self.lists.arguments(), renewed_rows=of_own, renewed_candidates=renewed, count=self.classes
            )
        for visitor in self.visitors(places, True, self.block):
            theirs = Lists.empty(len(visitor.number), self.lists.candidate.shape[1], renewed.device)
            self.compare(visitor, theirs, of_own)
            self.bring_home(visitor, theirs)
        uncertain = self.uncertain()
        uncertain = uncertain[~of_own[uncertain]]
        self.resolve(uncertain)
        return torch.cat([places, uncertain])

    def resolve(self, places: Tensor) -> None:
        """Looks at every class that may be nearest to these."""
        for visitor in self.visitors(places, True, self.block):
            self.compare(visitor)
            self.bring_home(visitor)

    def compare(self, visitor: Visitor, theirs: Lists | None = None, renewed: Tensor | None = None) -> None:
        """Looks at every own class that may be a visitor's nearest.

        With lists of theirs they are offered to each other, and looked at for the answers of own classes that are not
        renewed too.
        """
        answers = self.search.cosine, self.search.index
        for row_begin, row_end in chunks(len(visitor.number), self.search.side):
            rows = visitor.coded.operand(slice(row_begin, row_end))
            for column_begin, column_end in chunks(self.classes, self.search.side):
                tile = {
                    "products": self.search.products(rows, self.coded.operand(slice(column_begin, column_end))),
                    "row_place": None, "row_begin": row_begin, "row_number": visitor.number[row_begin:row_end],
                    "column_begin": column_begin, "column_first": self.shard.begin, "one_set": True,
                }  # fmt: skip
                self.run.resolve_tile(
                    **tile, query=visitor.coded.arguments(), reference=self.coded.arguments(),
                    of_rows=(visitor.cosine, visitor.index), of_columns=None if theirs is None else answers,
                    renewed=renewed, size=self.coded.size,
                )  # fmt: skip
                if theirs is not None:
                    self.run.offer_tile(
                        **tile, row_scale=visitor.coded.scale, column_scale=self.coded.scale,
                        of_rows=theirs.arguments(), of_columns=self.lists.arguments(), renewed=renewed,
                    )  # fmt: skip

    def bring_home(self, visitor: Visitor, theirs: Lists | None = None) -> None:
        """What every rank has found for the visitors goes to their owner, which keeps the best."""
        count, world, home = len(visitor.number), self.shard.world, visitor.owner == self.shard.rank
        found = [visitor.cosine, visitor.index.double()]
        if theirs is not None:
            found += [theirs.ceiling.unsqueeze(1).double(), theirs.value.double(), theirs.candidate.double()]
        sent = [count if rank == visitor.owner else 0 for rank in range(world)]
        found = self.shard.exchange(torch.cat(found, dim=1), sent, [count if home else 0] * world)
        if not home:
            return
        places = visitor.number - self.shard.begin
        cosine, index, *lists = found.view(world, count, -1).unbind(2)
        best = cosine.max(dim=0).values
        index = torch.where(cosine == best, index, torch.inf).min(dim=0).values
        known = ~best.isnan()  # of a row with NaN its own rank knows
        self.search.cosine[places, 0] = torch.where(known, best, self.search.cosine[places, 0])
        self.search.index[places, 0] = torch.where(known, index, self.search.index[places, 0].double()).long()
        if theirs is not None:
            merge(self.lists, places, torch.stack(lists, dim=2))


def merge(lists: Lists, places: Tensor, parts: Tensor) -> None:
    """Lists of some rows from those that ranks have made over their classes: (world, R, 1 + 2 capacity)."""
    capacity = lists.candidate.shape[1]
    ceiling, value, candidate = parts.split([1, capacity, capacity], dim=2)
    value, candidate = (t.transpose(0, 1).flatten(1) for t in (value, candidate))
    value, order = value.sort(dim=1, descending=True, stable=True)
    candidate = candidate.gather(1, order)
    ceiling = ceiling.amax(dim=(0, 2))
    if value.shape[1] > capacity:  # the largest that is left out
        ceiling = torch.maximum(ceiling, value[:, capacity])
    lists.candidate[places] = candidate[:, :capacity].int()
    lists.value[places] = value[:, :capacity].float()
    lists.ceiling[places] = ceiling.float()


def owners(shard: Shard, index: Tensor) -> tuple[Tensor, Tensor]:
    """The order (R,) that sorts classes by their owners, and how many each rank owns of them (world,)."""
    order = index.argsort(stable=True)  # ranks' classes ascend
    ends = [slice_of(shard.num_classes, rank, shard.world)[1] for rank in range(shard.world)]
    ends = torch.tensor(ends, dtype=torch.int64, device=index.device)
    owner = torch.bucketize(index[order], ends, right=True)
    return order, torch.bincount(owner, minlength=shard.world)
