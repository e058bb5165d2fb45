"""The CUDA backend on a device: run with ``pytest -m cuda`` where there is one. Products first, then what is made of them."""

import math
import subprocess
import sys
import threading

import pytest
import tensor_core_model
import torch
from problems import LAYOUTS, in_layout, leaf, loss_and_gradients, ours, problem, relative_error, truth
from test_search import full_sweep, same, training

import fused_margin as fm
from fused_margin import reference
from fused_margin.margins import FilteredNegatives, HardNegatives
from fused_margin.ops import dispatch
from fused_margin.ops.backend import kernels

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not fm.build_info()["cuda"]["available"], reason="needs a CUDA device and a CUDA build"),
]
sanitizer = pytest.mark.sanitizer

DEVICE = "cuda"
FAMILIES = {family.name: family for family in reversed(dispatch.FAMILIES)}
HALVES = [torch.float16, torch.bfloat16]
ARCFACE = {"m2": 0.5}

# tile edges are at 128 rows and 128 or 192 classes; an operand's row is a multiple of 64 wide; more than 512 are streamed
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


def serve(name):
    if name in FAMILIES:
        if not FAMILIES[name].compiled:
            pytest.skip(f"{name} is not compiled")
        if not FAMILIES[name].runs_on(torch.cuda.get_device_capability()):
            pytest.skip(f"{name} does not run on this device")
    with dispatch.use(name):
        yield name


@pytest.fixture(params=[dispatch.PORTABLE, *FAMILIES])
def way(request):
    yield from serve(request.param)


@pytest.fixture(params=FAMILIES)
def family(request):
    yield from serve(request.param)


@pytest.fixture(params=["highest", "high"])
def precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def tolerance(precision, size, scale=64.0):
    """Rounding operands to fp16 moves a logit by its scale over the square root of the size."""
    if precision == "highest":
        return 1e-5
    return 5e-4 * max(1.0, math.sqrt(512 / size)) * max(1.0, scale / 64)


def on_device(*tensors):
    return [t.to(DEVICE) for t in tensors]


def single(*shape):
    return on_device(*(t.float() if t.is_floating_point() else t for t in problem(*shape)))


def needs_gibibytes(count):
    if torch.cuda.mem_get_info()[0] < count * 2**30:
        pytest.skip(f"needs {count} GiB of device memory")


def check(x, w, y, limit, **options):
    expected = truth(x, w, y, ARCFACE, **{k: v for k, v in options.items() if k != "workspace_mb"})
    for m, e in zip(ours(x, w, y, ARCFACE, **options), expected, strict=True):
        assert m.device == e.device and relative_error(m, e) < limit


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
    """Any error in a descriptor, a swizzle or a phase shows at once."""
    left, right = (torch.randint(-4, 5, (n, parts * width), device=DEVICE).half() for n in (rows, columns))
    out = torch.full((rows, columns), math.nan, device=DEVICE)
    kernels(out.device).family(family).dump(
        left=left, right=right, rows=rows, columns=columns, width=width, parts=parts, wide=wide, out=out
    )
    a, b = (t.double().view(len(t), parts, width).unbind(1) for t in (left, right))
    expected = a[0] @ b[0].t() if parts == 1 else a[0] @ (b[0] + b[1]).t() + a[1] @ b[0].t()
    assert torch.equal(out.double(), expected)


