"""The CUDA backend on a device: run with ``pytest -m cuda`` where there is one."""

import pytest
import torch
from problems import ours, problem, relative_error, truth

import fused_margin as fm

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not fm.build_info()["cuda"]["available"], reason="needs a CUDA device and a CUDA build"),
]

OPTIONS = [
    {"scale": 64.0, "exclusive_weight": 0.5, "label_smoothing": 0.1},
    {"scale": None, "workspace_mb": 1e-6},
    {"scale": 300.0, "workspace_mb": 0.5},
]


def on_device(*tensors):
    return [t.cuda() for t in tensors]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(252, 507, 123), (1, 4099, 64), (33, 2, 8)], ids=str)
def test_against_the_reference(shape, dtype, options):
    x, w, y = problem(*shape)
    x, w, y = on_device(x.to(dtype), w.to(dtype), y)
    expected = truth(x, w, y, {"m2": 0.5}, **{k: v for k, v in options.items() if k != "workspace_mb"})
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    for m, e in zip(ours(x, w, y, {"m2": 0.5}, **options), expected, strict=True):
        assert m.device == e.device and relative_error(m, e) < tolerance


def test_the_same_bits_every_time():
    x, w, y = on_device(*(t.float() if t.is_floating_point() else t for t in problem(65, 30_001, 64)))
    first = ours(x, w, y, {"m2": 0.5}, exclusive_weight=0.1, workspace_mb=4)
    for _ in range(100):
        for a, b in zip(first, ours(x, w, y, {"m2": 0.5}, exclusive_weight=0.1, workspace_mb=4), strict=True):
            assert torch.equal(a, b)


def test_nearest_class():
    w = torch.randn(10_007, 96, device="cuda")
    cosine, index = fm.functional.nearest_class(w, workspace_mb=8)
    expected, _ = fm.reference.nearest_class(w.double())
    torch.testing.assert_close(cosine.double(), expected, rtol=0, atol=1e-6)
    assert (index != torch.arange(len(w), device="cuda")).all()


def test_a_side_stream_and_no_host_sync():
    x, w, y = on_device(*(t.float() if t.is_floating_point() else t for t in problem(65, 3001, 64)))
    expected = ours(x, w, y, {"m2": 0.5})
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            measured = ours(x, w, y, {"m2": 0.5})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    for m, e in zip(measured, expected, strict=True):
        assert torch.equal(m, e)


def test_a_captured_graph_replays():
    x, _, y = on_device(*(t.float() if t.is_floating_point() else t for t in problem(65, 3001, 64)))
    x.requires_grad_()
    loss_fn = fm.ArcFaceLoss(3001, 64, device="cuda")
    step = torch.cuda.make_graphed_callables(lambda a, b: loss_fn(a, b), (x, y))
    loss = step(x, y)
    loss.backward()
    expected = ours(x, loss_fn.weight, y, {"m2": 0.5})
    assert relative_error(loss, expected[0]) < 1e-6 and relative_error(x.grad, expected[1]) < 1e-5


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
def test_the_second_device():
    x, w, y = (t.to("cuda:1") for t in problem(33, 500, 16))
    for m, e in zip(ours(x, w, y, {"m2": 0.5}), truth(x, w, y, {"m2": 0.5}), strict=True):
        assert m.device == torch.device("cuda:1") and relative_error(m, e) < 1e-10
