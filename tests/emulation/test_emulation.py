"""The portable CUDA kernels, executed by the host emulator, against the CPU kernels on the whole path of a call."""

import pytest
import torch
from problems import leaf, ours, problem, relative_error

import fused_margin as fm
from fused_margin.margins import FilteredNegatives, HardNegatives
from fused_margin.ops import library, sweep
from fused_margin.ops.backend import Kernels


@pytest.fixture
def compare(emulated, monkeypatch):
    """Runs a function with the CPU's kernels, then with CUDA's on the host, and compares all it returns."""

    def run(function, tolerance):
        expected = function()
        with monkeypatch.context() as patch:
            for module in (sweep, library):
                patch.setattr(module, "kernels", lambda device: Kernels(emulated.cuda, 0))
            measured = function()
        for m, e in zip(measured, expected, strict=True):
            assert relative_error(m, e) < tolerance

    return run


CASES = {
    "everything": {"scale": 64.0, "exclusive_weight": 0.7, "label_smoothing": 0.1},
    "feature norm": {"scale": None, "class_weight": torch.rand(333, dtype=torch.float64), "label_smoothing": 0.1},
    "own exponent per row": {"scale": 300.0},
    "recomputed": {"scale": 64.0, "exclusive_weight": 0.1, "workspace_mb": 1e-6},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_losses(compare, case, dtype):
    x, w, y = (t.to(dtype) if t.is_floating_point() else t for t in problem(7, 333, 45))
    y[2] = -100
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    compare(lambda: ours(x, w, y, {"m2": 0.5}, **CASES[case]), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("workspace_mb", [256, 1e-6], ids=["kept", "recomputed"])
def test_sub_centers_and_hard_negatives(compare, dtype, workspace_mb):
    x, w, y = (t.to(dtype) if t.is_floating_point() else t for t in problem(7, 777, 45))
    y = torch.where(torch.arange(7) == 2, -100, y % 259)
    hard = {"hard_negatives": HardNegatives(torch.linspace(-0.3, 0.3, 7, dtype=torch.float64), 0.3)}
    filtered, centers = {"hard_negatives": FilteredNegatives(0.2)}, {"sub_centers": 3}
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for options in (centers, hard, filtered, centers | hard, centers | filtered):
        compare(
            lambda o=options: ours(x, w, y, {"m2": 0.5}, 20.0, workspace_mb=workspace_mb, **o),
            tolerance,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("workspace_mb", [256, 1e-6], ids=["kept", "recomputed"])
def test_inner_products(compare, dtype, workspace_mb):
    x, w, y = (t.to(dtype) if t.is_floating_point() else t for t in problem(7, 333, 45, spread=1.0))
    bias = torch.randn(333, dtype=dtype)

    def run(**options):
        leaves = [leaf(t) for t in (x, w, bias)]
        loss = fm.functional.linear_cross_entropy(leaves[0], leaves[1], y, leaves[2], **options)
        loss.backward()
        return loss.detach(), *(t.grad for t in leaves)

    for options in ({"label_smoothing": 0.1}, {"margin": fm.Margin(m1=4.0)}):
        compare(lambda o=options: run(workspace_mb=workspace_mb, **o), 2e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("shape", [(1, 2, 3), (33, 257, 31), (3, 1025, 130)], ids=str)
def test_shapes_at_warp_and_block_edges(compare, shape):
    x, w, y = (t.float() if t.is_floating_point() else t for t in problem(*shape))
    compare(lambda: ours(x, w, y, {"m1": 1.3, "m3": 0.1}, exclusive_weight=0.5), 2e-6)


def test_half_and_strided_weights(compare):
    x, w, y = problem(5, 200, 33)
    for dtype in (torch.float16, torch.bfloat16):
        compare(lambda dtype=dtype: ours(x.float(), w.to(dtype), y, {"m2": 0.5}, exclusive_weight=0.5), 1e-3)
    transposed = w.float().t().contiguous().t()
    compare(lambda: ours(x.float(), transposed, y, {"m2": 0.5}, exclusive_weight=0.5), 1e-6)


def test_nearest_class_with_ties_and_ragged_tiles(compare):
    w = torch.eye(5)[torch.arange(301) % 5]
    compare(lambda: fm.functional.nearest_class(w, workspace_mb=1e-6), 1e-7)
    w = torch.randn(301, 12)
    compare(lambda: fm.functional.nearest_class(w, workspace_mb=0.05), 1e-7)


def test_margins_and_bad_labels(compare, emulated, monkeypatch):
    x, w, y = problem(40, 20, 6)
    for margin in ({"m1": 4.0}, {"m2": 0.5, "beyond_pi": "linear"}, {"m2": 0.5, "easy": True}):
        compare(lambda margin=margin: ours(x, w, y, margin, 16.0), 1e-12)
    for module in (sweep, library):
        monkeypatch.setattr(module, "kernels", lambda device: Kernels(emulated.cuda, 0))
    with pytest.raises(ValueError, match="got 20 for 20 classes"):
        ours(x, w, y.index_fill(0, torch.tensor([3]), 20))