@pytest.mark.parametrize("positive", [True, False], ids=["positive", "of both signs"])
def test_rounding_of_products_of_fractions(family, positive, record_property):
    """Integers cannot show how sums are rounded. Which published model the device follows bit for bit is recorded."""
    left, right = (torch.randn(n, 512, device=DEVICE).half() for n in (60, 70))
    if positive:
        left, right = left.abs(), right.abs()
    out = torch.full((60, 70), math.nan, device=DEVICE)
    kernels(out.device).family(family).dump(
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
    """Also at a scale of one, where a single class that is missing or counted twice would show."""
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
def test_nearest_class(way, precision, classes):
    w = torch.randn(classes, 40, device=DEVICE)
    for workspace_mb in (256, 0.02):
        cosine, index = fm.functional.nearest_class(w, workspace_mb=workspace_mb)
        expected, _ = reference.nearest_class(w.double())
        torch.testing.assert_close(cosine.double(), expected, rtol=0, atol=1e-6 if precision == "highest" else 1e-3)
        unit = reference.normalize(w.double())
        assert (index != torch.arange(classes, device=DEVICE)).all()
        torch.testing.assert_close((unit * unit[index]).sum(1), cosine.double(), rtol=0, atol=1e-3)


@sanitizer
def test_ties_go_to_the_lowest_class(way):
    expected = torch.arange(301, device=DEVICE) % 5
    w = torch.eye(32, device=DEVICE)[expected]
    expected[:5] += 5
    for workspace_mb in (256, 0.02):
        cosine, index = fm.functional.nearest_class(w, workspace_mb=workspace_mb)
        assert torch.equal(index, expected) and (cosine == 1).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_and_gradients(family, precision, shape):
    check(*single(*shape), tolerance(precision, shape[2]), label_smoothing=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": None},
        {"scale": 300.0},
        {"scale": torch.linspace(0.0, 90.0, 140, dtype=torch.float64)},
        pytest.param({"workspace_mb": 0.3, "exclusive_weight": 0.5}, marks=sanitizer),
        {"workspace_mb": 1e-6},
    ],
    ids=["feature norm", "large scale", "own scales", "many chunks", "smallest chunks"],
)
def test_options(way, options):
    x, w, y = single(140, 700, 48)
    y[3] = -100
    check(x, w, y, 1e-5, **{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()})


OPTIONS = [
    {"scale": 64.0, "exclusive_weight": 0.5, "label_smoothing": 0.1},
    {"scale": None, "workspace_mb": 1e-6},
    {"scale": 300.0, "workspace_mb": 0.5},
]


@pytest.mark.parametrize("workspace_mb", [256, 1e-6], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(252, 507, 123), pytest.param((33, 258, 8), marks=sanitizer)], ids=str)
def test_what_only_portable_products_do(shape, dtype, workspace_mb):
    """Sub-centers, hard and filtered negatives, inner products with a bias: on the device as on the CPU."""
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
def test_against_the_reference(way, shape, dtype, options):
    x, w, y = problem(*shape)
    x, w, y = on_device(x.to(dtype), w.to(dtype), y)
    limit = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    if dtype in HALVES and way in FAMILIES:
        limit = max(limit, tolerance("high", shape[2], options["scale"] or 64.0))
    check(x, w, y, limit, **options)


def test_half_gradients_are_not_summed_in_half(way):
    """Parameters of either half type and under autocast: gradients in their own type, rounded once."""
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


@pytest.mark.parametrize(
    ("shape", "options"),
    [((65, 30_001, 64), {"exclusive_weight": 0.1, "workspace_mb": 4}), ((300, 1100, 600), {})],
    ids=["many chunks", "rows are streamed"],
)
def test_the_same_bits_every_time(way, precision, shape, options):
    x, w, y = single(*shape)
    first = ours(x, w, y, ARCFACE, **options)
    for _ in range(100):
        for a, b in zip(first, ours(x, w, y, ARCFACE, **options), strict=True):
            assert torch.equal(a, b)


def test_a_million_classes_in_bounded_memory(way, precision):
    needs_gibibytes(12)
    samples, size, classes, workspace_mb = 1024, 512, 1_000_000, 256
    x, w = torch.randn(samples, size, device=DEVICE), torch.randn(classes, size, device=DEVICE)
    y = torch.randint(classes, (samples,), device=DEVICE)
    ours(x[:8], w[:500].clone(), y[:8] % 500, ARCFACE)  # libraries' own memory is there before
    x.requires_grad_()
    w.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = fm.functional.margin_cross_entropy(x, w, y, fm.Margin(**ARCFACE), workspace_mb=workspace_mb)
    loss.backward()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    gradients = 4 * (w.numel() + x.numel())
    assert gradients < extra < gradients + (workspace_mb << 20) + 16 * 4 * (samples * size + classes)
    assert loss.isfinite() and w.grad.isfinite().all() and x.grad.isfinite().all()


