"""Cases, inputs and expected results for the kernels of the search."""

import math
from dataclasses import dataclass

import pytest
import torch

from fused_margin._ops.nearest.quantized import rounding_of

NAN, ZERO = 2, 4  # positions of a row with NaN and of a zero row, where rows are odd
COPIES = (1, 3, 6)  # positions of equal rows


def rows_of(count, size, dtype, odd=False, seed=0):
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if odd:
        rows[list(COPIES)] = rows[COPIES[0]].clone()
        rows[NAN, size - 1], rows[ZERO] = math.nan, 0.0
    return rows.to(dtype)


@dataclass
class Case:
    queries: int
    references: int | None  # None: one set
    size: int
    dtype: torch.dtype
    code: torch.dtype
    k: int
    capacity: int
    inner_product: bool = False
    odd: bool = False

    def __str__(self):
        sets = f"{self.queries} of one set" if self.references is None else f"{self.queries} x {self.references}"
        types = f"{self.dtype} as {self.code}".replace("torch.", "")
        flags = " inner" * self.inner_product + " odd" * self.odd
        return f"{sets}, {self.size} {types}, {self.k} of {self.capacity}{flags}"


f16, f32, f64, i8 = torch.float16, torch.float32, torch.float64, torch.int8

CASES = [
    Case(33, None, 45, f32, i8, 1, 4),
    Case(33, None, 45, f32, i8, 5, 16, odd=True),
    Case(7, 257, 45, f64, f64, 5, 4, odd=True),
    Case(33, 257, 45, f64, i8, 5, 16, inner_product=True),
    Case(257, 7, 5, f16, f32, 1, 16, odd=True),
    Case(257, 33, 45, f16, i8, 1, 4, inner_product=True, odd=True),
    Case(33, 257, 45, f32, f32, 5, 40),
    Case(257, None, 45, f32, f32, 5, 4, odd=True),
    Case(257, None, 5, f64, i8, 1, 4, inner_product=True, odd=True),
    Case(7, None, 5, f32, f32, 5, 16),
]

ALL = pytest.mark.parametrize("case", CASES, ids=str)


def quantized(run, rows, code, inner_product):
    """(rows, inverse_norm, scale, norm, length, error) and the codes, by one backend."""
    count, size = rows.shape
    scale = torch.full((count,), math.nan)
    if code == i8:
        codes = torch.full((count, size), 77, dtype=i8)
        run.quantize_rows(
            rows=rows, selected=None, inner_product=inner_product, codes=codes, scale=scale, count=count, size=size
        )
    else:
        codes = rows.to(code)
        norm = torch.linalg.vector_norm(rows, dim=1, dtype=f64)
        inverse = torch.ones_like(norm) if inner_product else torch.where(norm > 0, 1.0 / norm, 0.0)
        scale = inverse.nan_to_num(0.0, 0.0, 0.0).float()
    inverse_norm = torch.full((count,), -7.0, dtype=f64)
    norm, length, error = torch.full((3, count), -7.0)
    run.measure_quantization(
        rows=rows, codes=codes, scale=scale, inner_product=inner_product, rounding=rounding_of(codes, size),
        inverse_norm=inverse_norm, norm=norm if inner_product else None, length=length, error=error, count=count,
        size=size,
    )  # fmt: skip
    return (rows, inverse_norm, scale, norm if inner_product else None, length, error), codes


def code_products(left, right):
    if left.dtype == i8:
        return (left.int() @ right.int().t()).contiguous()
    return left @ right.t()


def empty_lists(queries, capacity):
    return (
        torch.full((queries, capacity), -1, dtype=torch.int32),
        torch.full((queries, capacity), -math.inf),
        torch.full((queries,), -math.inf),
    )


def empty_nearest(queries, k):
    return torch.full((queries, k), -math.inf, dtype=f64), torch.full((queries, k), -1, dtype=torch.int64)


def tile(scores, row_begin=0, column_begin=0, same_set=False, **options):
    return {
        "scores": scores, "row_index": None, "row_begin": row_begin, "row_id": None,
        "column_begin": column_begin, "column_first_id": 0, "same_set": same_set,
    } | options  # fmt: skip


def same(measured, expected):
    """Assert equality bit for bit, including NaN."""
    for m, e in zip(measured, expected, strict=True):
        torch.testing.assert_close(m, e, rtol=0.0, atol=0.0, equal_nan=True)


class SearchInputs:
    """Quantized queries and references of a case, computed on the CPU as common input for both backends."""

    def __init__(self, case, run, equal_rows=()):
        """equal_rows: pairs (reference, query) of equal rows."""
        self.case, self.same_set = case, case.references is None
        queries = rows = rows_of(case.queries, case.size, case.dtype, case.odd)
        self.query, self.query_code = quantized(run, rows, case.code, case.inner_product)
        self.reference, self.reference_code = self.query, self.query_code
        if not self.same_set:
            rows = rows_of(case.references, case.size, case.dtype, case.odd, seed=1)
            for reference, query in equal_rows:
                rows[reference] = queries[query]
            self.reference, self.reference_code = quantized(run, rows, case.code, case.inner_product)

    def full_search(self, run, capacity=None, chunk=50):
        """Candidates among all references, updated tile by tile as in a search."""
        candidates = empty_lists(self.case.queries, capacity or self.case.capacity)
        for column_begin in range(0, len(self.reference_code), chunk):
            columns = self.reference_code[column_begin : column_begin + chunk]
            last = column_begin + 1 if self.same_set else self.case.queries
            for row_begin in range(0, last, chunk):
                products = code_products(self.query_code[row_begin : row_begin + chunk], columns)
                run.update_candidates(
                    **tile(products, row_begin, column_begin, self.same_set), row_scale=self.query[2],
                    column_scale=self.reference[2], row_candidates=(*candidates, None),
                    column_candidates=(*candidates, None) if self.same_set and row_begin != column_begin else None,
                    refreshed=None,
                )  # fmt: skip
        return candidates

    def rerank(self, run, candidates, nearest=None, **options):
        nearest = nearest or empty_nearest(self.case.queries, self.case.k)
        run.rerank_candidates(
            **{
                "query": self.query, "reference": self.reference, "candidates": (*candidates, None), "nearest": nearest,
                "reference_first_id": 0, "references": len(self.reference_code),
                "query_first_id": 0, "same_set": self.same_set, "queries": self.case.queries, "size": self.case.size,
            }
            | options
        )  # fmt: skip
        return nearest

    def truth(self):
        """The nearest cosines, from full matrices in float64; not for NaN and zero queries."""
        cosine = self.products()
        return cosine.topk(min(self.case.k, cosine.shape[1]), dim=1).values

    def products(self):
        """(Q, R) cosines or inner products; -inf for the row itself and for NaN."""
        rows, others = self.query[0].double(), self.reference[0].double()
        cosine = (rows @ others.t()) * self.query[1].unsqueeze(1) * self.reference[1]
        cosine = torch.where(cosine.isnan(), -math.inf, cosine)
        if self.same_set:
            cosine.fill_diagonal_(-math.inf)
        return cosine
