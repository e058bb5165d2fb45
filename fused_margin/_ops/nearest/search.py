"""The exact search for the nearest rows, on one rank or several.

Products of codes select candidates, which are compared in float64. If classes are divided among ranks, blocks of rows of
one rank are broadcast to all ranks, each rank compares them with its own classes, and the results return to the owner.
Any number of ranks gives the same bits. Memory is O(shard).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_margin._ops.backends.select import Kernels, supports_exact_search
from fused_margin._ops.inputs import DTYPES, MIN_CHUNK, LossInputs, compute_dtype, whole_chunk
from fused_margin._ops.nearest.quantized import (
    CandidateLists,
    QuantizedRows,
    capacity_of,
    search_lists,
    tile_bytes,
    uses_int8_codes,
)
from fused_margin._ops.nearest.tiles import find_by_tiles
from fused_margin.distributed import Shard, named_shard

MAX_NEAREST = 32
# Maximum exponent of elements of rows whose inner products are computed without scaling. Lists store scores in float32,
# which can hold sums of 2^15 such products. Longer rows are divided by a power of two, exactly, in float64.
MAX_EXPONENT = 55


@dataclass
class Block:
    """A block of rows of one rank, on all ranks, with their answers so far.

    On the owner, `selected` has the indices of the rows (None for all rows), and results are written to the owner's tensors.
    On other ranks, the rows are copies.
    """

    owner: int
    is_local: bool
    rows: QuantizedRows
    selected: Tensor | None
    ids: Tensor | None  # (R,) int64 classes over all ranks, ascending; None if they equal the row indices
    first_id: int  # the first of these classes
    cosine: Tensor  # (R, k) float64, on the owner (Q, k)
    index: Tensor  # int64, the same shape
    count: int  # number of rows


class NearestSearch:
    """A search: queries, references, candidate lists of the queries, and their answers so far.

    Args:
        query: the rows of this rank.
        reference: rows to search. If it is `query` itself, each query's nearest other row of all ranks is searched.
        candidates: lists of the queries, with indices over the rows of all ranks.
        k: number of nearest rows.
        shard: the slice of the rows, if they are divided among ranks. All ranks must then make the same calls in the same
            order.
    """

    def __init__(
        self, run: Kernels, query: QuantizedRows, reference: QuantizedRows, candidates: CandidateLists, k: int,
        workspace_bytes: int, shard: Shard | None = None,
    ):  # fmt: skip
        self.run, self.query, self.reference, self.candidates = run, query, reference, candidates
        self.shard = Shard(len(reference.rows)) if shard is None else shard
        self.same_set = query is reference
        queries, device = len(query.rows), query.rows.device
        self.cosine = torch.full((queries, k), -math.inf, dtype=torch.float64, device=device)
        self.index = torch.full((queries, k), -1, dtype=torch.int64, device=device)
        # The class of each row over all ranks. None on a single rank, where it is the row index.
        self.ids: Tensor | None = None
        if self.shard.world_size > 1:
            self.ids = torch.arange(self.shard.begin, self.shard.begin + queries, device=device)
        operand = reference.operand(slice(0, 0))
        item = max(4, operand.element_size())
        largest = max(queries, len(reference.rows))
        self.side = whole_chunk(largest, math.isqrt(tile_bytes(device, workspace_bytes) // item))
        integer = reference.codes.dtype == torch.int8
        self.buffer = torch.empty(self.side**2, dtype=torch.int32 if integer else operand.dtype, device=device)
        self.multiply = torch._int_mm if integer else torch.mm
        # Every rank returns the lists of a block. Together they are no larger than the lists of a shard.
        self.block_rows = max(MIN_CHUNK, self.shard.sizes[0] // self.shard.world_size)

    def full_search(self) -> None:
        """Compares every query with every reference."""
        for block in self.blocks(None, with_codes=True):
            self.update_candidates(block)
            self.rerank_candidates(block)
        self.search_exact(self.uncertain())

    def rerank_all(self) -> None:
        """Compares all queries with the candidates in their lists, on all ranks."""
        for block in self.blocks(None, with_codes=False):
            self.rerank_candidates(block)

    def refresh(self, refreshed: Tensor) -> Tensor:
        """Recomputes codes and lists of flagged classes, and searches for uncertain answers.

        Args:
            refreshed: (C,) flags of the classes of all ranks.

        Returns:
            The classes (R,) of this rank that were compared with all others.
        """
        own = self.query
        own_refreshed = self.shard.local_part(refreshed).contiguous()
        selected = own_refreshed.nonzero().squeeze(1)
        if len(selected):
            own.quantize(self.run, selected)
            own.measure_rows(self.run, selected)
        if len(own.rows):
            self.run.remove_refreshed(
                candidates=self.candidates.arguments(), refreshed_rows=own_refreshed, refreshed_candidates=refreshed,
                count=len(own.rows),
            )  # fmt: skip
        self.search_exact(selected, own_refreshed)
        uncertain = self.uncertain()
        uncertain = uncertain[~own_refreshed[uncertain]]
        self.search_exact(uncertain)
        return torch.cat([selected, uncertain])

    def rows_per_rank(self, selected: Tensor | None) -> list[int]:
        """Number of rows of every rank, or of its `selected`."""
        if selected is None:
            return self.shard.sizes
        return self.shard.all_gather(torch.tensor([len(selected)], device=selected.device)).flatten().tolist()

    def blocks(self, selected: Tensor | None, with_codes: bool, block_rows: int | None = None) -> Iterator[Block]:
        """Blocks of the references, or of those in `selected`, of all ranks in ascending order."""
        own, shard = self.reference, self.shard
        if self.ids is None:
            count = len(own.rows) if selected is None else len(selected)
            if count:
                yield Block(0, True, own, selected, None, 0, self.cosine, self.index, count)
            return
        sent_rows = slice(None) if selected is None else selected
        numbers = [own.inverse_norm, own.scale, own.length, own.error, self.cosine[:, 0], self.index[:, 0], self.ids]
        sent = [
            own.rows[sent_rows],
            torch.stack([t.double() for t in numbers], dim=1)[sent_rows],
        ]  # float64 holds all of them exactly
        if with_codes:
            sent.append(own.codes[sent_rows])
        done = 0
        for owner, (rows, packed, *codes) in shard.iter_shards(sent, self.rows_per_rank(selected), block_rows):
            inverse_norm, scale, length, error, cosine, index, ids = packed.t().contiguous().unbind(0)
            ids, count = ids.long(), len(rows)
            if owner == shard.rank:
                own_selected = None if selected is None else selected[done : done + count]
                done += count
                yield Block(owner, True, own, own_selected, ids, int(ids[0]), self.cosine, self.index, count)
                continue
            scale, length, error = scale.float(), length.float(), error.float()
            remote = QuantizedRows(rows, codes[0] if codes else rows, scale, False, inverse_norm, None, length, error)
            yield Block(
                owner,
                False,
                remote,
                None,
                ids,
                int(ids[0]),
                cosine.unsqueeze(1),
                index.long().unsqueeze(1),
                count,
            )

    def scores(self, left: Tensor, right: Tensor) -> Tensor:
        """Products (L, R) of codes, in a buffer that the next call overwrites."""
        out = self.buffer[: len(left) * len(right)].view(len(left), len(right))
        if left.shape[1] == 0:
            return out.zero_()
        return self.multiply(left, right.t(), out=out)

    def update_candidates(self, block: Block) -> None:
        """Updates the candidate lists with all references of a block; only the upper triangle for rows of this rank."""
        triangle = self.same_set and block.is_local
        lists = self.candidates.arguments()
        for column_begin, column_end in chunks(block.count, self.side):
            columns = block.rows.operand(slice(column_begin, column_end))
            for row_begin, row_end in chunks(column_end if triangle else len(self.query.rows), self.side):
                self.run.update_candidates(
                    scores=self.scores(self.query.operand(slice(row_begin, row_end)), columns), row_index=None,
                    row_begin=row_begin, row_id=None if self.ids is None else self.ids[row_begin:row_end],
                    column_begin=column_begin, column_first_id=block.first_id, same_set=self.same_set,
                    row_scale=self.query.scale, column_scale=block.rows.scale, row_candidates=lists,
                    column_candidates=lists if triangle and row_begin != column_begin else None, refreshed=None,
                )  # fmt: skip

    def rerank_candidates(self, block: Block) -> None:
        """Compares queries with their candidates in a block of consecutive references."""
        if len(self.query.rows):
            self.run.rerank_candidates(
                query=self.query.arguments(), reference=block.rows.arguments(),
                candidates=self.candidates.arguments(), nearest=(self.cosine, self.index),
                reference_first_id=block.first_id, references=block.count, query_first_id=self.shard.begin, same_set=self.same_set,
                queries=len(self.query.rows), size=self.query.size,
            )  # fmt: skip

    def slack(self) -> Tensor:
        """Slacks (Q,) float64. A query is certain if all errors of references outside its list are below its slack."""
        query, bound, worst = self.query, self.candidates.upper_bound.double(), self.cosine[:, -1]
        norm = 1.0 if self.reference.norm is None else self.reference.norm.max()
        slack = (worst - bound - query.error.double() * norm) / query.length.double()
        certain = (query.error < 0) | (query.inverse_norm == 0) | (bound == -math.inf)
        return slack.masked_fill_(certain, math.inf)

    def uncertain(self) -> Tensor:
        """Queries with answers that their lists do not prove."""
        largest = self.shard.all_reduce_max(self.reference.largest_error().clone())
        return (~(self.slack() > largest)).nonzero().squeeze(1)

    def search_exact(self, selected: Tensor, refreshed: Tensor | None = None) -> None:
        """Compares the queries `selected` with every reference that may be among their nearest.

        Args:
            refreshed: (Q,) flags of `selected`, if these rows have new codes. They are then candidates for all lists, and
                may become the answers of other rows.
        """
        if not self.same_set:
            own = Block(0, True, self.query, selected, None, 0, self.cosine, self.index, len(selected))
            return self.compare(own, None, None)
        for block in self.blocks(selected, with_codes=True, block_rows=self.block_rows):
            lists = None
            if refreshed is not None:
                lists = self.candidates
                if not block.is_local:
                    lists = CandidateLists.empty(block.count, lists.candidate.shape[1], refreshed.device)
            self.compare(block, lists, refreshed)
            self.return_results(block, lists)

    def compare(self, block: Block, lists: CandidateLists | None, refreshed: Tensor | None) -> None:
        """Compares a block with every reference of this rank that may be nearest to a row of the block.

        Args:
            lists: lists of the rows of the block. Rows and references then become candidates in each other's lists, and
                the rows may become the answers of references that are not refreshed.
        """
        own = self.reference
        height = max(1, min(block.count, self.side))
        width = whole_chunk(len(own.rows), len(self.buffer) // height)  # with few rows, fewer and wider tiles
        for row_begin, row_end in chunks(block.count, height):
            selected = None if block.selected is None else block.selected[row_begin:row_end]
            operand = block.rows.operand(slice(row_begin, row_end) if selected is None else selected)
            for column_begin, column_end in chunks(len(own.rows), width):
                tile = {
                    "scores": self.scores(operand, own.operand(slice(column_begin, column_end))), "row_index": selected,
                    "row_begin": row_begin if selected is None else 0,
                    "row_id": None if block.ids is None else block.ids[row_begin:row_end],
                    "column_begin": column_begin, "column_first_id": self.shard.begin, "same_set": self.same_set,
                }  # fmt: skip
                self.run.search_exact(
                    **tile, query=block.rows.arguments(), reference=own.arguments(),
                    row_nearest=(block.cosine, block.index),
                    column_nearest=None if lists is None else (self.cosine, self.index), refreshed=refreshed,
                    size=own.size,
                )  # fmt: skip
                if lists is not None:
                    self.run.update_candidates(
                        **tile, row_scale=block.rows.scale, column_scale=own.scale, row_candidates=lists.arguments(),
                        column_candidates=self.candidates.arguments(), refreshed=refreshed,
                    )  # fmt: skip

    def return_results(self, block: Block, lists: CandidateLists | None) -> None:
        """Sends the results of a block to its owner, which selects the best of all ranks."""
        if self.shard.world_size == 1:
            return
        rows = block.selected if block.is_local and block.selected is not None else slice(None)
        results = torch.cat(
            [block.cosine[rows], block.index[rows].double(), *([] if lists is None else [lists.packed(rows)])], 1
        )
        ranks = range(self.shard.world_size)
        sent = [block.count if rank == block.owner else 0 for rank in ranks]
        parts = self.shard.all_to_all(results, sent, [block.count if block.is_local else 0 for _ in ranks])
        if not block.is_local:
            return
        parts = parts.view(self.shard.world_size, block.count, -1)
        cosine, index = parts[..., 0], parts[..., 1]
        best = cosine.max(dim=0).values
        index = torch.where(cosine == best, index, torch.inf).min(dim=0).values
        is_number = ~best.isnan()  # for a row with NaN, the owner has the answer
        self.cosine[rows, 0] = torch.where(is_number, best, self.cosine[rows, 0])
        self.index[rows, 0] = torch.where(is_number, index, self.index[rows, 0].double()).long()
        if lists is not None:
            lists.merge(rows, parts[..., 2:])

    def answers(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines or inner products (Q, k) in `dtype`, and the references (Q, k) int64."""
        cosine = self.cosine if self.query.inner_product else self.cosine.clamp(-1.0, 1.0)
        if self.query.size == 1 and not self.query.inner_product:
            cosine = cosine.round()  # exactly -1, 0 or 1; products with inverse lengths have rounding errors
        return cosine.to(dtype), self.index.clamp(min=0)


