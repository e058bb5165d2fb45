"""The CUDA kernels of the search after the candidate lists, executed by the host emulator, against the CPU."""

import math

import pytest
import torch
from test_search import training

from emulation.search_inputs import (
    ALL,
    NAN,
    ZERO,
    Case,
    SearchInputs,
    code_products,
    empty_lists,
    empty_nearest,
    f32,
    f64,
    i8,
    quantized,
    rows_of,
    same,
    tile,
)
from fused_margin._ops.nearest import cache, search
from fused_margin._ops.nearest import quantized as quantization
from fused_margin.distributed import Shard

pytestmark = pytest.mark.slow  # compiles the CUDA kernels for the host


def compare_nearest(measured, expected):
    """Compare indices exactly and cosines up to rounding, because sums have another order."""
    torch.testing.assert_close(measured[0], expected[0], rtol=1e-13, atol=1e-13, equal_nan=True)
    assert torch.equal(measured[1], expected[1])


@ALL
def test_reranking_then_exact_search(backends, case):
    inputs = SearchInputs(case, backends[0])
    candidates = inputs.full_search(backends[0])
    results = []
    for run in backends:
        cosine, index = inputs.rerank(run, candidates)
        result = [cosine.clone(), index.clone()]
        for begin in range(0, len(inputs.reference_code), 50):
            products = code_products(inputs.query_code, inputs.reference_code[begin : begin + 50])
            run.search_exact(
                **tile(products, 0, begin, inputs.same_set), query=inputs.query, reference=inputs.reference,
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
        first = [r for r in range(9) if not inputs.same_set or r != NAN][: case.k]
        assert measured[1][NAN].tolist() == first
        first = [r for r in range(9) if r != NAN and not (inputs.same_set and r == ZERO)][: case.k]
        assert measured[1][ZERO].tolist() == first
    truth = inputs.truth()[usual]
    actual = measured_whole[0][usual][:, : truth.shape[1]]
    torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)


def test_ties_have_the_lower_index_and_indices_are_unique(backends):
    rows = rows_of(40, 8, f32)
    rows[[5, 9, 30, 33]] = rows[2].clone()
    case = Case(40, None, 8, f32, i8, 3, 16)
    for run in backends:
        inputs = SearchInputs(case, backends[0])
        inputs.query, inputs.query_code = quantized(backends[0], rows, i8, False)
        inputs.reference, inputs.reference_code = inputs.query, inputs.query_code
        candidates = inputs.full_search(backends[0], capacity=16)
        cosine, index = inputs.rerank(run, candidates)
        order = torch.arange(39, -1, -1)  # the places of the rows differ from their order in the tile
        for _ in range(2):
            inputs.rerank(run, candidates, (cosine, index))
            run.search_exact(
                **tile(code_products(inputs.query_code[order], inputs.reference_code), same_set=True, row_index=order),
                query=inputs.query, reference=inputs.reference, row_nearest=(cosine, index), column_nearest=None,
                refreshed=None, size=8,
            )  # fmt: skip
        assert index[2].tolist() == [5, 9, 30] and index[33].tolist() == [2, 5, 9]
        assert index[9].tolist() == [2, 5, 30] and (cosine[9] == cosine[9, 0]).all()
        assert all(len(set(i)) == 3 for i in index.tolist())


def test_nearest_among_part_of_the_references(backends):
    """As for a rank: reference numbers have an offset; earlier results remain if they are better."""
    inputs = SearchInputs(Case(33, 257, 45, f32, f32, 5, 16), backends[0])
    candidates = inputs.full_search(backends[0])
    parts = [
        tuple(t if t is None else t[begin:end] for t in inputs.reference) for begin, end in ((100, 180), (10, 150))
    ]
    results = []
    for run in backends:
        first = inputs.rerank(run, candidates, reference=parts[0], reference_first_id=100, references=80)
        before = [t.clone() for t in first]
        second = inputs.rerank(run, candidates, first, reference=parts[1], reference_first_id=10, references=140)
        results.append((before, second))
    compare_nearest(results[1][0], results[0][0])
    compare_nearest(results[1][1], results[0][1])
    index = results[1][0][1]
    assert ((index == -1) | ((index >= 100) & (index < 180))).all() and (index >= 0).any()