def test_offsets_beyond_31_bits(way):
    """Classes that repeat a thousand: every copy has the same gradient, and the sum is as many times as large."""
    copies, classes, size = 530, 1000, 4096
    needs_gibibytes(48)
    x, base = torch.randn(8, size, device=DEVICE), torch.randn(classes, size, device=DEVICE)
    y = torch.arange(8, device=DEVICE)
    w = base.repeat(copies, 1).requires_grad_()
    assert w.numel() > 2**31
    nlse, _ = fm.functional.cosine_logsumexp(x, w, y, workspace_mb=20_000)
    nlse.sum().backward()

    one = leaf(base, torch.float64)
    exponentials = (64 * reference.normalize(x.double()) @ reference.normalize(one).t()).exp()
    total = exponentials.detach().sum(1) * copies - exponentials.detach().gather(1, y[:, None])[:, 0]
    expected = (total + (exponentials - exponentials.detach()).sum(1)).log()
    expected.sum().backward()
    assert (nlse - expected).abs().max() < 1e-4
    for gradient in w.grad.view(copies, classes, size)[1:]:
        assert relative_error(gradient, one.grad) < 1e-5


def test_zero_and_nan_rows(way):
    w = torch.randn(60, 32, device=DEVICE)
    w[7], w[9, 3] = 0, math.nan
    cosine, index = fm.functional.nearest_class(w)
    assert cosine[7] == 0 and cosine[9].isnan()
    others = torch.arange(60, device=DEVICE) != 9
    assert cosine[others].isfinite().all() and (index[others] != 9).all()


def test_a_gradient_scaler_neither_overflows_nor_loses(way):
    x, w, y = single(40, 300, 64)
    _, ex, ew = truth(x, w, y, ARCFACE)
    for upstream in (2.0**-20, 1.0, 2.0**16):
        _, dx, dw = loss_and_gradients(
            fm.functional.margin_cross_entropy, x, w, y, fm.Margin(m2=0.5),
            upstream=torch.tensor(upstream, device=DEVICE),
        )  # fmt: skip
        assert relative_error(dx / upstream, ex) < 1e-5 and relative_error(dw / upstream, ew) < 1e-5


