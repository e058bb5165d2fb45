"""Results on a device against float64: the tensor-core kernels, then complete losses.

Run with ``pytest -m cuda`` where there is a device. Options of portable kernels only are compared with the CPU.
"""

import math

import pytest
import tensor_core_model
import torch
from loss_inputs import LAYOUTS, in_layout, leaf, loss_and_gradients, ours, problem, relative_error, truth
from on_device import (
    ARCFACE,
    DEVICE,
    FAMILIES,
    HALVES,
    check,
    half_products,
    needs_cuda,
    on_device,
    sanitizer,
    single,
    tolerance,
)

import fused_margin as fm
from benchmarks.kernels.steps import Operands, Probabilities
from fused_margin import reference
from fused_margin._ops.backends.select import kernels
from fused_margin.benchmark.problems import Shape, make_inputs
from fused_margin.margins import FilteredNegatives, HardNegatives

pytestmark = needs_cuda

# tiles have 128 rows and 128 or 192 classes; rows are padded to multiples of 64, and streamed beyond 512
SHAPES = [
    (1, 2, 32),
    pytest.param((129, 193, 40), marks=sanitizer),
    (127, 128, 64),
    (128, 384, 64),
    (1, 4099, 123),
    (300, 1100, 512),
    (256, 385, 520),
    (130, 1000, 600),
    (33, 260, 1000),
    (257, 500, 2048),
    (40, 300, 4096),
    (1024, 5000, 512),
]


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("rows", "columns", "width"),
    [
        (1, 1, 64),
        (128, 192, 64),
        pytest.param(129, 193, 128, marks=sanitizer),
        (300, 1100, 576),
        (1000, 3001, 512),
        (257, 700, 4096),
    ],
)
def test_small_integers_multiply_exactly(family, rows, columns, width, parts, wide):
    """Detects any error in a descriptor, a swizzle or a phase."""
    left, right = (torch.randint(-4, 5, (n, parts * width), device=DEVICE).half() for n in (rows, columns))
    out = torch.full((rows, columns), math.nan, device=DEVICE)
    getattr(kernels("cuda", torch.cuda.current_stream().cuda_stream), family).dump(
        left=left, right=right, rows=rows, columns=columns, width=width, parts=parts, wide=wide, out=out
    )
    a, b = (t.double().view(len(t), parts, width).unbind(1) for t in (left, right))
    expected = a[0] @ b[0].t() if parts == 1 else a[0] @ (b[0] + b[1]).t() + a[1] @ b[0].t()
    assert torch.equal(out.double(), expected)


@pytest.mark.parametrize("positive", [True, False], ids=["positive", "of both signs"])
def test_rounding_of_products_of_fractions(family, positive, record_property):
    """Integers cannot show how sums are rounded. The test records the published model that the device matches."""
    left, right = (torch.randn(n, 512, device=DEVICE).half() for n in (60, 70))
    if positive:
        left, right = left.abs(), right.abs()
    out = torch.full((60, 70), math.nan, device=DEVICE)
    getattr(kernels("cuda", torch.cuda.current_stream().cuda_stream), family).dump(
        left=left, right=right, rows=60, columns=70, width=512, parts=1, wide=False, out=out
    )
    models = {
        (unit, alignment): tensor_core_model.product(left, right, unit, alignment)
        for unit in tensor_core_model.UNITS
        for alignment in tensor_core_model.ALIGNMENTS
    }
    exact = left.double() @ right.double().t()
    error, expected = (float((each - exact).abs().max()) for each in (out, models["sm80", "products"]))
    same = [" by ".join(name) for name, model in models.items() if torch.equal(model, out.double())]
    record_property("arithmetic", f"{family}: {', '.join(same) or 'no model'}; {error:.1e}, model {expected:.1e}")
    assert error < 2 * expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exponent_sum(family, precision, shape):
    """At a scale of one the test also detects a single class that is missing or counted twice."""
    x, w, y = single(*shape)
    cosines = reference.normalize(x.double()) @ reference.normalize(w.double()).t()
    target = cosines.gather(1, y[:, None])[:, 0]
    half = tolerance("high", shape[2])
    limits = (2e-5, 2e-5) if precision == "highest" else (20 * half, half / 5)
    for scale, limit in zip((64.0, 1.0), limits, strict=True):
        nlse, cosine = fm.functional.cosine_logsumexp(x, w, y, scale)
        others = (scale * cosines).scatter(1, y[:, None], -math.inf).logsumexp(1)
        assert (nlse - others).abs().max() < limit
        torch.testing.assert_close(cosine.double(), target, rtol=0, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 127, 129, pytest.param(400, marks=sanitizer), 1000, 5003])
