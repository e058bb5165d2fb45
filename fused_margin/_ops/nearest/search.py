"""The nearest rows, exactly: cheap products of codes screen, and what they cannot tell apart is compared in double.

csrc/search.h has the bound, docs/nearest.md its proof. Codes are int8 where the processor multiplies those fastest, else
the rows themselves.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_margin._ops.backends.select import constant_while_compiled, rounds_float32
from fused_margin._ops.inputs import compute_dtype
from fused_margin._ops.kernels import Kernels
from fused_margin._ops.normalization import unit_rows
from fused_margin._ops.plan import SMALLEST_CHUNK, whole_chunk

# Of a tile of products. On the CPU it stays in cache for the two to four times it is read. On a GPU it is so large that
# its kernels take longer than their launches.
TILE_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
MOST_NEAREST = 32
LONGEST = 1e18  # of rows that are multiplied as they are, in float32
# Of elements of rows whose inner products are made as they are. Lists keep products in float32, which has room for sums of
# 2^15 of these; longer rows are divided by a power of two, exactly, in float64.
MOST_EXPONENT = 55
# Torch 2.13 leaves products of rows of one element unwritten; beyond the last size a product would not fit an int32.
INT8_SIZES = range(2, (2**31 - 1) // 127**2 + 1)


def int8_wins(rows: Tensor) -> bool:
    """Whether products of int8 are the fastest for such rows: on processors with instructions for them."""
    return rows.shape[1] in INT8_SIZES and _has_int8_products(rows.device) and int8_products_are_right()


@constant_while_compiled
def _has_int8_products(device: torch.device) -> bool:
    if device.type != "cpu":
        return False
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_vnni_supported", "_is_avx512_vnni_supported"))


@functools.cache
def int8_products_are_right() -> bool:
    """Whether torch's products of int8, which are no public function of it, give known answers in memory that holds others."""
    for rows, size, columns in ((1, 2, 1), (3, 7, 65), (65, 64, 17)):
        left = (torch.arange(rows * size, dtype=torch.int64, device="cpu") * 37 % 255 - 127).view(rows, size)
        right = (torch.arange(columns * size, dtype=torch.int64, device="cpu") * 91 % 255 - 127).view(columns, size)
        out = torch.full((rows, columns), 0x55555555, dtype=torch.int32, device="cpu")
        torch._int_mm(left.to(torch.int8), right.to(torch.int8).t(), out=out)
        if not torch.equal(out.long(), (left.unsqueeze(1) * right).sum(2)):
            return False
    return True


