"""Complete calls with the tensor-core kernels, executed by the host emulator: pipelines, tiles and epilogues."""

import math

import pytest
import tensor_core_model
import torch
from loss_inputs import LAYOUTS, in_layout, leaf, loss_and_gradients, ours, problem, relative_error, truth
from torch.nn import functional as F

import fused_margin as fm
from emulation import build
from fused_margin import reference
from fused_margin._ops import divided, library
from fused_margin._ops.backends import select, tensor_cores
from fused_margin._ops.backends.select import Kernels
from fused_margin._ops.inputs import LossInputs

pytestmark = pytest.mark.slow  # compiles the CUDA kernels for the host


@pytest.fixture(params=["sm90", "sm80"])
def family(request, emulated, monkeypatch):
    monkeypatch.setattr(select, "kernels", lambda *_: Kernels(emulated.cuda, 0))
    monkeypatch.setattr(tensor_cores, "half_product", build.half_product(emulated))
    with select.force_backend(request.param):
        yield request.param


@pytest.fixture(params=["highest", "high"])
def precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield {"highest": 5e-6, "high": 1e-3}[request.param]
    torch.set_float32_matmul_precision(before)


def single(*shape):
    return (t.float() if t.is_floating_point() else t for t in problem(*shape))


def check(x, w, y, tolerance, **options):
    expected = truth(x, w, y, {"m2": 0.5}, **{k: v for k, v in options.items() if k != "workspace_mb"})
    for m, e in zip(ours(x, w, y, {"m2": 0.5}, **options), expected, strict=True):
        assert relative_error(m, e) < tolerance


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 1, 64), (130, 200, 128), (300, 450, 576)])
def test_small_integers_multiply_exactly(family, emulated, rows, columns, width, parts, wide):
    """Detects any error in a descriptor, a swizzle or a phase."""
    left, right = (torch.randint(-4, 5, (n, parts * width)).half() for n in (rows, columns))
    out = torch.full((rows, columns), float("nan"))
    getattr(Kernels(emulated.cuda, 0), family).dump(
        left=left, right=right, rows=rows, columns=columns, width=width, parts=parts, wide=wide, out=out
    )
    a, b = (t.float().view(len(t), parts, width).unbind(1) for t in (left, right))
    expected = a[0] @ b[0].t() if parts == 1 else a[0] @ (b[0] + b[1]).t() + a[1] @ b[0].t()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("spread", [0, 8], ids=["one magnitude", "many magnitudes"])
def test_sums_match_the_published_model(family, emulated, spread):
    """Equal bit for bit with the coarser alignment; the emulator computes in integers."""
    left, right = (torch.randn(n, 192) * torch.exp2(torch.randint(-spread, 1, (n, 192))) for n in (20, 30))
    left, right = left.half(), right.half()
    out = torch.empty(20, 30)
    getattr(Kernels(emulated.cuda, 0), family).dump(
        left=left, right=right, rows=20, columns=30, width=192, parts=1, wide=False, out=out
    )
    assert torch.equal(out.double(), tensor_core_model.product(left, right, family, "products"))
    exact = left.double() @ right.double().t()
    assert (out - exact).abs().max() > (exact.float() - exact).abs().max()  # a float32 sum would differ


