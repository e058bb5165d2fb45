"""The operators in torch: schemas, fakes, compilation, autocast, determinism, unsupported derivatives."""

import json
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
import torch.distributed as dist
from loss_inputs import leaf, ours, problem

import fused_margin as fm
from fused_margin._ops import library, margin_rows
from fused_margin._ops.backends.select import PORTABLE
from fused_margin._ops.class_pair_sums import other_class_sums
from fused_margin._ops.inputs import ForwardOutput, LossInputs
from fused_margin._ops.nearest import cache
from fused_margin._ops.nearest import library as nearest_ops
from fused_margin.compat.insightface import CombinedMarginLoss, PartialFC_V2
from fused_margin.distributed import Shard


def single(samples, classes, size):
    x, w, y = problem(samples, classes, size)
    return x.float(), w.float(), y


def arguments_of(inputs):
    return tuple(getattr(inputs, field.name) for field in library.FIELDS)


@pytest.mark.parametrize(
    ("keep", "uniform", "nearest"),
    [
        pytest.param(*options, marks=[pytest.mark.slow] * (len({*options}) > 1))
        for options in product([True, False], repeat=3)
    ],
)
def test_opcheck_forward(keep, uniform, nearest):
    x, w, y = single(9, 50, 8)
    scale = (torch.rand(9, dtype=torch.float64) + 5).requires_grad_()
    class_weight = torch.rand(50, dtype=torch.float64) if uniform else None
    for s in (scale, None):
        inputs = LossInputs(leaf(x), leaf(w), 1 << 20, PORTABLE, y, s, 64.0, class_weight, nearest, num_classes=50)
        torch.library.opcheck(library.forward_chunks, (*arguments_of(inputs), uniform, -100, keep))


def test_opcheck_nearest_only():
    inputs = LossInputs(None, leaf(torch.randn(50, 8)), 1 << 20, PORTABLE, nearest=True, num_classes=50)
    torch.library.opcheck(library.forward_chunks, (*arguments_of(inputs), False, 0, False))


@pytest.mark.parametrize(
    "options",
    [
        {"sub_centers": 5},
        {"hard_threshold": torch.randn(9, dtype=torch.float64), "hard_strength": torch.ones(1, dtype=torch.float64)},
        {"hard_threshold": torch.randn(9, dtype=torch.float64)},
        {"inner_product": True},
        {"inner_product": True, "bias": torch.randn(50, dtype=torch.float64, requires_grad=True)},
    ],
    ids=lambda options: "+".join(options),
)
def test_opcheck_portable_options(options):
    x, w, y = single(9, 50, 8)
    inputs = LossInputs(leaf(x), leaf(w), 1 << 20, PORTABLE, y % 10, scale_value=4.0, num_classes=len(w), **options)
    torch.library.opcheck(library.forward_chunks, (*arguments_of(inputs), False, -100, True))


def test_opcheck_backward():
    x, w, y = single(9, 50, 8)
    upstream = [
        torch.randn(9, dtype=torch.float64),
        torch.randn(9, dtype=torch.float64),
        None,
        torch.randn(50),
        None,
        None,
    ]
    for options in ({"nearest": True}, {"inner_product": True, "bias": torch.randn(50, dtype=torch.float64)}):
        arguments = arguments_of(LossInputs(x, w, 1 << 20, PORTABLE, y, num_classes=len(w), **options))
        saved = library.forward_chunks(*arguments, False, -100, True)
        if "bias" in options:
            upstream[3], upstream[4] = None, torch.randn(9, dtype=torch.float64)
        torch.library.opcheck(library.backward_chunks, (*arguments, *upstream, *saved, True, True, "bias" in options))