def test_exact_search_of_numbered_rows(backends):
    """Rows have places and numbers, some of them numbers of columns; results are not empty before."""
    place, number = torch.randperm(33)[:21], torch.randperm(300)[:21] + 1500
    columns = (10, 55, 100, 119)
    number[:4] = torch.tensor(columns) + 500
    inputs = SearchInputs(Case(33, 257, 45, f64, i8, 5, 4), backends[0], equal_rows=zip(columns, place, strict=False))
    products = code_products(inputs.query_code[place], inputs.reference_code[7:120])
    results = []
    for run in backends:
        cosine, index = empty_nearest(33, 5)
        cosine[:, 0], index[:, 0] = torch.linspace(0.0, 0.9, 33, dtype=f64), 3
        run.search_exact(
            **tile(products, 0, 7, True, row_index=place, row_id=number, column_first_id=500), query=inputs.query,
            reference=inputs.reference, row_nearest=(cosine, index), column_nearest=None,
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
    """The nearest of columns that are not refreshed equal those of the rows of the transposed tile."""
    inputs = SearchInputs(case, backends[0])
    columns, k = len(inputs.reference_code), case.k
    refreshed = torch.rand(columns) < 0.2
    place = torch.randperm(case.queries)[: case.queries // 2 + 1]
    products = code_products(inputs.query_code[place], inputs.reference_code)
    results = []
    for run in backends:
        nearest = empty_nearest(columns, k)
        run.search_exact(
            **tile(products, same_set=inputs.same_set, row_index=place), query=inputs.query, reference=inputs.reference,
            row_nearest=None, column_nearest=nearest, refreshed=refreshed, size=case.size,
        )  # fmt: skip
        results.append(nearest)
    compare_nearest(results[1], results[0])
    cosine, index = results[1]
    rows, _, *_, error = inputs.reference
    usual = ~refreshed & (error >= 0) & (rows.double().norm(dim=1) > 0)
    assert (index[~usual] == -1).all()
    among = torch.full((case.queries,), -math.inf, dtype=f64).index_fill_(0, place, 0.0).unsqueeze(1)
    truth = inputs.products() + among
    actual = cosine[usual]
    expected = torch.cat([truth, truth.new_full((k, columns), -math.inf)]).topk(k, dim=0).values.t()[usual]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inner_product", [False, True], ids=["cosine", "inner product"])
@pytest.mark.parametrize("side", ["query", "reference"])
def test_stale_codes(backends, side, inner_product):
    """Errors are large: a smaller bound would skip some of the nearest rows."""
    case = Case(33, 257, 45, f32, i8, 3, 16, inner_product)
    inputs = SearchInputs(case, backends[0])
    rows, _, scale, norm, length, error = getattr(inputs, side)
    moved, inverse_norm = rows + 0.5 * rows_of(*rows.shape, f32, seed=2), torch.empty(len(rows), dtype=f64)
    backends[0].measure_quantization(
        rows=moved, codes=getattr(inputs, side + "_code"), scale=scale, inner_product=inner_product, rounding=1e-6,
        inverse_norm=inverse_norm, norm=norm, length=length, error=error, count=len(rows), size=45,
    )  # fmt: skip
    assert error.min() > 0.2
    setattr(inputs, side, (moved, inverse_norm, scale, norm, length, error))
    candidates = inputs.full_search(backends[0])
    products = code_products(inputs.query_code, inputs.reference_code)
    results = []
    for run in backends:
        reranked = inputs.rerank(run, candidates)
        cosine, index = empty_nearest(33, 3)
        run.search_exact(
            **tile(products),
            query=inputs.query,
            reference=inputs.reference,
            row_nearest=(cosine, index),
            column_nearest=None,
            refreshed=None,
            size=45,
        )
        results.append((reranked, (cosine, index)))
    for measured, expected in zip(results[1], results[0], strict=True):
        compare_nearest(measured, expected)
    torch.testing.assert_close(results[1][1][0], inputs.truth(), rtol=1e-12, atol=1e-12)


def test_empty_tiles(backends):
    inputs = SearchInputs(Case(7, 33, 5, f32, f32, 1, 4), backends[0])
    for run in backends:
        candidates, nearest = empty_lists(7, 4), empty_nearest(7, 1)
        products = torch.empty(7, 0)
        run.update_candidates(
            **tile(products), row_scale=inputs.query[2], column_scale=inputs.reference[2], row_candidates=(*candidates, None),
            column_candidates=None,
            refreshed=None,
        )  # fmt: skip
        run.search_exact(
            **tile(products),
            query=inputs.query,
            reference=inputs.reference,
            row_nearest=nearest,
            column_nearest=nearest,
            refreshed=None,
            size=5,
        )
        same((*candidates, *nearest), (*empty_lists(7, 4), *empty_nearest(7, 1)))


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "float"])
def test_certified_refresh(backends, monkeypatch, int8):
    """All kernels together: each step equals a full search bit for bit, and the CPU finds the same classes."""
    for module in (quantization, cache):
        monkeypatch.setattr(module, "int8_is_fastest", lambda device: int8)
    cpu, cuda = backends
    state = None
    for step, weight in training(64, 12, 8):
        if step == 4:
            weight[7], weight[8], weight[9] = math.nan, 0.0, weight[3].clone()
        state = state or cache.new_cache(weight, len(weight))
        actual = cache.certified_nearest(cuda, Shard(len(weight)), weight, state, 1 << 20)
        same(actual, (t.squeeze(1) for t in search.find_nearest(cuda, weight, None, 1, False, 1 << 20).answers(f64)))
        expected = search.find_nearest(cpu, weight, None, 1, False, 1 << 20).answers(f64)
        compare_nearest(actual, [t.squeeze(1) for t in expected])
    assert state.swept[1] > state.swept[0]
