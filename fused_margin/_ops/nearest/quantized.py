"""Quantized rows, int8 on processors that multiply int8 fastest, and lists of the best candidates of each query.

csrc/kernels/search.h has the bound on the error of quantization, and docs/internals/nearest.md its proof.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_margin._ops.backends.select import Kernels, constant_while_compiled, rounds_float32
from fused_margin._ops.inputs import MIN_CHUNK, compute_dtype
from fused_margin._ops.normalization import unit_rows

# Size of a tile of scores. On the CPU a tile stays in cache while it is read two to four times. On a GPU, the kernels of a
# large tile take longer than their launches.
SCORE_TILE_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
MAX_ORDERED = 24  # capacity of lists in descending order on the CPU: each insertion moves entries
MAX_FLOAT32_LENGTH = 1e18  # maximum length of rows that are multiplied in float32 without normalization
# Torch 2.13 does not write int8 products of rows of one element. Above the last size a product would overflow int32.
INT8_SIZES = range(2, (2**31 - 1) // 127**2 + 1)


def int8_is_fastest(rows: Tensor) -> bool:
    """Whether int8 products are the fastest for these rows: on processors with instructions for them."""
    return rows.shape[1] in INT8_SIZES and _has_int8_products(rows.device)


@constant_while_compiled
def _has_int8_products(device: torch.device) -> bool:
    if device.type != "cpu":
        return False
    names = ("_is_vnni_supported", "_is_avx512_vnni_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names) and int8_products_are_right()


@functools.cache
def int8_products_are_right() -> bool:
    """Whether torch's int8 products, a private function, overwrite memory with the right results."""
    for rows, size, columns in ((1, 2, 1), (3, 7, 65), (65, 64, 17)):
        left = (torch.arange(rows * size, dtype=torch.int64, device="cpu") * 37 % 255 - 127).view(rows, size)
        right = (torch.arange(columns * size, dtype=torch.int64, device="cpu") * 91 % 255 - 127).view(columns, size)
        out = torch.full((rows, columns), 0x55555555, dtype=torch.int32, device="cpu")
        torch._int_mm(left.to(torch.int8), right.to(torch.int8).t(), out=out)
        if not torch.equal(out.long(), (left.unsqueeze(1) * right).sum(2)):
            return False
    return True