def chunks(count: int, size: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of parts of `size`; the last may be smaller."""
    return ((begin, min(begin + size, count)) for begin in range(0, count, size))


def exponent_of(rows: Tensor) -> int:
    """Exponent of the largest element of rows (R, D), at least -1000. Rows with NaN or infinity do not count."""
    largest = torch.linalg.vector_norm(rows, math.inf, dim=1, dtype=torch.float64)
    largest = largest.masked_fill_(~largest.isfinite(), 0.0)
    return max(math.frexp(largest.max().item())[1] - 1, -1000) if len(rows) else 0


def find_nearest(
    run: Kernels, query: Tensor, reference: Tensor | None, number: int, inner_product: bool, workspace_bytes: int
) -> NearestSearch:
    """Searches the `number` nearest references of every query, or other queries without references, on one rank."""
    exponents = (0, 0)
    if inner_product:
        exponents = exponent_of(query), exponent_of(query if reference is None else reference)
    is_scaled = max(map(abs, exponents)) > MAX_EXPONENT
    if is_scaled:
        query = query.double() * 2.0 ** -exponents[0]
        reference = None if reference is None else reference.double() * 2.0 ** -exponents[1]
    rows = query if reference is None else reference
    int8 = uses_int8_codes(rows, workspace_bytes)
    quantized = QuantizedRows.of(run, query, int8, inner_product)
    others = quantized if reference is None else QuantizedRows.of(run, reference, int8, inner_product)
    search = search_quantized(run, quantized, others, number, workspace_bytes)
    if is_scaled:
        half = sum(exponents) // 2  # the power of two itself can overflow float64
        search.cosine.mul_(2.0**half).mul_(2.0 ** (sum(exponents) - half))
    return search


def search_quantized(
    run: Kernels, query: QuantizedRows, reference: QuantizedRows, number: int, workspace_bytes: int
) -> NearestSearch:
    """The finished search for the `number` nearest references of every query, on one rank."""
    rows, int8 = reference.rows, reference.codes.dtype == torch.int8
    lists = search_lists(len(query.rows), number, len(rows), int8, rows.device, workspace_bytes)
    search = NearestSearch(run, query, reference, lists, number, workspace_bytes)
    search.full_search()
    return search


def find_nearest_others(run: Kernels, shard: Shard, weight: Tensor, workspace_bytes: int) -> tuple[Tensor, Tensor]:
    """Cosine (C_rank,) float64 of every class of this rank to its nearest other class of all ranks, and that class."""
    too_large = torch.tensor(not uses_int8_codes(weight, workspace_bytes), dtype=torch.int64, device=weight.device)
    int8 = not shard.all_reduce_max(too_large).item()
    check_ranks(shard, weight, int8, too_large.new_zeros(0))
    quantized = QuantizedRows.of(run, common_rows(shard, weight), int8)
    lists = CandidateLists.empty(len(weight), capacity_of(1, shard.num_classes, int8), weight.device)
    search = NearestSearch(run, quantized, quantized, lists, 1, workspace_bytes, shard)
    search.full_search()
    cosine, index = search.answers(torch.float64)
    return cosine.squeeze(1), index.squeeze(1)


def common_rows(shard: Shard, weight: Tensor) -> Tensor:
    """Weights in a dtype that collectives support."""
    return weight if shard.world_size == 1 else weight.to(compute_dtype(weight))


def check_ranks(shard: Shard, weight: Tensor, int8: bool, numbers: Tensor) -> bool:
    """Whether `numbers` (n,) int64 are the same on all ranks.

    Raises:
        ValueError: on every rank, if the weights of one differ from those of rank 0, so that no rank waits forever.
    """
    own = [weight.shape[1], DTYPES.index(weight.dtype), int8, *numbers.tolist()]
    gathered = shard.all_gather(torch.tensor(own, device=weight.device)).tolist()
    for rank, other in enumerate(gathered):
        if other[:3] != gathered[0][:3]:
            first, second = (
                f"embedding_size {size}, {DTYPES[dtype]}, {'int8' if uses_int8 else 'float'} codes"
                for size, dtype, uses_int8, *_ in (gathered[0], other)
            )
            raise ValueError(f"weight: expected the same on all ranks, got {first} on rank 0, {second} on rank {rank}")
    return all(other == gathered[0] for other in gathered)


def find_nearest_classes(run: Kernels, inputs: LossInputs, forward_chunks: Callable) -> tuple[Tensor, Tensor]:
    """Cosine (C_rank,) and index of the nearest other class of every class: known, by the exact search, or by tiles."""
    if inputs.known_cosine is not None and inputs.known_index is not None:
        return inputs.known_cosine, inputs.known_index
    shard = named_shard(inputs.group, inputs.num_classes)
    if supports_exact_search(inputs.weight.device):
        return find_nearest_others(run, shard, inputs.weight, inputs.workspace_bytes)
    return find_by_tiles(run, shard, inputs, forward_chunks)
