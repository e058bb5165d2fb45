"""The exact search on a device, against the CPU and against full searches on the device."""

import pytest
import torch
from on_device import DEVICE, needs_cuda, sanitizer
from test_search import full_search, same, training

import fused_margin as fm
from fused_margin._ops.backends import select

pytestmark = needs_cuda


@pytest.fixture
def search():
    with select.force_exact_search():
        yield


@sanitizer
@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (301, 37, 45), (70, 1500, 64)], ids=str)
def test_exact_search(search, shape, metric):
    rows, others, size = shape
    torch.manual_seed(0)
    query = torch.randn(rows, size, device=DEVICE)
    for among in (None, torch.randn(others, size, device=DEVICE)):
        for k in (1, 2, 7, 32):
            if k > (rows - 1 if among is None else others):
                continue
            actual = fm.functional.nearest_class(query, among, k=k, metric=metric, workspace_mb=1)
            of_cpu = query.cpu(), None if among is None else among.cpu()
            expected = fm.functional.nearest_class(*of_cpu, k=k, metric=metric, workspace_mb=1)
            assert torch.equal(actual.index.cpu(), expected.index)
            torch.testing.assert_close(actual.cosine.cpu(), expected.cosine, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [48, 512])
def test_certified_refresh(search, size):
    """The nearest classes equal the CPU's at every training step, and those of a full search on the device bit for bit."""
    regularizer = fm.ExclusiveRegularizer(refresh="certified")
    for step, weight in training(1500, size, 40):
        moved = weight.to(DEVICE)
        if step == 20:
            moved[7], moved[8], moved[9] = float("nan"), 0.0, moved[3].clone()
        actual, expected = regularizer.find(moved), full_search(moved)
        assert same(actual, expected)
        assert torch.equal(actual.index.cpu(), full_search(moved.cpu()).index)
    searched, skipped, _ = regularizer.swept.tolist()
    assert skipped > searched
