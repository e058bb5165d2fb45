"""Complete calls with the portable CUDA kernels, executed by the host emulator, against the CPU kernels."""

import math

import pytest
import torch
import torch.nn.functional as F
from loss_inputs import LAYOUTS, in_layout, leaf, ours, problem, relative_error

import fused_margin as fm
from fused_margin._ops import forward_backward
from fused_margin._ops.backends import select
from fused_margin._ops.backends.select import PORTABLE, Kernels
from fused_margin._ops.inputs import LossInputs
from fused_margin.margins import FilteredNegatives, HardNegatives

pytestmark = pytest.mark.slow  # compiles the CUDA kernels for the host


@pytest.fixture
def compare(emulated, monkeypatch):
    """Run a function with the CPU kernels, then with the CUDA kernels on the host, and compare the results."""

    def run(function, tolerance):
        expected = function()
        with monkeypatch.context() as patch:
            patch.setattr(select, "kernels", lambda *_: Kernels(emulated.cuda, 0))
            measured = function()
        for m, e in zip(measured, expected, strict=True):
            assert relative_error(m, e) < tolerance

    return run


CASES = {
    "everything": {"scale": 64.0, "exclusive_weight": 0.7, "label_smoothing": 0.1},
    "feature norm": {"scale": None, "class_weight": torch.rand(333, dtype=torch.float64), "label_smoothing": 0.1},
    "exponent per row": {"scale": 300.0},
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
@pytest.mark.parametrize("workspace_mb", [256, 1e-6], ids=["saved", "recomputed"])
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
@pytest.mark.parametrize("workspace_mb", [256, 1e-6], ids=["saved", "recomputed"])
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


@pytest.mark.parametrize("workspace_mb", [256, 1e-6], ids=["saved", "recomputed"])
@pytest.mark.parametrize("size", [1e6, 1e9, 1e16, 1e37])
def test_large_logits(compare, size, workspace_mb):
    x, w, y = (t.float() if t.is_floating_point() else t for t in problem(7, 333, 45))
    x = F.normalize(x) * size

    def run():
        leaves = [leaf(t) for t in (x, w)]
        loss = fm.functional.linear_cross_entropy(*leaves, y, workspace_mb=workspace_mb)
        loss = (
            loss / size + fm.functional.margin_cross_entropy(*leaves, y, scale=None, workspace_mb=workspace_mb) / size
        )
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    compare(run, 1e-6)


@pytest.mark.parametrize("size", [1.0, 1e24])
@pytest.mark.parametrize("workspace_mb", [256, 1e-6])
def test_nearest_classes_in_chunks(emulated, monkeypatch, size, workspace_mb):
    """As in a loss on a GPU, which avoids the host synchronization of a search."""
    monkeypatch.setattr(LossInputs, "uses_tiled_nearest", property(lambda inputs: inputs.nearest))
    monkeypatch.setattr(select, "kernels", lambda *_: Kernels(emulated.cuda, 0))
    torch.manual_seed(0)
    for unit in (torch.eye(5)[torch.arange(301) % 5], F.normalize(torch.randn(301, 12))):
        w = unit * size
        actual = forward_backward.forward(
            LossInputs(None, w, int(workspace_mb * 2**20), PORTABLE, nearest=True, num_classes=len(w)),
            False,
            -100,
            True,
        )
        cosine = (unit.double() @ unit.double().t()).fill_diagonal_(-2.0).amax(1)
        torch.testing.assert_close(actual.nearest_cosine.double(), cosine, rtol=0, atol=1e-6)
        torch.testing.assert_close((unit * unit[actual.nearest_index]).double().sum(1), cosine, rtol=0, atol=1e-6)
        assert (actual.nearest_index != torch.arange(301)).all()


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
    monkeypatch.setattr(select, "kernels", lambda *_: Kernels(emulated.cuda, 0))
    with pytest.raises(ValueError, match="got 20 for 20 classes"):
        ours(x, w, y.index_fill(0, torch.tensor([3]), 20))


# sizes around a vector of 2 or 4 elements, one read by a warp, and its register capacity of 256 to 1024 elements
SIZES = (1, 3, 4, 5, 31, 127, 128, 129, 256, 258, 512, 513, 1024, 1025, 1028, 4096)
DTYPES = {  # of the weights, and of the arithmetic
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float64": (torch.float64, torch.float64),
    "float32 in float64": (torch.float32, torch.float64),
    "bfloat16 in float64": (torch.bfloat16, torch.float64),
}


def rows_of(count, size, dtype, layout):
    """Random rows with a large last element, so that a result without it is wrong."""
    rows = torch.randn(count, size, dtype=torch.float64)
    rows[:, -1] = 2.0 + rows[:, -1].abs()
    return in_layout(rows.to(dtype), layout)


def assert_close_to(measured, expected, compute):
    torch.testing.assert_close(
        measured.double(), expected, rtol=0, atol={torch.float32: 2e-5, torch.float64: 1e-12}[compute]
    )


def project_out(gradient, direction, inverse_norm):
    unit = direction * inverse_norm[:, None]
    return gradient - (gradient * unit).sum(1, keepdim=True) * unit


@pytest.fixture
def run(emulated):
    return Kernels(emulated.cuda, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_rows_in_any_layout(run, dtype, layout):
    stored, compute = DTYPES[dtype]
    for size in SIZES:
        rows = rows_of(5, size, stored, layout)
        rows[3] = 0
        expected = 1 / rows.double().norm(dim=1)
        expected[3] = 0
        inverse_norm = torch.full((5,), math.nan, dtype=compute)
        run.row_normalize(rows=rows, normalized=None, inverse_norm=inverse_norm, count=5, size=size)
        assert_close_to(inverse_norm, expected, compute)
        for out in ("contiguous", "misaligned"):
            normalized = in_layout(torch.full((5, size), math.nan, dtype=compute), out)
            run.row_normalize(rows=rows, normalized=normalized, inverse_norm=inverse_norm, count=5, size=size)
            assert_close_to(normalized, rows.double() * expected[:, None], compute)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_target_cosines_of_rows_in_any_layout(run, dtype, layout):
    stored, compute = DTYPES[dtype]
    labels = torch.tensor([3, 0, 3, 2, -100])
    for size in SIZES:
        for sub_centers, embedding_layout in ((1, "contiguous"), (2, layout)):
            x, w = rows_of(5, size, compute, embedding_layout), rows_of(8, size, stored, layout)
            cosine, row = torch.full((5,), math.nan, dtype=torch.float64), torch.full((5,), -7)
            for inner_product in (False, True):
                run.target_cosine(
                    compute_like=torch.empty(0, dtype=compute), embeddings=x, weight=w, labels=labels, cosine=cosine,
                    row=row, bad_label=0, samples=5, classes=8, size=size, ignore_index=-100, sub_centers=sub_centers,
                    inner_product=inner_product,
                )  # fmt: skip
                a, b = (t.double() if inner_product else F.normalize(t.double()) for t in (x, w))
                best = (a @ b.t()).view(5, -1, sub_centers)[torch.arange(4), labels[:4]].max(dim=1)
                assert_close_to(cosine[:4] / size, best.values / size, torch.float64)
                assert size == 1 or torch.equal(row[:4], labels[:4] * sub_centers + best.indices)
                assert cosine[4] == 0 and row[4] == -1


@pytest.mark.parametrize("terms", ["dense", "all", "inner product"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_gradients_of_rows_in_any_layout(run, dtype, layout, terms):
    stored, compute = DTYPES[dtype]
    samples, classes, begin, end = 6, 9, 2, 9
    labels, nearest = torch.tensor([4, 2, 4, 0, 8, 4]), torch.tensor([4, 4, 0, 4, 2, 3, 8, 2, 1])
    target, pair = torch.randn(samples, dtype=torch.float64), torch.randn(classes, dtype=compute)
    class_weight, length = torch.rand(classes, dtype=torch.float64), torch.randn(classes, dtype=torch.float64)
    length[5] = 0
    for size in SIZES:
        w, x = rows_of(classes, size, stored, layout), rows_of(samples, size, compute, "contiguous")
        uniform = torch.randn(size, dtype=compute)
        dense = rows_of(end - begin, size, compute, "contiguous")
        inverse = (1 / w.double().norm(dim=1)).to(compute)
        if terms == "inner product":
            inverse.fill_(1)
        options = dict.fromkeys(
            ("dense_scale", "normalized_embeddings", "sorted_labels", "label_order", "target_gradient",
             "uniform_direction", "class_weight", "length_gradient", "nearest", "sorted_nearest", "nearest_order",
             "nearest_gradient")
        )  # fmt: skip
        expected, i = dense.double(), inverse.double()
        if terms != "dense":
            options["dense_scale"] = torch.tensor(0.7, dtype=torch.float64)
            options["sorted_labels"], options["label_order"] = torch.sort(labels, stable=True)
            options |= {"normalized_embeddings": x, "target_gradient": target, "uniform_direction": uniform}
            options |= {"class_weight": class_weight, "nearest": nearest, "nearest_gradient": pair}
            options["sorted_nearest"], options["nearest_order"] = torch.sort(nearest, stable=True)
            unit = w.double() * i[:, None]
            added = torch.zeros(classes, size, dtype=torch.float64).index_add_(0, labels, target[:, None] * x.double())
            added += class_weight[:, None] * uniform.double()
            added += pair.double()[:, None] * unit[nearest]
            added.index_add_(0, nearest, pair.double()[:, None] * unit)
            expected = (0.7 * expected + added[begin:end]) * i[begin:end, None]
        if terms == "inner product":
            options["length_gradient"] = length
            expected += (length[:, None] * F.normalize(w.double()))[begin:end]
        else:
            expected = project_out(expected, w[begin:end].double(), i[begin:end])
        for gradient_layout in ("contiguous", "misaligned"):
            gradient = in_layout(dense, gradient_layout)
            run.project_weight_gradient(
                gradient=gradient, weight=w, inverse_norm=inverse, samples=samples, classes=classes, size=size,
                class_begin=begin, chunk=end - begin, inner_product=terms == "inner product", **options,
            )  # fmt: skip
            assert_close_to(gradient, expected, compute)


@pytest.mark.parametrize("inner_product", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_gradients_of_rows_in_any_layout(run, dtype, layout, inner_product):
    stored, compute = DTYPES[dtype]
    samples, classes = 6, 9
    labels = torch.tensor([4, 2, 4, -100, 8, 0])
    target, of_uniform, row_scale, scale = torch.randn(4, samples, dtype=torch.float64)
    target[3] = 0
    for size in SIZES:
        w, x = rows_of(classes, size, stored, layout), rows_of(samples, size, compute, "contiguous")
        dense, uniform = rows_of(samples, size, compute, "contiguous"), torch.randn(size, dtype=compute)
        inverse = torch.rand(samples, dtype=compute)
        if inner_product:
            inverse.fill_(1)
        else:
            x /= x.norm(dim=1, keepdim=True)
        inverse_w = (1 / w.double().norm(dim=1)).to(compute)
        expected = dense.double() * (row_scale * scale)[:, None] + of_uniform[:, None] * uniform.double()
        expected += target[:, None] * (w.double() * inverse_w.double()[:, None])[labels.clamp(min=0)]
        if not inner_product:
            expected = project_out(expected, x.double(), torch.ones(samples)) * inverse.double()[:, None]
        of_scale = (dense.double() * x.double()).sum(1) * row_scale
        for gradient_layout in ("contiguous", "misaligned"):
            gradient, scale_gradient = in_layout(dense, gradient_layout), torch.full_like(scale, math.nan)
            run.project_embedding_gradient(
                gradient=gradient, normalized_embeddings=x, inverse_norm=inverse, weight=w,
                weight_inverse_norm=inverse_w, labels=labels, row_scale=row_scale, scale=scale, target_gradient=target,
                uniform_gradient=of_uniform, uniform_weight=uniform, scale_gradient=scale_gradient, samples=samples,
                classes=classes, size=size, inner_product=inner_product,
            )  # fmt: skip
            assert_close_to(gradient, expected, compute)
            torch.testing.assert_close(scale_gradient, of_scale, rtol=1e-12, atol=1e-11)


def test_samples_of_a_class_among_many(run):
    """A warp's search in the sorted labels: counts around 32 lanes, first and last classes, and absent classes."""
    for samples in (1, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 2049):
        labels = torch.randint(0, 60, (samples,)) // 3 * 3  # runs of equal labels, and classes without samples
        gradient, x = torch.zeros(64, 4), torch.randn(samples, 4)
        order = torch.sort(labels, stable=True)
        run.project_weight_gradient(
            gradient=gradient, weight=torch.ones(64, 4), inverse_norm=None, dense_scale=None,
            normalized_embeddings=x, sorted_labels=order.values, label_order=order.indices,
            target_gradient=torch.ones(samples, dtype=torch.float64), uniform_direction=None, class_weight=None,
            length_gradient=None, nearest=None, sorted_nearest=None, nearest_order=None, nearest_gradient=None, samples=samples, classes=64,
            size=4, class_begin=0, chunk=64, inner_product=True,
        )  # fmt: skip
        torch.testing.assert_close(gradient, torch.zeros(64, 4).index_add_(0, labels, x), rtol=0, atol=1e-4)