def tile_bytes(device: torch.device, workspace_bytes: int) -> int:
    return min(SCORE_TILE_BYTES["cuda" if device.type == "cuda" else "cpu"], max(workspace_bytes // 2, 1))


def uses_int8_codes(rows: Tensor, workspace_bytes: int) -> bool:
    """Whether int8 codes of the rows are fastest, and fit in the workspace together with a tile."""
    available = workspace_bytes - tile_bytes(rows.device, workspace_bytes)
    return int8_is_fastest(rows) and rows.numel() <= available


def rounding_of(codes: Tensor, size: int) -> float:
    """Bound on the error of a computed product of two codes, relative to the product of their lengths."""
    conversion = 1e-6  # of a product to float32, its scaling, and its comparison with a bound
    if codes.dtype in (torch.int8, torch.float64):
        return conversion
    if rounds_float32(codes.device):
        return conversion + 2.0**-7 + size * 2.0**-23  # operands rounded to bfloat16
    return conversion + size * 2.0**-23  # one bit per addition, in any order


@dataclass
class QuantizedRows:
    """Rows (R, D) and their codes, QuantizedRows of csrc/kernels/search.h."""

    rows: Tensor  # (R, D), any dtype and strides
    codes: Tensor  # (R, D) int8, the rows, or a float copy of them with length one
    scale: Tensor  # (R,) float32
    inner_product: bool
    inverse_norm: Tensor  # (R,) float64
    norm: Tensor | None  # (R,) float32, with inner products
    length: Tensor  # (R,) float32
    error: Tensor  # (R,) float32

    @classmethod
    def of(cls, run: Kernels, rows: Tensor, int8: bool, inner_product: bool = False) -> QuantizedRows:
        """Quantizes and measures rows."""
        result = cls.allocate(rows, int8, inner_product)
        result.quantize(run)
        result.measure(run)
        return result

    @classmethod
    def allocate(cls, rows: Tensor, int8: bool, inner_product: bool = False) -> QuantizedRows:
        """Allocates codes. Without int8, the rows are their own codes, unless their products would be infinite."""
        codes = torch.empty(rows.shape, dtype=torch.int8, device=rows.device) if int8 else rows
        if not int8 and not inner_product:
            longest = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).nan_to_num_(0.0, 0.0)
            if bool((longest > MAX_FLOAT32_LENGTH).any()):
                codes = torch.empty(rows.shape, dtype=compute_dtype(rows), device=rows.device)
        return cls.of_codes(rows, codes, rows.new_empty(len(rows), dtype=torch.float32), inner_product)

    @classmethod
    def of_codes(cls, rows: Tensor, codes: Tensor, scale: Tensor, inner_product: bool = False) -> QuantizedRows:
        """Rows with existing codes, not measured yet."""
        single = rows.new_empty(0, dtype=torch.float32)
        return cls(
            rows, codes, scale, inner_product, rows.new_empty(len(rows), dtype=torch.float64),
            single.new_empty(len(rows)) if inner_product else None, single.new_empty(len(rows)),
            single.new_empty(len(rows)),
        )  # fmt: skip

    @property
    def size(self) -> int:
        return self.rows.shape[1]

    def quantize(self, run: Kernels, selected: Tensor | None = None) -> None:
        """Computes the codes of selected rows, or of all rows. `measure` must follow."""
        if self.codes.dtype != torch.int8:
            rows = slice(None) if selected is None else selected
            if self.codes is not self.rows:
                self.codes[rows], self.scale[rows] = unit_rows(self.rows[rows], self.codes.dtype)[0], 1.0
                return
            norm = torch.linalg.vector_norm(self.rows[rows], dim=1, dtype=torch.float64)
            scale = torch.ones_like(norm) if self.inner_product else torch.where(norm > 0, 1.0 / norm, 0.0)
            self.scale[rows] = scale.nan_to_num_(0.0, 0.0, 0.0).float()
            return
        run.quantize_rows(
            rows=self.rows, selected=selected, inner_product=self.inner_product, codes=self.codes, scale=self.scale,
            count=len(self.rows) if selected is None else len(selected), size=self.size,
        )  # fmt: skip

    def measure(self, run: Kernels) -> None:
        """Computes the norm of each row, and its distance to its code."""
        run.measure_quantization(
            rows=self.rows, codes=self.codes, scale=self.scale, inner_product=self.inner_product,
            rounding=rounding_of(self.codes, self.size), inverse_norm=self.inverse_norm, norm=self.norm,
            length=self.length, error=self.error, count=len(self.rows), size=self.size,
        )  # fmt: skip

    def measure_rows(self, run: Kernels, selected: Tensor) -> None:
        """As `measure`, for selected rows."""
        part = QuantizedRows.of_codes(
            self.rows[selected], self.codes[selected], self.scale[selected], self.inner_product
        )
        part.measure(run)
        for name in ("inverse_norm", "length", "error", *(("norm",) if self.inner_product else ())):
            getattr(self, name)[selected] = getattr(part, name)

    def operand(self, selected: slice | Tensor) -> Tensor:
        """Codes as the operand of a matrix product."""
        codes = self.codes[selected]
        return codes if codes.dtype in (torch.int8, torch.float64) else codes.float()

    def largest_error(self) -> Tensor:
        return self.error.max() if len(self.error) else self.error.new_zeros(())

    def arguments(self) -> tuple[Tensor | None, ...]:
        """The fields of the struct that kernels take."""
        return self.rows, self.inverse_norm, self.scale, self.norm, self.length, self.error


@dataclass
class CandidateLists:
    """The candidates with the largest scores of every query, CandidateLists of csrc/kernels/search.h."""

    candidate: Tensor  # (Q, capacity) int32
    value: Tensor  # (Q, capacity) float32
    upper_bound: Tensor  # (Q,) float32, upper bound of the scores that are not in the list
    count: Tensor | None = None  # (Q,) int32, number of entries in any order; None: in descending order

    @classmethod
    def empty(cls, queries: int, capacity: int, device: torch.device, *, ordered: bool = True) -> CandidateLists:
        result = cls(
            torch.empty(queries, capacity, dtype=torch.int32, device=device),
            torch.empty(queries, capacity, dtype=torch.float32, device=device),
            torch.full((queries,), -math.inf, dtype=torch.float32, device=device),
        )
        if ordered:
            result.clear()
        else:
            result.count = torch.zeros(queries, dtype=torch.int32, device=device)
        return result

    def clear(self) -> None:
        """Empties the lists, which must be in descending order."""
        self.candidate.fill_(-1)
        self.value.fill_(-math.inf)
        self.upper_bound.fill_(-math.inf)

    def arguments(self) -> tuple[Tensor | None, ...]:
        """The fields of the struct that kernels take."""
        return self.candidate, self.value, self.upper_bound, self.count

    def packed(self, selected: slice | Tensor) -> Tensor:
        """Lists of some rows as one float64 matrix (R, 1 + 2 capacity), to send to another rank."""
        return torch.cat(
            [
                self.upper_bound[selected].unsqueeze(1).double(),
                self.value[selected].double(),
                self.candidate[selected].double(),
            ],
            1,
        )

    def merge(self, selected: Tensor | slice, parts: Tensor) -> None:
        """Replaces the lists of some rows by the best candidates of packed lists (parts, R, 1 + 2 capacity)."""
        capacity = self.candidate.shape[1]
        upper_bound, value, candidate = parts.split([1, capacity, capacity], dim=2)
        value, candidate = (t.transpose(0, 1).flatten(1) for t in (value, candidate))
        value, order = value.sort(dim=1, descending=True, stable=True)
        candidate = candidate.gather(1, order)
        upper_bound = upper_bound.amax(dim=(0, 2))
        if value.shape[1] > capacity:  # includes the largest omitted candidate
            upper_bound = torch.maximum(upper_bound, value[:, capacity])
        self.candidate[selected] = candidate[:, :capacity].int()
        self.value[selected] = value[:, :capacity].float()
        self.upper_bound[selected] = upper_bound.float()


def capacity_of(number: int, references: int, int8: bool) -> int:
    """Number of candidates in a list: enough for few uncertain answers, at most the number of references.

    Among random directions, the number of references within the error of int8 codes of the k-th nearest grows nearly as k.
    """
    capacity = 3 * number + MIN_CHUNK // 4 - 2 if int8 else number + 4
    return max(1, min(capacity, references))


def search_lists(
    queries: int, number: int, references: int, int8: bool, device: torch.device, workspace_bytes: int
) -> CandidateLists:
    """Empty lists for a search on one rank. On the CPU long lists have no order, which makes insertion faster."""
    capacity = capacity_of(number, references, int8)
    if device.type != "cpu" or capacity <= MAX_ORDERED:
        return CandidateLists.empty(queries, capacity, device)
    available = workspace_bytes // (8 * max(1, queries))  # 8 bytes per entry
    return CandidateLists.empty(queries, max(2 * number, min(2 * capacity, available)), device, ordered=False)
