"""The CUDA kernels of the search, executed by the host emulator, against those of the CPU, one kernel at a time."""

import math
from dataclasses import dataclass

import pytest
import torch
from test_search import training

from fused_margin import _C
from fused_margin._ops.backends.select import Kernels
from fused_margin._ops.nearest import cache, search
from fused_margin._ops.nearest import quantized as quantization
from fused_margin._ops.nearest.quantized import rounding_of
from fused_margin.distributed import Shard

NAN, ZERO = 2, 4  # rows of every set with odd rows
COPIES = (1, 3, 6)  # rows that are equal


@pytest.fixture
def backends(emulated):
    """The kernels of the CPU, whose results are expected, and those of CUDA on the host."""
    return Kernels(_C.cpu, 0), Kernels(emulated.cuda, 0)


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


def multiplied(left, right):
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


def tile(scores, row_begin=0, column_begin=0, one_set=False, **options):
    return {
        "scores": scores, "row_place": None, "row_begin": row_begin, "row_number": None,
        "column_begin": column_begin, "column_first": 0, "one_set": one_set,
    } | options  # fmt: skip


def same(measured, expected):
    """Bit for bit, NaN included."""
    for m, e in zip(measured, expected, strict=True):
        torch.testing.assert_close(m, e, rtol=0.0, atol=0.0, equal_nan=True)


class Sides:
    """Both sides of a case as measured on the CPU: the same input for both backends."""

    def __init__(self, case, run, twins=()):
        """twins: pairs (reference, query) that are equal."""
        self.case, self.one_set = case, case.references is None
        queries = rows = rows_of(case.queries, case.size, case.dtype, case.odd)
        self.query, self.query_code = quantized(run, rows, case.code, case.inner_product)
        self.reference, self.reference_code = self.query, self.query_code
        if not self.one_set:
            rows = rows_of(case.references, case.size, case.dtype, case.odd, seed=1)
            for reference, query in twins:
                rows[reference] = queries[query]
            self.reference, self.reference_code = quantized(run, rows, case.code, case.inner_product)

    def full_search(self, run, capacity=None, chunk=50):
        """Candidates among all references, updated tile by tile as a search does it."""
        candidates = empty_lists(self.case.queries, capacity or self.case.capacity)
        for column_begin in range(0, len(self.reference_code), chunk):
            columns = self.reference_code[column_begin : column_begin + chunk]
            last = column_begin + 1 if self.one_set else self.case.queries
            for row_begin in range(0, last, chunk):
                products = multiplied(self.query_code[row_begin : row_begin + chunk], columns)
                run.update_candidates(
                    **tile(products, row_begin, column_begin, self.one_set), row_scale=self.query[2],
                    column_scale=self.reference[2], row_candidates=candidates,
                    column_candidates=candidates if self.one_set and row_begin != column_begin else None,
                    refreshed=None,
                )  # fmt: skip
        return candidates

    def reranked(self, run, candidates, nearest=None, **options):
        nearest = nearest or empty_nearest(self.case.queries, self.case.k)
        run.rerank_candidates(
            **{
                "query": self.query, "reference": self.reference, "candidates": candidates, "nearest": nearest,
                "reference_first": 0, "references": len(self.reference_code),
                "query_first": 0, "one_set": self.one_set, "queries": self.case.queries, "size": self.case.size,
            }
            | options
        )  # fmt: skip
        return nearest

    def truth(self):
        """The nearest cosines, from whole matrices in float64; not for NaN and zero queries."""
        cosine = self.products()
        return cosine.topk(min(self.case.k, cosine.shape[1]), dim=1).values

    def products(self):
        """(Q, R) cosines or inner products; -inf with the row itself and with NaN."""
        rows, others = self.query[0].double(), self.reference[0].double()
        cosine = (rows @ others.t()) * self.query[1].unsqueeze(1) * self.reference[1]
        cosine = torch.where(cosine.isnan(), -math.inf, cosine)
        if self.one_set:
            cosine.fill_diagonal_(-math.inf)
        return cosine