def tile_bytes(device: torch.device, workspace_bytes: int) -> int:
    return min(TILE_BYTES["cuda" if device.type == "cuda" else "cpu"], max(workspace_bytes // 2, 1))


def fits_int8(rows: Tensor, workspace_bytes: int) -> bool:
    """Whether int8 codes of the rows are worth making, and have room beside a tile."""
    room = workspace_bytes - tile_bytes(rows.device, workspace_bytes)
    return int8_wins(rows) and rows.numel() <= room


def rounding_of(code: Tensor, size: int) -> float:
    """What a computed product of two codes can be off, over the product of their lengths."""
    own = 1e-6  # of a product that becomes a float32, is scaled, and compared with a bound
    if code.dtype in (torch.int8, torch.float64):
        return own
    if rounds_float32(code.device):
        return own + 2.0**-7 + size * 2.0**-23  # operands rounded to bfloat16
    return own + size * 2.0**-23  # any order of additions, a bit each


@dataclass
class Coded:
    """Rows (R, D), and what stands for them: Coded of csrc/search.h."""

    rows: Tensor  # (R, D), any dtype and strides
    code: Tensor  # (R, D) int8, the rows, or a float copy of them with length one
    scale: Tensor  # (R,) float32
    inner_product: bool
    inverse_norm: Tensor  # (R,) float64
    norm: Tensor | None  # (R,) float32, with inner products
    length: Tensor  # (R,) float32
    error: Tensor  # (R,) float32

    @classmethod
    def of(cls, run: Kernels, rows: Tensor, int8: bool, inner_product: bool = False) -> Coded:
        """Codes made anew."""
        result = cls.unmade(rows, int8, inner_product)
        result.encode(run)
        result.measure(run)
        return result

    @classmethod
    def unmade(cls, rows: Tensor, int8: bool, inner_product: bool = False) -> Coded:
        """Room for codes: int8, or the rows themselves, unless their products would be infinite."""
        code = torch.empty(rows.shape, dtype=torch.int8, device=rows.device) if int8 else rows
        if not int8 and not inner_product:
            longest = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).nan_to_num_(0.0, 0.0)
            if bool((longest > LONGEST).any()):
                code = torch.empty(rows.shape, dtype=compute_dtype(rows), device=rows.device)
        return cls.around(rows, code, rows.new_empty(len(rows), dtype=torch.float32), inner_product)

    @classmethod
    def around(cls, rows: Tensor, code: Tensor, scale: Tensor, inner_product: bool = False) -> Coded:
        """Codes as they are, not measured yet."""
        number, single = len(rows), {"dtype": torch.float32}
        return cls(
            rows, code, scale, inner_product, rows.new_empty(number, dtype=torch.float64),
            rows.new_empty(number, **single) if inner_product else None, rows.new_empty(number, **single),
            rows.new_empty(number, **single),
        )  # fmt: skip

    @property
    def size(self) -> int:
        return self.rows.shape[1]

    def encode(self, run: Kernels, selected: Tensor | None = None) -> None:
        """Makes the codes of selected rows, or all, anew; to be measured afterwards."""
        if self.code.dtype != torch.int8:
            at = slice(None) if selected is None else selected
            if self.code is not self.rows:
                self.code[at], self.scale[at] = unit_rows(self.rows[at], self.code.dtype)[0], 1.0
                return
            norm = torch.linalg.vector_norm(self.rows[at], dim=1, dtype=torch.float64)
            scale = torch.ones_like(norm) if self.inner_product else torch.where(norm > 0, 1.0 / norm, 0.0)
            self.scale[at] = scale.nan_to_num_(0.0, 0.0, 0.0).float()
            return
        run.encode_rows(
            rows=self.rows, selected=selected, inner_product=self.inner_product, code=self.code, scale=self.scale,
            count=len(self.rows) if selected is None else len(selected), size=self.size,
        )  # fmt: skip

    def measure(self, run: Kernels) -> None:
        run.measure_codes(
            rows=self.rows, code=self.code, scale=self.scale, inner_product=self.inner_product,
            rounding=rounding_of(self.code, self.size), inverse_norm=self.inverse_norm, norm=self.norm,
            length=self.length, error=self.error, count=len(self.rows), size=self.size,
        )  # fmt: skip

    def measure_rows(self, run: Kernels, selected: Tensor) -> None:
        """As `measure`, of some rows."""
        part = Coded.around(self.rows[selected], self.code[selected], self.scale[selected], self.inner_product)
        part.measure(run)
        for name in ("inverse_norm", "length", "error", *(("norm",) if self.inner_product else ())):
            getattr(self, name)[selected] = getattr(part, name)

    def operand(self, at: slice | Tensor) -> Tensor:
        """Codes as a matrix product takes them."""
        code = self.code[at]
        return code if code.dtype in (torch.int8, torch.float64) else code.float()

    def largest_error(self) -> Tensor:
        return self.error.max() if len(self.error) else self.error.new_zeros(())

    def arguments(self) -> tuple:
        return self.rows, self.inverse_norm, self.scale, self.norm, self.length, self.error


@dataclass
class Lists:
    """The largest products of every query: Lists of csrc/search.h."""

    candidate: Tensor  # (Q, capacity) int32
    value: Tensor  # (Q, capacity) float32
    ceiling: Tensor  # (Q,) float32

    @classmethod
    def empty(cls, queries: int, capacity: int, device: torch.device) -> Lists:
        result = cls(
            torch.empty(queries, capacity, dtype=torch.int32, device=device),
            torch.empty(queries, capacity, dtype=torch.float32, device=device),
            torch.empty(queries, dtype=torch.float32, device=device),
        )
        result.clear()
        return result

    def clear(self) -> None:
        self.candidate.fill_(-1)
        self.value.fill_(-math.inf)
        self.ceiling.fill_(-math.inf)

    def arguments(self) -> tuple:
        return self.candidate, self.value, self.ceiling


class Search:
    """Queries, references (the same rows in one set), the lists that a sweep fills, and the answers found so far."""

    def __init__(self, run: Kernels, query: Coded, reference: Coded, lists: Lists, number: int, workspace_bytes: int):
        self.run, self.query, self.reference, self.lists = run, query, reference, lists
        self.one_set = query is reference
        queries, device = len(query.rows), query.rows.device
        self.cosine = torch.full((queries, number), -math.inf, dtype=torch.float64, device=device)
        self.index = torch.full((queries, number), -1, dtype=torch.int64, device=device)
        item = max(4, self.reference.operand(slice(0, 0)).element_size())
        largest = max(queries, len(reference.rows))
        self.side = whole_chunk(largest, math.isqrt(tile_bytes(device, workspace_bytes) // item))
        integer = reference.code.dtype == torch.int8
        dtype = torch.int32 if integer else self.reference.operand(slice(0, 0)).dtype
        self.buffer = torch.empty(self.side**2, dtype=dtype, device=device)
        self.multiply = torch._int_mm if integer else torch.mm

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """(L, R) of codes, in a buffer that the next ones overwrite."""
        out = self.buffer[: len(left) * len(right)].view(len(left), len(right))
        if left.shape[1] == 0:
            return out.zero_()
        return self.multiply(left, right.t(), out=out)

    def tile(self, products: Tensor, row_begin: int, column_begin: int, row_place: Tensor | None = None) -> dict:
        return {
            "products": products, "row_place": row_place, "row_begin": row_begin, "row_number": None,
            "column_begin": column_begin, "column_first": 0, "one_set": self.one_set,
        }  # fmt: skip

    def offer(self, tile: dict, to_columns: bool, renewed: Tensor | None = None) -> None:
        lists = self.lists.arguments()
        self.run.offer_tile(
            **tile, row_scale=self.query.scale, column_scale=self.reference.scale, of_rows=lists,
            of_columns=lists if to_columns else None, renewed=renewed,
        )  # fmt: skip

    def sweep(self) -> None:
        """Offers every reference to every query; within one set, over the upper triangle of the products."""
        for column_begin, column_end in chunks(len(self.reference.rows), self.side):
            columns = self.reference.operand(slice(column_begin, column_end))
            for row_begin, row_end in chunks(column_end if self.one_set else len(self.query.rows), self.side):
                products = self.products(self.query.operand(slice(row_begin, row_end)), columns)
                tile = self.tile(products, row_begin, column_begin)
                self.offer(tile, to_columns=self.one_set and row_begin != column_begin)

    def settle(self) -> None:
        """Compares the candidates that may be nearest."""
        self.run.settle_candidates(
            query=self.query.arguments(), reference=self.reference.arguments(), lists=self.lists.arguments(),
            answers=(self.cosine, self.index), reference_place=None, reference_first=0,
            references=len(self.reference.rows), query_first=0, one_set=self.one_set, queries=len(self.query.rows),
            size=self.query.size,
        )  # fmt: skip

    def tolerance(self) -> Tensor:
        """(Q,) float64: a query's answers are certain if all errors of references that are not in its list are smaller."""
        query, ceiling, worst = self.query, self.lists.ceiling.double(), self.cosine[:, -1]
        norm = 1.0 if self.reference.norm is None else self.reference.norm.max()
        room = (worst - ceiling - query.error.double() * norm) / query.length.double()
        settled = (query.error < 0) | (query.inverse_norm == 0) | (ceiling == -math.inf)
        return room.masked_fill_(settled, math.inf)

    def uncertain(self) -> Tensor:
        """Queries whose lists do not prove their answers."""
        return (~(self.tolerance() > self.reference.largest_error())).nonzero().squeeze(1)

    def resolve(self, rows: Tensor, renewed: Tensor | None = None) -> None:
        """Looks at every reference that may be nearest to these queries.

        Renewed (R,) ones have new codes: these are offered to all lists, and looked at for the other answers too.
        """
        answers = self.cosine, self.index
        height = max(1, min(len(rows), self.side))
        width = whole_chunk(len(self.reference.rows), len(self.buffer) // height)  # few rows: fewer, wider tiles
        for places in rows.split(height):
            operand = self.query.operand(places)
            for column_begin, column_end in chunks(len(self.reference.rows), width):
                columns = self.reference.operand(slice(column_begin, column_end))
                tile = self.tile(self.products(operand, columns), 0, column_begin, places)
                self.run.resolve_tile(
                    **tile, query=self.query.arguments(), reference=self.reference.arguments(), of_rows=answers,
                    of_columns=None if renewed is None else answers, renewed=renewed, size=self.query.size,
                )  # fmt: skip
                if renewed is not None:
                    self.offer(tile, to_columns=True, renewed=renewed)

    def answers(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines, or inner products, (Q, k) in `dtype` and the references (Q, k) int64."""
        cosine = self.cosine if self.query.inner_product else self.cosine.clamp(-1.0, 1.0)
        if self.query.size == 1 and not self.query.inner_product:
            cosine = cosine.round()  # -1, 0 or 1, which the products with inverse lengths miss by a bit
        return cosine.to(dtype), self.index.clamp(min=0)


def chunks(count: int, size: int):
    """(begin, end) of parts of so many."""
    return ((begin, min(begin + size, count)) for begin in range(0, count, size))


def capacity_of(number: int, references: int, int8: bool) -> int:
    """Candidates a list holds: enough that few answers stay uncertain, or all there are."""
    wanted = number + (SMALLEST_CHUNK // 4 if int8 else 4)
    return max(1, min(wanted, references))


def exponent_of(rows: Tensor) -> int:
    """Of the largest element of rows (R, D), within what 2.0**-exponent can be. Rows with NaN or infinity stay what they are."""
    largest = torch.linalg.vector_norm(rows, math.inf, dim=1, dtype=torch.float64)
    largest = largest.masked_fill_(~largest.isfinite(), 0.0)
    return max(math.frexp(largest.max().item())[1] - 1, -1000) if len(rows) else 0


def find_nearest(
    run: Kernels, query: Tensor, reference: Tensor | None, number: int, inner_product: bool, workspace_bytes: int
) -> Search:
    """The `number` nearest references of every query, or others of one set, exactly."""
    exponents = (0, 0)
    if inner_product:
        exponents = exponent_of(query), exponent_of(query if reference is None else reference)
    divided = max(map(abs, exponents)) > MOST_EXPONENT
    if divided:
        query = query.double() * 2.0 ** -exponents[0]
        reference = None if reference is None else reference.double() * 2.0 ** -exponents[1]
    rows = query if reference is None else reference
    int8 = fits_int8(rows, workspace_bytes)
    coded = Coded.of(run, query, int8, inner_product)
    others = coded if reference is None else Coded.of(run, reference, int8, inner_product)
    lists = Lists.empty(len(query), capacity_of(number, len(rows), int8), query.device)
    search = Search(run, coded, others, lists, number, workspace_bytes)
    search.sweep()
    search.settle()
    search.resolve(search.uncertain())
    if divided:
        half = sum(exponents) // 2  # the whole power of two can be beyond float64
        search.cosine.mul_(2.0**half).mul_(2.0 ** (sum(exponents) - half))
    return search
