"""The CUDA kernels that quantize rows and update candidate lists, executed by the host emulator, against the CPU."""

import math

import pytest
import torch

from emulation.search_inputs import (
    ALL,
    NAN,
    ZERO,
    Case,
    SearchInputs,
    code_products,
    empty_lists,
    f32,
    f64,
    i8,
    quantized,
    rows_of,
    same,
    tile,
)

pytestmark = pytest.mark.slow  # compiles the CUDA kernels for the host


@ALL
def test_codes_and_their_errors(backends, case):
    rows = rows_of(case.queries, case.size, case.dtype, case.odd)
    if case.size == 45:
        rows = rows.t().contiguous().t()  # any strides
    (expected, codes), (measured, measured_codes) = (
        quantized(run, rows, case.code, case.inner_product) for run in backends
    )
    difference = measured_codes.double() - codes.double()
    if case.code == i8:  # a value halfway between two codes may be rounded to either
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


def test_codes_of_rows_too_small_or_too_large_to_scale(backends):
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
def test_candidate_lists(backends, case):
    inputs = SearchInputs(case, backends[0])
    expected, measured = (inputs.full_search(run) for run in backends)
    same(measured, expected)
    candidate, value, upper_bound = measured
    assert (value.diff(dim=1).nan_to_num(0.0, -math.inf, -math.inf) <= 0).all()
    others = len(inputs.reference_code) - inputs.same_set
    filled = (candidate >= 0).sum(1)
    if not case.odd:
        assert (filled == min(case.capacity, others)).all()
        assert torch.equal(upper_bound > -math.inf, filled < others)
    assert not inputs.same_set or not (candidate == torch.arange(case.queries).unsqueeze(1)).any()


def test_candidate_lists_with_row_numbers_and_places(backends):
    """Rows have arbitrary places and numbers; column numbers have an offset; some columns are refreshed."""
    place = torch.randperm(33)[:21]
    inputs = SearchInputs(Case(33, 257, 45, f32, i8, 1, 16), backends[0], equal_rows=[(60, place[3])])
    number, refreshed = torch.randperm(400)[:21] + 30, torch.rand(257) < 0.3
    number[3], refreshed[60] = 1060, False  # is one of the columns
    products = code_products(inputs.query_code[place], inputs.reference_code[40:200])
    for same_set in (False, True):
        results = []
        for run in backends:
            row_candidates, column_candidates = empty_lists(33, 4), empty_lists(257, 5)
            run.update_candidates(
                **tile(products, 0, 40, same_set, row_index=place, row_id=number, column_first_id=1000),
                row_scale=inputs.query[2], column_scale=inputs.reference[2], row_candidates=(*row_candidates, None),
                column_candidates=(*column_candidates, None),
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
        assert taken == (not same_set, not same_set)


def test_candidate_lists_of_equal_products(backends):
    """Of equal products the first remain, and no product outside a list exceeds its upper bound."""
    products = torch.randint(-3, 4, (33, 70), dtype=torch.int32)
    results = []
    for run in backends:
        row_candidates, column_candidates = empty_lists(33, 4), empty_lists(70, 40)
        run.update_candidates(
            **tile(products), row_scale=torch.ones(33), column_scale=torch.ones(70), row_candidates=(*row_candidates, None),
            column_candidates=(*column_candidates, None), refreshed=None,
        )  # fmt: skip
        results.append((*row_candidates, *column_candidates))
    same(results[1], results[0])
    value, first = products.sort(dim=1, descending=True, stable=True)
    assert torch.equal(results[1][0], first[:, :4].int()) and torch.equal(results[1][1], value[:, :4].float())
    assert torch.equal(results[1][2], value[:, 4].float())


def test_candidate_lists_of_ascending_products(backends):
    """Every product is the largest so far, and shifts the full list."""
    products = torch.arange(33 * 257, dtype=f64).view(33, 257)
    for capacity in (1, 31, 32, 33, 64, 65, 300):
        results = []
        for run in backends:
            candidates = empty_lists(33, capacity)
            run.update_candidates(
                **tile(products), row_scale=torch.ones(33), column_scale=torch.ones(257), row_candidates=(*candidates, None),
                column_candidates=None, refreshed=None,
            )  # fmt: skip
            results.append(candidates)
        same(results[1], results[0])
        count = min(capacity, 257)
        assert torch.equal(results[1][0][:, :count], torch.arange(256, 256 - count, -1).int().expand(33, count))


@pytest.mark.parametrize("capacity", [4, 16, 40, 70])
def test_removing_refreshed_rows_and_updating_again(backends, capacity):
    inputs = SearchInputs(Case(257, None, 45, f32, i8, 1, capacity), backends[0])
    for share in (0.0, 0.05, 0.5, 1.0):
        refreshed = torch.rand(257) < share
        results = []
        for run in backends:
            candidates = inputs.full_search(backends[0])
            candidates[0][3, capacity // 2 :], candidates[1][3, capacity // 2 :] = -1, -math.inf  # not a full list
            before = [t.clone() for t in candidates]
            run.remove_refreshed(
                candidates=(*candidates, None), refreshed_rows=refreshed, refreshed_candidates=refreshed, count=257
            )
            removed = [t.clone() for t in candidates]
            # a list with empty places accepts only products above its upper bound
            products = code_products(inputs.query_code, inputs.reference_code[refreshed])
            if refreshed.any():
                scale = inputs.reference[2][refreshed]
                run.update_candidates(
                    **tile(products), row_scale=inputs.query[2], column_scale=scale, row_candidates=(*candidates, None),
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