@ALL
def test_codes_and_their_errors(backends, case):
    rows = rows_of(case.queries, case.size, case.dtype, case.odd)
    if case.size == 45:
        rows = rows.t().contiguous().t()  # any strides
    (expected, codes), (measured, measured_codes) = (
        quantized(run, rows, case.code, case.inner_product) for run in backends
    )
    difference = measured_codes.double() - codes.double()
    if case.code == i8:  # a number halfway between two codes may round either way
        assert difference.abs().max() <= 1 and (difference != 0).sum() <= 2
        assert codes.abs().max() == 127
    for m, e in zip(measured[1:], expected[1:], strict=True):
        if e is not None:
            torch.testing.assert_close(m, e, rtol=1e-12 if e.dtype == f64 else 1e-5, atol=1e-9, equal_nan=True)
    for _, inverse_norm, scale, norm, length, error in (measured, expected):
        exact = rows.double() * inverse_norm.unsqueeze(1)
        q = measured_codes.double() * scale.double().unsqueeze(1)
        known = error >= 0
        assert known.tolist() == (~rows.isnan().any(1)).tolist() and (error[~known] == -1).all()
        if measured_codes.dtype != i8 or not difference.any():
            assert ((exact - q).norm(dim=1) <= error.double())[known].all()
        assert (q.norm(dim=1) <= length.double())[known].all()
        if norm is not None:
            assert (rows.double().norm(dim=1) <= norm.double())[known].all()
    if case.odd and case.code == i8:
        assert not codes[[NAN, ZERO]].any() and not measured_codes[[NAN, ZERO]].any()


def test_codes_of_selected_rows(backends):
    rows = rows_of(33, 45, f32)
    selected = torch.tensor([31, 4, 0])
    results = []
    for run in backends:
        code, scale = torch.full((33, 45), 77, dtype=i8), torch.full((33,), -1.0)
        run.quantize_rows(rows=rows, selected=selected, inner_product=False, codes=code, scale=scale, count=3, size=45)
        results.append((code.double(), scale))
    (code, scale), (measured_code, measured_scale) = results
    assert (code - measured_code).abs().max() <= 1 and (code != measured_code).sum() <= 1
    torch.testing.assert_close(measured_scale, scale, rtol=1e-6, atol=0.0)
    others = [r for r in range(33) if r not in selected]
    assert (measured_code[others] == 77).all() and (measured_scale[others] == -1).all()


def test_codes_that_are_too_small_or_too_large_to_scale(backends):
    for dtype, sizes in ((f32, (1e-40, 1e38)), (f64, (1e-300, 1e200)), (f32, (math.inf, -math.inf))):
        for inner_product in (False, True):
            rows = rows_of(7, 5, f64)
            rows[1:3] = torch.tensor(sizes, dtype=f64).unsqueeze(1)
            (expected, codes), (measured, measured_codes) = (
                quantized(run, rows.to(dtype), i8, inner_product) for run in backends
            )
            assert (codes.int() - measured_codes.int()).abs().max() <= 1
            for m, e in zip(measured[1:], expected[1:], strict=True):
                if e is not None:
                    torch.testing.assert_close(m, e, rtol=1e-5, atol=0.0, equal_nan=True)


@ALL
def test_lists(backends, case):
    sides = Sides(case, backends[0])
    expected, measured = (sides.full_search(run) for run in backends)
    same(measured, expected)
    candidate, value, upper_bound = measured
    assert (value.diff(dim=1).nan_to_num(0.0, -math.inf, -math.inf) <= 0).all()
    others = len(sides.reference_code) - sides.one_set
    filled = (candidate >= 0).sum(1)
    if not case.odd:
        assert (filled == min(case.capacity, others)).all()
        assert torch.equal(upper_bound > -math.inf, filled < others)
    assert not sides.one_set or not (candidate == torch.arange(case.queries).unsqueeze(1)).any()


def test_lists_of_columns_in_two_sets_by_number_and_place(backends):
    """Rows with any places and numbers; columns whose numbers begin anywhere; some of them refreshed."""
    place = torch.randperm(33)[:21]
    sides = Sides(Case(33, 257, 45, f32, i8, 1, 16), backends[0], twins=[(60, place[3])])
    number, refreshed = torch.randperm(400)[:21] + 30, torch.rand(257) < 0.3
    number[3], refreshed[60] = 1060, False  # is one of the columns
    products = multiplied(sides.query_code[place], sides.reference_code[40:200])
    for one_set in (False, True):
        results = []
        for run in backends:
            row_candidates, column_candidates = empty_lists(33, 4), empty_lists(257, 5)
            run.update_candidates(
                **tile(products, 0, 40, one_set, row_place=place, row_number=number, column_first=1000),
                row_scale=sides.query[2], column_scale=sides.reference[2], row_candidates=row_candidates,
                column_candidates=column_candidates,
                refreshed=refreshed,
            )  # fmt: skip
            results.append((*row_candidates, *column_candidates))
        expected, measured = results
        same(measured, expected)
        assert (measured[0][place] >= 1040).all() and (measured[3][refreshed] == -1).all()
        assert torch.equal(
            (measured[3] >= 0).any(1).nonzero().squeeze(1), (~refreshed[40:200]).nonzero().squeeze(1) + 40
        )
        taken = (measured[0][place[3]] == 1060).any(), (measured[3][60] == 1060).any()
        assert taken == (not one_set, not one_set)


