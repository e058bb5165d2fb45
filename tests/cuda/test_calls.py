"""Calls on a device: determinism, memory, streams, host threads, CUDA graphs, bad labels, a second device."""

import subprocess
import sys
import threading

import pytest
import torch
from loss_inputs import leaf, ours, problem, relative_error, truth
from on_device import ARCFACE, DEVICE, needs_cuda, needs_gibibytes, on_device, single

import fused_margin as fm
from fused_margin import reference
from fused_margin._ops.backends import select

pytestmark = needs_cuda


@pytest.mark.parametrize(
    ("shape", "options"),
    [((65, 30_001, 64), {"exclusive_weight": 0.1, "workspace_mb": 4}), ((300, 1100, 600), {})],
    ids=["many chunks", "streamed rows"],
)
def test_results_are_deterministic(backend, precision, shape, options):
    x, w, y = single(*shape)
    first = ours(x, w, y, ARCFACE, **options)
    for _ in range(100):
        for a, b in zip(first, ours(x, w, y, ARCFACE, **options), strict=True):
            assert torch.equal(a, b)


def test_million_classes_in_bounded_memory(backend, precision):
    needs_gibibytes(12)
    samples, size, classes, workspace_mb = 1024, 512, 1_000_000, 256
    x, w = torch.randn(samples, size, device=DEVICE), torch.randn(classes, size, device=DEVICE)
    y = torch.randint(classes, (samples,), device=DEVICE)
    ours(x[:8], w[:500].clone(), y[:8] % 500, ARCFACE)  # libraries allocate their own memory first
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


def test_offsets_beyond_31_bits(backend):
    """Classes repeat a thousand: all copies have the same gradient, and sums grow with the number of copies."""
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


def test_side_stream_without_host_sync(backend):
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


def test_host_threads_launch_one_kernel_with_different_sizes(backend):
    """Embedding sizes that need different amounts of shared memory, each in a thread with its own stream."""
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
        for actual in results[number]:
            assert max(map(relative_error, actual, each)) < 1e-5


FIRST_LAUNCH = """
import sys, torch
import fused_margin as fm
from fused_margin._ops.backends import select

x, w = torch.randn(70, 320, device="cuda"), torch.randn(900, 320, device="cuda")
y = torch.randint(900, (70,), device="cuda")
with torch.no_grad():
    with select.force_backend(select.PORTABLE):  # initializes torch's own libraries
        expected = fm.functional.cosine_logsumexp(x, w, y)[0]
    graph = torch.cuda.CUDAGraph()
    with select.force_backend(sys.argv[1]), torch.cuda.graph(graph):
        captured = fm.functional.cosine_logsumexp(x, w, y)[0]
graph.replay()
torch.testing.assert_close(captured, expected, rtol=1e-5, atol=1e-5)
"""


def test_first_launch_of_a_process_can_be_captured(family):
    """The first launch loads the kernels and queries the runtime during capture."""
    result = subprocess.run(
        [sys.executable, "-c", FIRST_LAUNCH, family], capture_output=True, text=True, timeout=25, check=False
    )
    assert result.returncode == 0, result.stderr


def test_captured_graph_replays(backend):
    x, _, y = single(65, 3001, 64)
    x.requires_grad_()
    loss_fn = fm.ArcFaceLoss(3001, 64, device=DEVICE)
    step = torch.cuda.make_graphed_callables(lambda a, b: loss_fn(a, b), (x, y))
    loss = step(x, y)
    loss.backward()
    expected = ours(x, loss_fn.weight, y, ARCFACE)
    assert relative_error(loss, expected[0]) < 1e-6 and relative_error(x.grad, expected[1]) < 1e-5


def test_captured_step_replays_on_other_data(backend):
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


def test_bad_labels_are_reported_by_the_next_call_or_immediately():
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
def test_second_device(backend):
    dtype = torch.float64 if backend == select.PORTABLE else torch.float32
    x, w, y = (t.to(f"{DEVICE}:1", dtype if t.is_floating_point() else None) for t in problem(33, 500, 64))
    for m, e in zip(ours(x, w, y, ARCFACE), truth(x, w, y, ARCFACE), strict=True):
        assert m.device == torch.device(f"{DEVICE}:1")
        assert relative_error(m, e) < (1e-10 if dtype == torch.float64 else 1e-5)
