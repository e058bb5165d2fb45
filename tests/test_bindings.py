"""The Python functions of the kernels: a wrong keyword is a TypeError that names it."""

import pytest
import torch

from fused_margin import _C

MATRIX = torch.randn(3, 4)


def normalize(**options):
    arguments = {
        "rows": MATRIX, "normalized": None, "inverse_norm": torch.empty(3), "count": 3, "size": 4,
    } | options  # fmt: skip
    _C.cpu.row_normalize(0, **{name: value for name, value in arguments.items() if value is not ...})


def rerank(**options):
    rows, double = torch.ones(3), torch.ones(3, dtype=torch.float64)
    arguments = {
        "query": (MATRIX, double, rows, None, rows, rows), "reference": (MATRIX, double, rows, None, rows, rows),
        "candidates": (torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, 1), rows, None),
        "nearest": (torch.zeros(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.int64)), "reference_first_id": 0,
        "references": 3, "query_first_id": 0, "same_set": True, "queries": 0, "size": 4,
    } | options  # fmt: skip
    _C.cpu.rerank_candidates(0, **arguments)


def test_right_keywords():
    normalize()
    rerank()
    rerank(candidates=None)


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        (normalize, {"size": ...}, "row_normalize: missing keyword size"),
        (normalize, {"inverse_norm": ...}, "row_normalize: missing keyword inverse_norm"),
        (normalize, {"sizes": 4}, "row_normalize: unknown keyword sizes"),
        (normalize, {"size": ..., "sizes": 4}, "row_normalize: unknown keyword sizes, missing keyword size"),
        (normalize, {"size": 4.0}, "row_normalize: size: expected an int of 64 bits, got float"),
        (normalize, {"size": 2**64}, "row_normalize: size: expected an int of 64 bits, got int"),
        (normalize, {"rows": None}, "row_normalize: rows: expected a matrix of floats or int8, got NoneType"),
        (normalize, {"rows": MATRIX[0]}, "row_normalize: rows: expected a matrix, got a tensor of torch.float32"),
        (normalize, {"rows": MATRIX.long()}, "rows: expected a matrix of floats or int8, got a tensor of torch.int64"),
        (normalize, {"normalized": MATRIX.double()}, "normalized: expected a tensor of torch.float32 or None, got"),
        (normalize, {"inverse_norm": MATRIX.half()}, "expected a tensor of torch.float32 or torch.float64, got a"),
        (normalize, {"inverse_norm": 1}, "inverse_norm: expected a tensor of torch.float32 or torch.float64, got int"),
        (rerank, {"same_set": 1}, "rerank_candidates: same_set: expected a bool, got int"),
        (rerank, {"query": None}, "rerank_candidates: query: expected a tuple of 6, got NoneType"),
        (rerank, {"nearest": (MATRIX, MATRIX)}, "nearest: expected a tensor of torch.float64 or None, got a tensor of"),
    ],
)  # fmt: skip
def test_wrong_keywords(call, options, message):
    with pytest.raises(TypeError) as caught:
        call(**options)
    assert message in str(caught.value)