def test_lists_of_equal_products(backends):
    """The first of equals stay, and no product outside a list exceeds its upper bound."""
    products = torch.randint(-3, 4, (33, 70), dtype=torch.int32)
    results = []
    for run in backends:
        row_candidates, column_candidates = empty_lists(33, 4), empty_lists(70, 40)
        run.update_candidates(
            **tile(products), row_scale=torch.ones(33), column_scale=torch.ones(70), row_candidates=row_candidates,
            column_candidates=column_candidates, refreshed=None,
        )  # fmt: skip
        results.append((*row_candidates, *column_candidates))
    same(results[1], results[0])
    value, first = products.sort(dim=1, descending=True, stable=True)
    assert torch.equal(results[1][0], first[:, :4].int()) and torch.equal(results[1][1], value[:, :4].float())
    assert torch.equal(results[1][2], value[:, 4].float())


def test_lists_in_ascending_order(backends):
    """Every product is the largest so far, and moves the whole list."""
    products = torch.arange(33 * 257, dtype=f64).view(33, 257)
    for capacity in (1, 31, 32, 33, 64, 65, 300):
        results = []
        for run in backends:
            candidates = empty_lists(33, capacity)
            run.update_candidates(
                **tile(products), row_scale=torch.ones(33), column_scale=torch.ones(257), row_candidates=candidates,
                column_candidates=None, refreshed=None,
            )  # fmt: skip
            results.append(candidates)
        same(results[1], results[0])
        count = min(capacity, 257)
        assert torch.equal(results[1][0][:, :count], torch.arange(256, 256 - count, -1).int().expand(33, count))