def test_nearest_class(backend, precision, classes):
    w = torch.randn(classes, 40, device=DEVICE)
    for workspace_mb in (256, 0.02):
        cosine, index = fm.functional.nearest_class(w, workspace_mb=workspace_mb)
        expected, _ = reference.nearest_class(w.double())
        torch.testing.assert_close(cosine.double(), expected, rtol=0, atol=1e-6 if precision == "highest" else 1e-3)
        unit = reference.normalize(w.double())
        assert (index != torch.arange(classes, device=DEVICE)).all()
        torch.testing.assert_close((unit * unit[index]).sum(1), cosine.double(), rtol=0, atol=1e-3)


@sanitizer
def test_ties_go_to_the_lowest_class(backend):
    expected = torch.arange(301, device=DEVICE) % 5
    w = torch.eye(32, device=DEVICE)[expected]
    expected[:5] += 5
    for workspace_mb in (256, 0.02):
        cosine, index = fm.functional.nearest_class(w, workspace_mb=workspace_mb)
        assert torch.equal(index, expected) and (cosine == 1).all()


@pytest.mark.parametrize("shape", [Shape(129, 40, 193), Shape(300, 520, 1100)], ids=str)
@sanitizer
def test_probabilities(family, shape):
    """The kernel alone, without torch's matrix products of the backward."""
    operands = Operands(make_inputs(shape, DEVICE))
    assert Probabilities(family, operands).errors()["probabilities"] < 5e-4


@half_products
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_and_gradients(family, precision, shape):
    check(*single(*shape), tolerance(precision, shape[2]), label_smoothing=0.1)


@half_products
@pytest.mark.parametrize(
    "options",
    [
        {"scale": None},
        {"scale": 300.0},
        {"scale": torch.linspace(0.0, 90.0, 140, dtype=torch.float64)},
        pytest.param({"workspace_mb": 0.3, "exclusive_weight": 0.5}, marks=sanitizer),
        {"workspace_mb": 1e-6},
    ],
    ids=["feature norm", "large scale", "per-sample scales", "many chunks", "smallest chunks"],
)
def test_options(backend, options):
    x, w, y = single(140, 700, 48)
    y[3] = -100
    check(x, w, y, 1e-5, **{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()})


OPTIONS = [
    {"scale": 64.0, "exclusive_weight": 0.5, "label_smoothing": 0.1},
    {"scale": None, "workspace_mb": 1e-6},
    {"scale": 300.0, "workspace_mb": 0.5},
]