def test_a_side_stream_and_no_host_sync(way):
    x, w, y = single(65, 3001, 64)
    expected = ours(x, w, y, ARCFACE, exclusive_weight=0.1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            measured = ours(x, w, y, ARCFACE, exclusive_weight=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    for m, e in zip(measured, expected, strict=True):
        assert torch.equal(m, e)


def test_host_threads_launch_one_kernel_with_different_sizes(way):
    """Embedding sizes that divide shared memory differently, each from a thread with its own stream."""
    problems = [single(140, 1500, size) for size in (64, 256, 512, 600)]
    expected = [ours(*each, ARCFACE) for each in problems]
    torch.cuda.synchronize()
    results: dict[int, list] = {}

    def work(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            results[number] = [ours(*problems[number], ARCFACE) for _ in range(20)]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(problems)
    for number, each in enumerate(expected):  # torch.mm may choose another kernel on another stream
        for found in results[number]:
            assert max(map(relative_error, found, each)) < 1e-5


FIRST_LAUNCH = """
import sys, torch
import fused_margin as fm
from fused_margin.ops import dispatch

x, w = torch.randn(70, 320, device="cuda"), torch.randn(900, 320, device="cuda")
y = torch.randint(900, (70,), device="cuda")
with torch.no_grad():
    with dispatch.use(dispatch.PORTABLE):  # what torch itself needs to have warm
        expected = fm.functional.cosine_logsumexp(x, w, y)[0]
    graph = torch.cuda.CUDAGraph()
    with dispatch.use(sys.argv[1]), torch.cuda.graph(graph):
        captured = fm.functional.cosine_logsumexp(x, w, y)[0]
graph.replay()
torch.testing.assert_close(captured, expected, rtol=1e-5, atol=1e-5)
"""


def test_the_first_launch_of_a_process_may_be_captured(family):
    """It loads the kernels and asks the runtime about them during the capture."""
    result = subprocess.run(
        [sys.executable, "-c", FIRST_LAUNCH, family], capture_output=True, text=True, timeout=25, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_layouts_of_the_weight(way, layout, dtype):
    """Strided, transposed and misaligned rows are read as contiguous ones are."""
    x, w, y = problem(70, 600, 130)
    x, w, y = on_device(x.to(dtype), w.to(dtype), y)
    expected = ours(x, w, y, ARCFACE, exclusive_weight=0.3)
    x, w = x.clone().requires_grad_(), in_layout(w, layout).requires_grad_()
    loss = fm.functional.margin_cross_entropy(x, w, y, fm.Margin(**ARCFACE), exclusive_weight=0.3)
    loss.backward()
    limit = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
    assert max(map(relative_error, (loss, x.grad, w.grad), expected)) < limit


def test_a_captured_graph_replays(way):
    x, _, y = single(65, 3001, 64)
    x.requires_grad_()
    loss_fn = fm.ArcFaceLoss(3001, 64, device=DEVICE)
    step = torch.cuda.make_graphed_callables(lambda a, b: loss_fn(a, b), (x, y))
    loss = step(x, y)
    loss.backward()
    expected = ours(x, loss_fn.weight, y, ARCFACE)
    assert relative_error(loss, expected[0]) < 1e-6 and relative_error(x.grad, expected[1]) < 1e-5


def test_a_captured_step_replays_on_other_data(way):
    """Forward and backward with both gradients, in several chunks."""
    x, w, y = single(65, 3001, 64)
    others = on_device(torch.randn(65, 64), torch.randn(3001, 64), torch.randint(3001, (65,)))
    fixed = leaf(x), leaf(w)

    def step():
        for tensor in fixed:
            tensor.grad = None
        loss = fm.functional.margin_cross_entropy(
            *fixed, y, fm.Margin(m2=0.5), exclusive_weight=0.1, workspace_mb=0.5
        )  # fmt: skip
        loss.backward()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = step()
    with torch.no_grad():
        for tensor, other in zip((*fixed, y), others, strict=True):
            tensor.copy_(other)
    for _ in range(2):
        graph.replay()
    expected = ours(*others, ARCFACE, exclusive_weight=0.1, workspace_mb=0.5)
    for m, e in zip((loss, fixed[0].grad, fixed[1].grad), expected, strict=True):
        assert relative_error(m, e) < 1e-6


def test_bad_labels_are_reported_by_the_next_call_or_at_once():
    x, w, y = on_device(*problem(8, 20, 4))
    fm.functional.margin_cross_entropy(x, w, y + 20)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="in an earlier call"):
        fm.functional.margin_cross_entropy(x, w, y)
    assert fm.functional.margin_cross_entropy(x, w, y).isfinite()
    fm.set_debug(True)
    try:
        with pytest.raises(ValueError, match="for 20 classes"):
            fm.functional.margin_cross_entropy(x, w, y + 20)
    finally:
        fm.set_debug(False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_second_device(way):
    dtype = torch.float64 if way == dispatch.PORTABLE else torch.float32
    x, w, y = (t.to(f"{DEVICE}:1", dtype if t.is_floating_point() else None) for t in problem(33, 500, 64))
    for m, e in zip(ours(x, w, y, ARCFACE), truth(x, w, y, ARCFACE), strict=True):
        assert m.device == torch.device(f"{DEVICE}:1")
        assert relative_error(m, e) < (1e-10 if dtype == torch.float64 else 1e-5)


@pytest.fixture
def search():
    with dispatch.search_on_cuda():
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
            found = fm.functional.nearest_class(query, among, k=k, metric=metric, workspace_mb=1)
            of_cpu = query.cpu(), None if among is None else among.cpu()
            expected = fm.functional.nearest_class(*of_cpu, k=k, metric=metric, workspace_mb=1)
            assert torch.equal(found.index.cpu(), expected.index)
            torch.testing.assert_close(found.cosine.cpu(), expected.cosine, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [48, 512])
def test_certified_refresh(search, size):
    """As the CPU finds them at every step of a training, and bit for bit what a whole sweep of the device finds."""
    regularizer = fm.ExclusiveRegularizer(refresh="certified")
    for step, weight in training(1500, size, 40):
        moved = weight.to(DEVICE)
        if step == 20:
            moved[7], moved[8], moved[9] = float("nan"), 0.0, moved[3].clone()
        found, expected = regularizer.find(moved), full_sweep(moved)
        assert same(found, expected)
        assert torch.equal(found.index.cpu(), full_sweep(moved.cpu()).index)
    again, not_again, _ = regularizer.swept.tolist()
    assert not_again > again
