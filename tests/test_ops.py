"""The operators as torch sees them: schemas, fakes, compilation, autocast, repeatability."""

import pytest
import torch
from problems import leaf, ours, problem

import fused_margin as fm
from fused_margin.compat.insightface import CombinedMarginLoss, PartialFC_V2
from fused_margin.ops import library
from fused_margin.ops.dispatch import PORTABLE
from fused_margin.ops.problem import Problem


def single(samples, classes, size):
    x, w, y = problem(samples, classes, size)
    return x.float(), w.float(), y


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("nearest", [True, False])
def test_opcheck_sweep(keep, uniform, nearest):
    x, w, y = single(9, 50, 8)
    scale = (torch.rand(9, dtype=torch.float64) + 5).requires_grad_()
    class_weight = torch.rand(50, dtype=torch.float64) if uniform else None
    for s in (scale, None):
        problem = Problem(leaf(x), leaf(w), 1 << 20, PORTABLE, y, s, 64.0, class_weight, nearest)
        torch.library.opcheck(library.sweep, (*library.arguments(problem), uniform, -100, keep))


def test_opcheck_nearest_only():
    problem = Problem(None, leaf(torch.randn(50, 8)), 1 << 20, PORTABLE, nearest=True)
    torch.library.opcheck(library.sweep, (*library.arguments(problem), False, 0, False))


@pytest.mark.parametrize(
    "options",
    [
        {"sub_centers": 5},
        {"hard_threshold": torch.randn(9, dtype=torch.float64), "hard_strength": torch.ones(1, dtype=torch.float64)},
        {"hard_threshold": torch.randn(9, dtype=torch.float64)},
        {"inner_product": True},
        {"inner_product": True, "bias": torch.randn(50, requires_grad=True)},
    ],
    ids=lambda options: "+".join(options),
)
def test_opcheck_portable_options(options):
    x, w, y = single(9, 50, 8)
    problem = Problem(leaf(x), leaf(w), 1 << 20, PORTABLE, y % 10, scale_value=4.0, **options)
    torch.library.opcheck(library.sweep, (*library.arguments(problem), False, -100, True))


def test_opcheck_sweep_backward():
    x, w, y = single(9, 50, 8)
    upstream = [torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64), None, torch.randn(50)]
    for options in ({"nearest": True}, {"inner_product": True, "bias": torch.randn(50)}):
        arguments = library.arguments(Problem(x, w, 1 << 20, PORTABLE, y, **options))
        saved = library.sweep(*arguments, False, -100, True)
        if "bias" in options:
            upstream[3] = None
        torch.library.opcheck(
            library.sweep_backward, (*arguments, upstream, list(saved), True, True, "bias" in options)
        )