@pytest.mark.parametrize("workspace_mb", [256, 1e-6], ids=["saved", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(252, 507, 123), pytest.param((33, 258, 8), marks=sanitizer)], ids=str)
def test_options_of_portable_kernels(shape, dtype, workspace_mb):
    """Sub-centers, hard and filtered negatives, inner products with a bias: results match the CPU."""
    x, w, y = (t.to(dtype) if t.is_floating_point() else t for t in problem(*shape, spread=1.0))
    y = torch.where(torch.arange(len(y)) == 2, -100, y % (len(w) // 3))
    threshold, bias = torch.linspace(-0.3, 0.3, len(x), dtype=torch.float64), torch.randn(len(w), dtype=dtype)

    def margin(device, **options):
        options = {name: value(device) for name, value in options.items()}
        return ours(x.to(device), w.to(device), y.to(device), ARCFACE, 20.0, workspace_mb=workspace_mb, **options)

    def linear(device, **options):
        leaves = [leaf(t.to(device)) for t in (x, w, bias)]
        loss = fm.functional.linear_cross_entropy(leaves[0], leaves[1], y.to(device), leaves[2], **options)
        loss.backward()
        return loss.detach(), *(t.grad for t in leaves)

    def hard(device):
        return HardNegatives(threshold.to(device), torch.full((1,), 0.3, device=device))

    for function, options in (
        (margin, {"sub_centers": lambda device: 3}),
        (margin, {"hard_negatives": hard}),
        (margin, {"hard_negatives": lambda device: FilteredNegatives(0.18)}),
        (margin, {"hard_negatives": lambda device: FilteredNegatives(0.18), "sub_centers": lambda device: 3}),
        (linear, {"label_smoothing": 0.1, "workspace_mb": workspace_mb}),
        (linear, {"margin": fm.Margin(m1=4.0), "workspace_mb": workspace_mb}),
    ):
        measured, again, expected = (function(device, **options) for device in (DEVICE, DEVICE, "cpu"))
        for m, a, e in zip(measured, again, expected, strict=True):
            assert torch.equal(m, a) and relative_error(m.cpu(), e) < (1e-5 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(252, 507, 123), (1, 4099, 64), (33, 2, 8)], ids=str)
def test_against_the_reference(backend, shape, dtype, options):
    x, w, y = problem(*shape)
    x, w, y = on_device(x.to(dtype), w.to(dtype), y)
    limit = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    if dtype in HALVES and backend in FAMILIES:
        limit = max(limit, tolerance("high", shape[2], options["scale"] or 64.0))
    check(x, w, y, limit, **options)


def test_half_gradients_are_not_summed_in_half(backend):
    """Parameters of both half types, and under autocast: gradients have the parameters' dtype, rounded once."""
    x, w, y = problem(300, 2000, 512)
    for dtype in HALVES:
        halves = on_device(x.to(dtype), w.to(dtype), y)
        _, dx, dw = ours(*halves, ARCFACE)
        assert dx.dtype == dw.dtype == dtype
        check(*halves, max(tolerance("high", 512), torch.finfo(dtype).eps))
    x, w, y = single(300, 2000, 512)
    with torch.autocast(DEVICE, torch.float16):
        measured = ours(x.half(), w, y, ARCFACE)
    for m, e in zip(measured, truth(x.half(), w, y, ARCFACE), strict=True):
        assert relative_error(m, e) < torch.finfo(torch.float16).eps
    assert measured[1].dtype == torch.float16 and measured[2].dtype == torch.float32


def test_zero_and_nan_rows(backend):
    w = torch.randn(60, 32, device=DEVICE)
    w[7], w[9, 3] = 0, math.nan
    cosine, index = fm.functional.nearest_class(w)
    assert cosine[7] == 0 and cosine[9].isnan()
    others = torch.arange(60, device=DEVICE) != 9
    assert cosine[others].isfinite().all() and (index[others] != 9).all()


def test_gradient_scaler_neither_overflows_nor_underflows(backend):
    x, w, y = single(40, 300, 64)
    _, ex, ew = truth(x, w, y, ARCFACE)
    for upstream in (2.0**-20, 1.0, 2.0**16):
        _, dx, dw = loss_and_gradients(
            fm.functional.margin_cross_entropy, x, w, y, fm.Margin(m2=0.5),
            upstream=torch.tensor(upstream, device=DEVICE),
        )  # fmt: skip
        assert relative_error(dx / upstream, ex) < 1e-5 and relative_error(dw / upstream, ew) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_layouts_of_the_weight(backend, layout, dtype):
    """Strided, transposed and misaligned rows give the results of contiguous ones."""
    x, w, y = problem(70, 600, 130)
    x, w, y = on_device(x.to(dtype), w.to(dtype), y)
    expected = ours(x, w, y, ARCFACE, exclusive_weight=0.3)
    x, w = x.clone().requires_grad_(), in_layout(w, layout).requires_grad_()
    loss = fm.functional.margin_cross_entropy(x, w, y, fm.Margin(**ARCFACE), exclusive_weight=0.3)
    loss.backward()
    limit = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
    assert max(map(relative_error, (loss, x.grad, w.grad), expected)) < limit