@pytest.mark.parametrize(("parts", "tolerance"), [(1, 2e-4), (2, 2e-6)])
def test_accuracy_of_packed_operands(family, emulated, parts, tolerance):
    """Cosines of rows of any length, some of them near one.

    Split operands have 22 bits; near one the tensor cores' rounding towards zero is the larger error.
    """
    x, w = torch.randn(40, 100) * torch.logspace(-8, 8, 40)[:, None], torch.randn(70, 100)
    w[:40] = x / x.norm(dim=1, keepdim=True) + 1e-3 * w[:40]
    run = Kernels(emulated.cuda, 0)
    packed, norms = [], []
    for rows in (x, w):
        packed.append(torch.empty(len(rows), parts * 128, dtype=torch.float16))
        norms.append(torch.empty(len(rows)))
        run.pack_operand(
            rows=rows, packed=packed[-1], inverse_norm=norms[-1], count=len(rows), size=100, width=128, parts=parts
        )
        torch.testing.assert_close(norms[-1], 1 / rows.norm(dim=1), rtol=1e-6, atol=0)
    out = torch.empty(40, 70)
    getattr(run, family).dump(
        left=packed[0], right=packed[1], rows=40, columns=70, width=128, parts=parts, wide=False, out=out
    )
    expected = torch.nn.functional.normalize(x.double()) @ torch.nn.functional.normalize(w.double()).t()
    error = (out.double() / run.operand_scale**2 - expected).abs()
    assert error.max() < tolerance
    if parts == 1:
        assert error.max() > 1e-5  # half operands round
    else:
        assert error[expected.abs() < 0.5].max() < 3e-7


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_operands_of_rows_in_any_layout(emulated, dtype, layout):
    """Exact halves with zero padding, for sizes around a group of 8 and the register limits of 512 and 1024."""
    run = Kernels(emulated.cuda, 0)
    for size in (1, 3, 4, 5, 8, 127, 128, 129, 511, 512, 513, 1000, 1024, 1025, 4096):
        rows = torch.randn(7, size)
        rows[:, -1] += 3.0
        rows[2], rows[4, size // 2] = 0.0, float("nan")
        rows = in_layout(rows.to(dtype), layout)
        norm = rows.double().norm(dim=1)
        inverse = torch.where(norm == 0, 0.0, 1 / norm)
        for parts, width in ((1, -(-size // 64) * 64), (2, -(-size // 64) * 64 + 64)):
            packed = torch.full((7, parts, width), float("nan"), dtype=torch.float16)
            inverse_norm = torch.full((7,), float("nan"))
            run.pack_operand(
                rows=rows, packed=packed, inverse_norm=inverse_norm, count=7, size=size, width=width, parts=parts
            )
            torch.testing.assert_close(inverse_norm, inverse.float(), rtol=1e-7, atol=0, equal_nan=True)
            scaled = rows.float() * (inverse * run.operand_scale).float()[:, None]
            high = scaled.half()
            expected = torch.stack([high, (scaled - high.float()).half()], dim=1)[:, :parts]
            torch.testing.assert_close(packed[:, :, :size], expected, rtol=0, atol=0, equal_nan=True)
            assert (packed[:, :, size:].view(torch.int16) == 0).all()


# tiles have 128 rows and 128 or 192 classes; rows of operands are padded to multiples of 64
@pytest.mark.parametrize("shape", [(1, 2, 32), (129, 193, 40), (128, 384, 64), (300, 1100, 192)], ids=str)
def test_losses_and_gradients(family, precision, shape):
    x, w, y = single(*shape)
    check(x, w, y, precision, label_smoothing=0.1)


@pytest.mark.parametrize("precision", ["highest"], indirect=True)
@pytest.mark.parametrize(
    "shape",
    [
        (129, 193, 40),
        pytest.param((300, 1100, 512), marks=pytest.mark.slow),
        (33, 260, 1000),
        (20, 200, 2048),
    ],
    ids=str,
)
def test_exponent_sum(family, precision, shape):
    """A scale of one detects a class that is missing or counted twice."""
    x, w, y = single(*shape)
    cosines = reference.normalize(x.double()) @ reference.normalize(w.double()).t()
    for scale, limit in ((64.0, 2e-5), (1.0, 2e-6)):
        nlse, _ = fm.functional.cosine_logsumexp(x, w, y, scale)
        others = (scale * cosines).scatter(1, y[:, None], -math.inf).logsumexp(1)
        assert (nlse - others).abs().max() < limit


def test_label_of_another_rank(family, precision):
    """Divided classes: the rank that does not have the class of a sample sums over all of its own classes."""
    x, w, y = single(40, 300, 48)
    y[::2] = divided.OTHER_CLASS
    exact_x, exact_w = leaf(x.double()), leaf(w.double())
    logits = 8.0 * reference.normalize(exact_x) @ reference.normalize(exact_w).t()
    own = torch.where(y < 0, 300, y)[:, None]
    expected = F.pad(logits, (0, 1)).scatter(1, own, -math.inf)[:, :300].logsumexp(1)
    expected.sum().backward()
    x, w = leaf(x), leaf(w)
    inputs = LossInputs(x, w, 1 << 20, select.select_backend(x, w, 8.0), y, scale_value=8.0, num_classes=300)
    output = library.run_forward(inputs, False, divided.OTHER_CLASS)
    logsumexp = output.largest_logit + output.relative_logsumexp
    logsumexp.sum().backward()
    for measured, exact in ((logsumexp, expected), (x.grad, exact_x.grad), (w.grad, exact_w.grad)):
        assert relative_error(measured.detach(), exact.detach()) < precision


def test_long_sums_of_split_operands(family, monkeypatch):
    """Sums over many classes are accurate although tensor cores round each addition towards zero."""
    samples, classes, size = 4, 40_000, 16
    left, right = torch.rand(samples, classes, dtype=torch.float64), torch.rand(classes, size, dtype=torch.float64)
    split = [[t.half(), (t - t.half().double()).half()] for t in (left, right)]
    errors = {}
    for longest in (tensor_cores.MAX_CLASSES_PER_PRODUCT, classes):
        monkeypatch.setattr(tensor_cores, "MAX_CLASSES_PER_PRODUCT", longest)
        out = torch.zeros(2, samples, size)
        tensor_cores.add_divided(out, *split)
        errors[longest] = relative_error(out.double().sum(0), left @ right)
    assert errors[2048] < 3e-5 and errors[classes] > 1e-4


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_default_dtype_changes_nothing(family, default):
    """Scratch memory has the dtype that the kernel writes, for any default dtype."""
    x, w, y = single(140, 300, 40)
    expected = ours(x, w, y, {"m2": 0.5}, exclusive_weight=0.3)
    torch.set_default_dtype(default)
    try:
        measured = ours(x, w, y, {"m2": 0.5}, exclusive_weight=0.3)
    finally:
        torch.set_default_dtype(torch.float32)
    for m, e in zip(measured, expected, strict=True):
        assert torch.equal(m, e)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": None},
        {"scale": 300.0},
        {"scale": torch.linspace(0.0, 90.0, 140, dtype=torch.float64)},
        {"workspace_mb": 0.3, "exclusive_weight": 0.5},
    ],
    ids=["feature norm", "large scale", "per-sample scales", "many chunks"],
)
def test_options(family, options):
    x, w, y = single(140, 700, 48)
    y[3] = -100
    check(x, w, y, 1e-5, **options)


@pytest.mark.parametrize("size", [1e3, 1e5, 1.9e6])
def test_large_logits(family, size):
    """Row exponents are exact: the remaining error is the rounding of large products."""
    x, w, y = single(40, 300, 48)
    x = torch.nn.functional.normalize(x) * size
    y[3] = -100
    expected = truth(x, w, y, {"m2": 0.5}, scale=None)
    for m, e in zip(ours(x, w, y, {"m2": 0.5}, scale=None), expected, strict=True):
        assert relative_error(m, e) < 1e-5


def test_logits_out_of_range_are_not_finite(family):
    """The portable kernels serve calls with a fixed scale."""
    x, w, y = single(40, 300, 48)
    x[5] *= 1e9 / x[5].norm()
    loss = fm.functional.margin_cross_entropy(x, w, y, scale=None, reduction="none")
    assert loss[5].isnan() and loss.isfinite().sum() == 39
    check(x, w, y, 1e-5, scale=1e9)
    assert fm.functional.margin_cross_entropy(x[:1], w[:1], y[:1] * 0, scale=None) == 0  # no other class


@pytest.mark.slow
@pytest.mark.parametrize(
    "size",  # test_losses_and_gradients also covers resident rows
    [pytest.param(512, id="resident rows"), pytest.param(600, id="streamed rows")],
)
@pytest.mark.parametrize("precision", ["high"], indirect=True)
def test_enough_tiles_to_wrap_the_ring(family, precision, size):
    x, w, y = single(300, 1100, size)
    check(x, w, y, precision / 2, exclusive_weight=0.2)


@pytest.mark.parametrize("classes", [2, 127, 400])
def test_nearest_class(family, classes):
    w = torch.randn(classes, 40)
    for workspace_mb in (256, 0.02):
        cosine, index = fm.functional.nearest_class(w, workspace_mb=workspace_mb)
        expected, at = reference.nearest_class(w.double())
        torch.testing.assert_close(cosine.double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(index, at)


def test_ties_go_to_the_lowest_class(family):
    w = torch.eye(32)[torch.arange(301) % 5]
    for workspace_mb in (256, 0.02):
        cosine, index = fm.functional.nearest_class(w, workspace_mb=workspace_mb)
        expected = torch.arange(301) % 5
        expected[:5] += 5
        assert torch.equal(index, expected) and torch.equal(cosine, torch.ones(301))


def test_zero_and_nan_rows(family):
    w = torch.randn(60, 32)
    w[7], w[9, 3] = 0, float("nan")
    cosine, index = fm.functional.nearest_class(w)
    assert cosine[7] == 0 and cosine[9].isnan()
    others = torch.arange(60) != 9
    assert cosine[others].isfinite().all() and (index[others] != 9).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_parameters(family, dtype):
    x, w, y = single(33, 200, 64)
    loss, dx, dw = ours(x.to(dtype), w.to(dtype), y, {"m2": 0.5})
    expected = truth(x.to(dtype), w.to(dtype), y, {"m2": 0.5})
    assert dx.dtype == dw.dtype == dtype
    for m, e in zip((loss, dx, dw), expected, strict=True):
        assert relative_error(m, e) < max(5e-4, torch.finfo(dtype).eps)


def test_choice_of_backend(family):
    x, w, _ = single(3, 20, 40)
    exact = f"{family} {select.SPLIT}"
    assert select.select_backend(x, w) == select.select_backend(None, w) == exact
    assert select.select_backend(x.bfloat16(), w) == select.select_backend(x, w.half()) == family
    with torch.autocast("cpu"):
        assert select.select_backend(x, w) == family
    assert select.select_backend(x.double(), w) == select.PORTABLE
    assert select.select_backend(x[:, :31], w[:, :31]) == select.PORTABLE
    assert select.select_backend(x[:0], w) == select.PORTABLE


def test_compiles_into_one_graph(family):
    torch._dynamo.reset()
    x, w, y = single(20, 90, 40)
    expected = ours(x, w, y, {"m2": 0.5}, exclusive_weight=0.3)
    compiled = torch.compile(fm.functional.margin_cross_entropy, fullgraph=True, backend="aot_eager")
    measured = loss_and_gradients(compiled, x, w, y, fm.Margin(m2=0.5), exclusive_weight=0.3)
    for m, e in zip(measured, expected, strict=True):
        assert torch.equal(m, e)


@pytest.mark.parametrize("keep", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("exact", [True, False])
def test_opcheck(family, keep, exact):
    x, w, y = single(9, 200, 40)
    backend = f"{family} {select.SPLIT}" if exact else family
    scale = (torch.rand(9, dtype=torch.float64) + 5).requires_grad_()
    inputs = LossInputs(leaf(x), leaf(w), 1 << 18, backend, y, scale, nearest=True, num_classes=len(w))
    arguments = [getattr(inputs, field.name) for field in library.FIELDS]
    torch.library.opcheck(library.forward_chunks, (*arguments, False, -100, keep))


def test_results_are_deterministic(family):
    x, w, y = single(140, 500, 64)
    first, again = (ours(x, w, y, {"m2": 0.5}, exclusive_weight=0.3) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_gradient_scaler_neither_overflows_nor_underflows(family):
    x, w, y = single(40, 300, 64)
    for upstream in (2.0**-20, 1.0, 2.0**16):
        _, dx, dw = loss_and_gradients(
            fm.functional.margin_cross_entropy, x, w, y, fm.Margin(m2=0.5), upstream=torch.tensor(upstream)
        )
        _, ex, ew = truth(x, w, y, {"m2": 0.5})
        assert relative_error(dx / upstream, ex) < 5e-6 and relative_error(dw / upstream, ew) < 5e-6