def test_opcheck_margin_rows():
    statistics = [torch.randn(7, dtype=torch.float64).tanh().requires_grad_() for _ in range(3)]
    labels = torch.randint(0, 20, (7,))
    class_weight = torch.rand(20, dtype=torch.float64)
    m2 = torch.rand(7, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(
        library.margin_rows,
        (*statistics, labels, class_weight, class_weight.sum(), None, None, m2, None, None, [64.0, 1.0, 0.0, 0.0, 0.0],
         0, False, False, 1e-8, torch.tensor(0.1, dtype=torch.float64), 20, -100),
    )  # fmt: skip
    torch.library.opcheck(
        library.margin_rows_backward, (statistics[0].detach(), torch.randn(8, 7, dtype=torch.float64))
    )


LOSSES = {
    "arcface": lambda: fm.ArcFaceLoss(90, 16, exclusive_weight=0.5, label_smoothing=0.1),
    "cosface": lambda: fm.CosFaceLoss(90, 16, class_weight=torch.rand(90)),
    "normface": lambda: fm.NormFaceLoss(90, 16, reduction="sum"),
    "combined": lambda: fm.CombinedMarginLoss(90, 16),
    "sphereface": lambda: fm.SphereFaceLoss(90, 16),
    "adaface": lambda: fm.AdaFaceLoss(90, 16),
    "curricularface": lambda: fm.CurricularFaceLoss(90, 16),
    "subcenter": lambda: fm.SubCenterArcFaceLoss(90, 16),
    "softmax": lambda: fm.SoftmaxLoss(90, 16, label_smoothing=0.1, exclusive_weight=0.5),
    "l2softmax": lambda: fm.L2SoftmaxLoss(90, 16),
    "lsoftmax": lambda: fm.LSoftmaxLoss(90, 16),
    "filtered": lambda: PartialFC_V2(CombinedMarginLoss(64, 1.0, 0.5, 0.0, 0.4), 16, 90),
}


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_equals_eager(name):
    """One graph without breaks, also while the annealing changes and for another batch size."""
    torch._dynamo.reset()  # recompilation limits count what other tests compiled
    torch.manual_seed(1)
    eager = LOSSES[name]()
    compiled_module = LOSSES[name]()
    compiled_module.load_state_dict(eager.state_dict())
    compiled = torch.compile(compiled_module, fullgraph=True)
    for samples in (12, 12, 20):
        x, _, y = single(samples, 90, 16)
        results = []
        for function, module in ((eager, eager), (compiled, compiled_module)):
            a = leaf(x)
            module.weight.grad = None
            loss = function(a, y)
            loss.backward()
            results.append((loss.detach(), a.grad, module.weight.grad))
        for e, c in zip(*results, strict=True):
            torch.testing.assert_close(c, e)
        for e, c in zip(eager.buffers(), compiled_module.buffers(), strict=True):
            torch.testing.assert_close(c, e)  # running statistics


def test_autocast_changes_nothing_of_the_arithmetic():
    x, w, y = single(12, 90, 16)
    outside = ours(x, w, y, {"m2": 0.5})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ours(x, w, y, {"m2": 0.5})
    for o, i in zip(outside, inside, strict=True):
        assert torch.equal(o, i)


def test_autocast_backbone():
    """Half-precision embeddings from an autocast layer meet float32 class weights."""
    layer, loss_fn = torch.nn.Linear(10, 16), fm.ArcFaceLoss(90, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = layer(torch.randn(12, 10))
        loss = loss_fn(embeddings, torch.randint(0, 90, (12,)))
    loss.backward()
    assert embeddings.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert layer.weight.grad.isfinite().all() and loss_fn.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("workspace_mb", [256, 1e-6])
def test_the_same_bits_every_time(workspace_mb):
    x, w, y = single(65, 3001, 33)
    first = ours(x, w, y, {"m2": 0.5}, exclusive_weight=0.1, workspace_mb=workspace_mb)
    for _ in range(3):
        again = ours(x, w, y, {"m2": 0.5}, exclusive_weight=0.1, workspace_mb=workspace_mb)
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)


def test_a_saved_graph_runs_twice():
    x, w, y = single(12, 90, 16)
    for workspace_mb in (256, 1e-6):
        x, w = leaf(x), leaf(w)
        loss = fm.functional.margin_cross_entropy(x, w, y, fm.Margin(m2=0.5), None, workspace_mb=workspace_mb)
        first = torch.autograd.grad(loss, (x, w), retain_graph=True)
        second = torch.autograd.grad(loss, (x, w))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


def test_changing_the_weight_before_backward_is_an_error():
    x, w, y = single(12, 90, 16)
    w = leaf(w)
    loss = fm.functional.margin_cross_entropy(x, w, y)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_are_refused():
    x, w, y = single(12, 90, 16)
    x = leaf(x)
    for loss in (
        fm.functional.margin_cross_entropy(x, w, y),
        fm.functional.cosine_logsumexp(x, w, y)[1].sum(),
        fm.functional.exclusive_regularization(x),
    ):
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives are not supported"):
            gradient.square().sum().backward()


def test_no_gradient_keeps_nothing():
    x, w, y = single(12, 90, 16)
    problem = Problem(x, w, 1 << 28, PORTABLE, y, scale_value=64.0)
    assert library.run_sweep(problem, False, -100, keep=True).kept.numel() > 0
    assert library.run_sweep(problem, False, -100, keep=False).kept.numel() == 0
    with torch.no_grad():
        assert not fm.functional.margin_cross_entropy(leaf(x), w, y).requires_grad