@pytest.mark.parametrize("capacity", [4, 16, 40, 70])
def test_removing_refreshed_rows_and_updating_again(backends, capacity):
    sides = Sides(Case(257, None, 45, f32, i8, 1, capacity), backends[0])
    for share in (0.0, 0.05, 0.5, 1.0):
        refreshed = torch.rand(257) < share
        results = []
        for run in backends:
            candidates = sides.full_search(backends[0])
            candidates[0][3, capacity // 2 :], candidates[1][3, capacity // 2 :] = -1, -math.inf  # not a full list
            before = [t.clone() for t in candidates]
            run.remove_refreshed(
                candidates=candidates, refreshed_rows=refreshed, refreshed_candidates=refreshed, count=257
            )
            removed = [t.clone() for t in candidates]
            # a list with empty places takes only products above its upper bound
            products = multiplied(sides.query_code, sides.reference_code[refreshed])
            if refreshed.any():
                scale = sides.reference[2][refreshed]
                run.update_candidates(
                    **tile(products), row_scale=sides.query[2], column_scale=scale, row_candidates=candidates,
                    column_candidates=None,
                    refreshed=None,
                )  # fmt: skip
            results.append((*removed, *candidates))
        same(results[1], results[0])
        candidate, value, upper_bound = results[1][:3]
        assert not refreshed[candidate[candidate >= 0].long()].any()
        assert (candidate[refreshed] == -1).all()
        lowered = before[2] - 0.25 * (before[1][:, 0] - before[2])
        assert torch.equal(upper_bound[refreshed], lowered[refreshed]) and torch.equal(
            upper_bound[~refreshed], before[2][~refreshed]
        )
        assert torch.equal(value == -math.inf, candidate == -1)


def compare_nearest(measured, expected):
    """Cosines up to rounding, because the sums have another order; equal indices."""
    torch.testing.assert_close(measured[0], expected[0], rtol=1e-13, atol=1e-13, equal_nan=True)
    assert torch.equal(measured[1], expected[1])


@ALL
def test_reranking_then_exact_search(backends, case):
    sides = Sides(case, backends[0])
    candidates = sides.full_search(backends[0])
    results = []
    for run in backends:
        cosine, index = sides.reranked(run, candidates)
        result = [cosine.clone(), index.clone()]
        for begin in range(0, len(sides.reference_code), 50):
            products = multiplied(sides.query_code, sides.reference_code[begin : begin + 50])
            run.search_exact(
                **tile(products, 0, begin, sides.one_set), query=sides.query, reference=sides.reference,
                row_nearest=(cosine, index), column_nearest=None,
                refreshed=None, size=case.size,
            )  # fmt: skip
        results.append((result, (cosine, index)))
    (expected, expected_whole), (measured, measured_whole) = results
    compare_nearest(measured, expected)
    compare_nearest(measured_whole, expected_whole)

    usual = torch.ones(case.queries, dtype=torch.bool)
    if case.odd:
        usual[[NAN, ZERO]] = False
        assert measured[0][NAN].isnan().all() and (measured[0][ZERO] == 0).all()
        first = [r for r in range(9) if not sides.one_set or r != NAN][: case.k]
        assert measured[1][NAN].tolist() == first
        first = [r for r in range(9) if r != NAN and not (sides.one_set and r == ZERO)][: case.k]
        assert measured[1][ZERO].tolist() == first
    truth = sides.truth()[usual]
    found = measured_whole[0][usual][:, : truth.shape[1]]
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


def test_equals_have_the_lower_index_and_no_index_comes_twice(backends):
    rows = rows_of(40, 8, f32)
    rows[[5, 9, 30, 33]] = rows[2].clone()
    case = Case(40, None, 8, f32, i8, 3, 16)
    for run in backends:
        sides = Sides(case, backends[0])
        sides.query, sides.query_code = quantized(backends[0], rows, i8, False)
        sides.reference, sides.reference_code = sides.query, sides.query_code
        candidates = sides.full_search(backends[0], capacity=16)
        cosine, index = sides.reranked(run, candidates)
        order = torch.arange(39, -1, -1)  # the places of the rows are not their order in the tile
        for _ in range(2):
            sides.reranked(run, candidates, (cosine, index))
            run.search_exact(
                **tile(multiplied(sides.query_code[order], sides.reference_code), one_set=True, row_place=order),
                query=sides.query, reference=sides.reference, row_nearest=(cosine, index), column_nearest=None,
                refreshed=None, size=8,
            )  # fmt: skip
        assert index[2].tolist() == [5, 9, 30] and index[33].tolist() == [2, 5, 9]
        assert index[9].tolist() == [2, 5, 30] and (cosine[9] == cosine[9, 0]).all()
        assert all(len(set(i)) == 3 for i in index.tolist())


def test_nearest_among_a_part_of_the_references(backends):
    """As divided among ranks: references from any number on; earlier results stay if they are better."""
    sides = Sides(Case(33, 257, 45, f32, f32, 5, 16), backends[0])
    candidates = sides.full_search(backends[0])
    parts = [tuple(t if t is None else t[begin:end] for t in sides.reference) for begin, end in ((100, 180), (10, 150))]
    results = []
    for run in backends:
        first = sides.reranked(run, candidates, reference=parts[0], reference_first=100, references=80)
        before = [t.clone() for t in first]
        second = sides.reranked(run, candidates, first, reference=parts[1], reference_first=10, references=140)
        results.append((before, second))
    compare_nearest(results[1][0], results[0][0])
    compare_nearest(results[1][1], results[0][1])
    index = results[1][0][1]
    assert ((index == -1) | ((index >= 100) & (index < 180))).all() and (index >= 0).any()


def test_exact_search_of_numbered_rows(backends):
    """Rows with places and numbers, some of which are numbers of columns; into results that are not empty."""
    place, number = torch.randperm(33)[:21], torch.randperm(300)[:21] + 1500
    columns = (10, 55, 100, 119)
    number[:4] = torch.tensor(columns) + 500
    sides = Sides(Case(33, 257, 45, f64, i8, 5, 4), backends[0], twins=zip(columns, place, strict=False))
    products = multiplied(sides.query_code[place], sides.reference_code[7:120])
    results = []
    for run in backends:
        cosine, index = empty_nearest(33, 5)
        cosine[:, 0], index[:, 0] = torch.linspace(0.0, 0.9, 33, dtype=f64), 3
        run.search_exact(
            **tile(products, 0, 7, True, row_place=place, row_number=number, column_first=500), query=sides.query,
            reference=sides.reference, row_nearest=(cosine, index), column_nearest=None,
                refreshed=None, size=45,
        )  # fmt: skip
        results.append((cosine, index))
    compare_nearest(results[1], results[0])
    cosine, index = results[1]
    assert not (index[place] == number.unsqueeze(1)).any() and (index[place] >= 0).all()
    untouched = torch.ones(33, dtype=torch.bool).index_fill_(0, place, False)
    assert (index[untouched, 1:] == -1).all()


@ALL
def test_exact_search_of_columns(backends, case):
    """The nearest of columns that are not refreshed are those of the rows of the transposed tile."""
    sides = Sides(case, backends[0])
    columns, k = len(sides.reference_code), case.k
    refreshed = torch.rand(columns) < 0.2
    place = torch.randperm(case.queries)[: case.queries // 2 + 1]
    products = multiplied(sides.query_code[place], sides.reference_code)
    results = []
    for run in backends:
        nearest = empty_nearest(columns, k)
        run.search_exact(
            **tile(products, one_set=sides.one_set, row_place=place), query=sides.query, reference=sides.reference,
            row_nearest=None, column_nearest=nearest, refreshed=refreshed, size=case.size,
        )  # fmt: skip
        results.append(nearest)
    compare_nearest(results[1], results[0])
    cosine, index = results[1]
    rows, _, *_, error = sides.reference
    usual = ~refreshed & (error >= 0) & (rows.double().norm(dim=1) > 0)
    assert (index[~usual] == -1).all()
    among = torch.full((case.queries,), -math.inf, dtype=f64).index_fill_(0, place, 0.0).unsqueeze(1)
    truth = sides.products() + among
    found = cosine[usual]
    expected = torch.cat([truth, truth.new_full((k, columns), -math.inf)]).topk(k, dim=0).values.t()[usual]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inner_product", [False, True], ids=["cosine", "inner product"])
@pytest.mark.parametrize("side", ["query", "reference"])
def test_codes_of_rows_that_have_moved(backends, side, inner_product):
    """Large errors: without their whole bound some of the nearest would not be compared."""
    case = Case(33, 257, 45, f32, i8, 3, 16, inner_product)
    sides = Sides(case, backends[0])
    rows, _, scale, norm, length, error = getattr(sides, side)
    moved, inverse_norm = rows + 0.5 * rows_of(*rows.shape, f32, seed=2), torch.empty(len(rows), dtype=f64)
    backends[0].measure_quantization(
        rows=moved, codes=getattr(sides, side + "_code"), scale=scale, inner_product=inner_product, rounding=1e-6,
        inverse_norm=inverse_norm, norm=norm, length=length, error=error, count=len(rows), size=45,
    )  # fmt: skip
    assert error.min() > 0.2
    setattr(sides, side, (moved, inverse_norm, scale, norm, length, error))
    candidates = sides.full_search(backends[0])
    products = multiplied(sides.query_code, sides.reference_code)
    results = []
    for run in backends:
        reranked = sides.reranked(run, candidates)
        cosine, index = empty_nearest(33, 3)
        run.search_exact(
            **tile(products),
            query=sides.query,
            reference=sides.reference,
            row_nearest=(cosine, index),
            column_nearest=None,
            refreshed=None,
            size=45,
        )
        results.append((reranked, (cosine, index)))
    for measured, expected in zip(results[1], results[0], strict=True):
        compare_nearest(measured, expected)
    torch.testing.assert_close(results[1][1][0], sides.truth(), rtol=1e-12, atol=1e-12)


def test_no_rows_at_all(backends):
    sides = Sides(Case(7, 33, 5, f32, f32, 1, 4), backends[0])
    for run in backends:
        candidates, nearest = empty_lists(7, 4), empty_nearest(7, 1)
        products = torch.empty(7, 0)
        run.update_candidates(
            **tile(products), row_scale=sides.query[2], column_scale=sides.reference[2], row_candidates=candidates,
            column_candidates=None,
            refreshed=None,
        )  # fmt: skip
        run.search_exact(
            **tile(products),
            query=sides.query,
            reference=sides.reference,
            row_nearest=nearest,
            column_nearest=nearest,
            refreshed=None,
            size=5,
        )
        same((*candidates, *nearest), (*empty_lists(7, 4), *empty_nearest(7, 1)))


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "float"])
def test_certified_refresh(backends, monkeypatch, int8):
    """All kernels together, step by step: the bits of a full search by the same kernels, and the classes of the CPU."""
    for module in (quantization, cache):
        monkeypatch.setattr(module, "int8_wins", lambda device: int8)
    cpu, cuda = backends
    state = None
    for step, weight in training(64, 12, 8):
        if step == 4:
            weight[7], weight[8], weight[9] = math.nan, 0.0, weight[3].clone()
        state = state or cache.new_cache(weight, len(weight))
        found = cache.certified_nearest(cuda, Shard(len(weight)), weight, state, 1 << 20)
        same(found, (t.squeeze(1) for t in search.find_nearest(cuda, weight, None, 1, False, 1 << 20).answers(f64)))
        expected = search.find_nearest(cpu, weight, None, 1, False, 1 << 20).answers(f64)
        compare_nearest(found, [t.squeeze(1) for t in expected])
    assert state.swept[1] > state.swept[0]