def test_opcheck_margin_rows():
    statistics = [torch.randn(7, dtype=torch.float64).tanh().requires_grad_() for _ in range(3)]
    labels = torch.randint(0, 20, (7,))
    class_weight = torch.rand(20, dtype=torch.float64)
    m2 = torch.rand(7, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(
        margin_rows.margin_rows,
        (*statistics, labels, class_weight, class_weight.sum(), None, None, m2, None, None, [64.0, 1.0, 0.0, 0.0, 0.0],
         0, False, False, 1e-8, torch.tensor(0.1, dtype=torch.float64), 20, -100),
    )  # fmt: skip
    torch.library.opcheck(
        margin_rows.margin_rows_backward, (statistics[0].detach(), torch.randn(8, 7, dtype=torch.float64))
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


# Losses that reach the same code as others when they are compiled.
ALIKE = (
    "arcface",
    "normface",
    "cosface",
    "combined",
    "l2softmax",
    "lsoftmax",
    "subcenter",
    "sphereface",
    "filtered",
    "adaface",
)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *(pytest.param(name, "aot_eager", marks=[pytest.mark.slow] * (name in ALIKE)) for name in LOSSES),
        *(pytest.param(name, "inductor", marks=[pytest.mark.slow] * (name != "arcface")) for name in LOSSES),
    ],
)
def test_compiled_equals_eager(name, backend):
    """One graph without breaks, also while annealing changes and with another batch size."""
    torch._dynamo.reset()  # recompilations in other tests count towards the limits
    torch.manual_seed(1)
    eager = LOSSES[name]()
    compiled_module = LOSSES[name]()
    compiled_module.load_state_dict(eager.state_dict())
    compiled = torch.compile(compiled_module, fullgraph=True, backend=backend)
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


def test_autocast_does_not_change_the_arithmetic():
    x, w, y = single(12, 90, 16)
    outside = ours(x, w, y, {"m2": 0.5})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ours(x, w, y, {"m2": 0.5})
    for o, i in zip(outside, inside, strict=True):
        assert torch.equal(o, i)


def test_embeddings_of_an_autocast_backbone():
    """Half-precision embeddings from an autocast layer meet float32 class weights."""
    layer, loss_fn = torch.nn.Linear(10, 16), fm.ArcFaceLoss(90, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = layer(torch.randn(12, 10))
        loss = loss_fn(embeddings, torch.randint(0, 90, (12,)))
    loss.backward()
    assert embeddings.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert layer.weight.grad.isfinite().all() and loss_fn.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("workspace_mb", [256, 1e-6])
def test_results_are_deterministic(workspace_mb):
    x, w, y = single(65, 3001, 33)
    first = ours(x, w, y, {"m2": 0.5}, exclusive_weight=0.1, workspace_mb=workspace_mb)
    for _ in range(3):
        again = ours(x, w, y, {"m2": 0.5}, exclusive_weight=0.1, workspace_mb=workspace_mb)
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)


def test_retained_graph_runs_twice():
    x, w, y = single(12, 90, 16)
    for workspace_mb in (256, 1e-6):
        x, w = leaf(x), leaf(w)
        loss = fm.functional.margin_cross_entropy(x, w, y, fm.Margin(m2=0.5), None, workspace_mb=workspace_mb)
        first = torch.autograd.grad(loss, (x, w), retain_graph=True)
        second = torch.autograd.grad(loss, (x, w))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


def test_in_place_weight_update_before_backward_is_an_error():
    x, w, y = single(12, 90, 16)
    w = leaf(w)
    loss = fm.functional.margin_cross_entropy(x, w, y)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_are_errors():
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


def test_first_call_does_not_import_the_compiler():
    """The import takes seconds, and a process that does not compile does not need it."""
    code = """
import json, sys
import torch, fused_margin as fm
from fused_margin import functional
x, labels = torch.randn(8, 16, requires_grad=True), torch.arange(8)
for refresh in ("every_step", "certified", 3):
    loss_fn = fm.ArcFaceLoss(90, 16, exclusive_weight=0.5, exclusive_refresh=refresh, label_smoothing=0.1)
    loss_fn(x, labels).backward()
    loss_fn(x, labels).backward()
fm.SoftmaxLoss(90, 16)(x, labels).backward()
fm.UniformLoss()(loss_fn.weight).backward()
functional.nearest_class(x.detach(), torch.randn(20, 16), k=2)
print(json.dumps([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ)
    assert json.loads(done.stdout) == []


def test_ops_mark_their_state_as_modified():
    """As after any in-place operation, autograd must not use values saved before."""
    state = cache.new_cache(torch.randn(30, 6), 30)
    weight, index, age = torch.randn(30, 6), torch.zeros(30, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    before = [t._version for t in (*state, index, age, weight)]
    nearest_ops.certified_nearest(weight, *state, 1 << 20, "", 30)
    nearest_ops.periodic_nearest(weight, index, age, 3, True, 1 << 20, "", 30)
    after = [t._version for t in (*state, index, age, weight)]
    assert all(a > b for a, b in zip(after[:-1], before[:-1], strict=True)) and after[-1] == before[-1]
    with torch.inference_mode():  # tensors created here have no version
        nearest_ops.periodic_nearest(weight, index.clone(), age.clone(), 3, True, 1 << 20, "", 30)


def test_ops_without_a_derivative_raise():
    weight = leaf(torch.randn(30, 6))
    cosine, _ = nearest_ops.nearest_rows(weight, None, 1, False, 1 << 20)
    with pytest.raises(RuntimeError, match="nearest_rows has no derivative"):
        cosine.sum().backward()
    with pytest.raises(RuntimeError, match="certified_nearest has no derivative"):
        nearest_ops.certified_nearest(weight, *cache.new_cache(weight.detach(), 30), 1 << 20, "", 30)


X, W, Y = problem(6, 20, 8)
DIFFERENTIATED = {
    "margin": lambda x, w: fm.functional.margin_cross_entropy(x, w, Y, fm.Margin(m2=0.5)),
    "margin rows only": lambda x, w: fm.functional.margin_cross_entropy(
        x.detach(), w.detach(), Y, fm.Margin(m2=x.square().mean(1) + 0 * w.sum())
    ),
    "logsumexp": lambda x, w: fm.functional.cosine_logsumexp(x, w, Y)[0].sum(),
    "linear": lambda x, w: fm.functional.linear_cross_entropy(x, w, Y, w.sum(1)),
    "exclusive": lambda x, w: fm.functional.exclusive_regularization(w) * x.square().sum(),
    "pairs": lambda x, w: other_class_sums(x, w, Y, "angle").sum(),
}
FORWARD_MODE, SECOND_ORDER = "forward-mode derivatives .* are not supported", "second derivatives are not supported"
TRANSFORM = "gradients inside torch.func .* are not supported"
DERIVATIVES = {
    "torch.func.jvp": (FORWARD_MODE, lambda f: torch.func.jvp(f, (X, W), (X, W))),
    "torch.func.jvp, both modes": (FORWARD_MODE, lambda f: torch.func.jvp(f, (leaf(X), leaf(W)), (X, W))),
    "torch.func.jacfwd": (FORWARD_MODE, lambda f: torch.func.jacfwd(f, (0, 1))(X, W)),
    "dual numbers": (FORWARD_MODE, lambda f: with_dual_numbers(f)),
    "torch.autograd.functional.jvp": (SECOND_ORDER, lambda f: torch.autograd.functional.jvp(f, (X, W), (X, W))),
    "torch.autograd.functional.hessian": (SECOND_ORDER, lambda f: torch.autograd.functional.hessian(f, (X, W))),
    "torch.autograd.functional.jacobian": (
        FORWARD_MODE,
        lambda f: torch.autograd.functional.jacobian(f, (X, W), vectorize=True, strategy="forward-mode"),
    ),
    "torch.func.grad": (TRANSFORM, lambda f: torch.func.grad(f, (0, 1))(X, W)),
    "torch.func.hessian": (FORWARD_MODE + "|" + TRANSFORM, lambda f: torch.func.hessian(f, (0, 1))(X, W)),
    "vmap of grad": (
        TRANSFORM,
        lambda f: torch.vmap(torch.func.grad(f, (0, 1)))(X.expand(2, -1, -1), W.expand(2, -1, -1)),
    ),
}


def with_dual_numbers(function):
    with torch.autograd.forward_ad.dual_level():
        return function(*(torch.autograd.forward_ad.make_dual(t, t) for t in (X, W)))


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("function", DIFFERENTIATED)
def test_unsupported_derivatives_raise(function, derivative):
    """The result is never a silent 0."""
    message, differentiate = DERIVATIVES[derivative]
    with pytest.raises(RuntimeError, match=message):
        differentiate(DIFFERENTIATED[function])


def test_reference_has_the_derivatives_that_error_messages_refer_to():
    def function(x):
        return fm.reference.margin_cross_entropy(x, W, Y, {"m2": 0.5})

    gradient = torch.func.grad(function)(X)
    tangent = torch.func.jvp(function, (X,), (W[:6],))[1]
    torch.testing.assert_close(tangent, (gradient * W[:6]).sum())
    assert torch.func.hessian(function)(X).abs().sum() > 0


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield Shard(len(W), dist.group.WORLD)
    dist.destroy_process_group()


def test_unsupported_derivatives_over_divided_classes_raise(one_rank):
    functions = [
        lambda x, w: fm.functional.margin_cross_entropy(x, w, Y, fm.Margin(m2=0.5), shard=one_rank),
        lambda x, w: fm.functional.linear_cross_entropy(x, w, Y, w.sum(1), label_smoothing=0.1, shard=one_rank),
        lambda x, w: fm.functional.exclusive_regularization(w, shard=one_rank) * x.square().sum(),
    ]
    for function in functions:
        for message, differentiate in DERIVATIVES.values():
            with pytest.raises(RuntimeError, match=f"{message}|the transforms of torch.func are not supported"):
                differentiate(function)
        with pytest.raises(RuntimeError, match="the transforms of torch.func are not supported"):
            torch.vmap(function, (0, None))(X.expand(2, -1, -1), W)


def test_second_derivative_through_saved_tensors_of_divided_classes_raises(one_rank):
    """This also holds where the upstream gradient is a constant."""
    w = leaf(W)
    loss = fm.functional.exclusive_regularization(w, shard=one_rank)
    (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND_ORDER):
        (gradient.square().sum() + w.sum()).backward()


@pytest.mark.parametrize("function", DIFFERENTIATED)
def test_vmap_equals_a_loop(function):
    f = DIFFERENTIATED[function]
    xs = torch.stack([X, 2 - X, X.flip(0)])
    torch.testing.assert_close(torch.vmap(f, (0, None))(xs, W), torch.stack([f(x, W) for x in xs]))
    torch.testing.assert_close(torch.vmap(f)(xs, W.expand(3, -1, -1)), torch.stack([f(x, W) for x in xs]))


@pytest.mark.parametrize("function", DIFFERENTIATED)
def test_batched_gradients_equal_a_loop(function):
    x, w = leaf(X), leaf(W)
    value = DIFFERENTIATED[function](x, w)
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=value.dtype)
    at_once = torch.autograd.grad(value, (x, w), upstream, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(upstream):
        for several, one in zip(at_once, torch.autograd.grad(value, (x, w), g, retain_graph=True), strict=True):
            torch.testing.assert_close(several[i], one)


@pytest.mark.parametrize("sparse", [False, True])
def test_batched_gradients_of_sampled_classes_raise(sparse):
    """Detection relies on a private function of torch; the test fails where that function changes."""
    loss_fn = fm.ArcFaceLoss(len(W), W.shape[1], sample_rate=0.5, sparse=sparse, reduction="none", dtype=W.dtype)
    loss = loss_fn(leaf(X), Y)
    with pytest.raises(RuntimeError, match="is_grads_batched is not supported where classes are drawn or divided"):
        torch.autograd.grad(loss, loss_fn.weight, torch.eye(len(Y), dtype=loss.dtype), is_grads_batched=True)


def test_nothing_is_saved_without_gradients():
    x, w, y = single(12, 90, 16)
    inputs = LossInputs(x, w, 1 << 28, PORTABLE, y, scale_value=64.0)
    for keep in (True, False):
        output = ForwardOutput(*library.forward_chunks(*arguments_of(inputs), False, -100, keep))
        assert (output.saved_chunks.numel() > 0) == keep
    with torch.no_grad():
        assert not fm.functional.margin_cross_entropy(leaf(x), w, y).requires_grad
