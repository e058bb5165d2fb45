"""Results do not depend on torch's global settings: default dtype, default device, deterministic algorithms."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch

import fused_margin as fm
from fused_margin.distributed import Shard

N, C, D = 24, 300, 33


def inputs():
    generator = torch.Generator("cpu").manual_seed(1)
    options = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    labels = torch.randint(C, (N,), generator=generator, device="cpu")
    return torch.randn(N, D, **options), torch.randn(C, D, **options), labels


def margin_loss(**options):
    x, w, y = inputs()
    x.requires_grad_(), w.requires_grad_()
    loss = fm.functional.margin_cross_entropy(x, w, y, fm.Margin(m2=0.5), **options)
    loss.backward()
    return [loss.detach(), x.grad, w.grad]


def linear_loss():
    x, w, y = (t.requires_grad_(t.is_floating_point()) for t in inputs())
    loss = fm.functional.linear_cross_entropy(x, w, y, margin=fm.Margin(m1=2.0))
    loss.backward()
    return [loss.detach(), x.grad, w.grad]


def module(kind, **options):
    """A module with fixed weights: initial weights follow the default dtype, as in torch.nn."""
    x, w, y = inputs()
    loss_fn = kind(C, D, dtype=torch.float32, device="cpu", **options)
    with torch.no_grad():
        loss_fn.weight.copy_(w)
    loss = loss_fn(x.requires_grad_(), y)
    loss.backward()
    return [loss.detach(), x.grad, loss_fn.weight.grad, *loss_fn.buffers()]


def center_loss():
    x, _, y = inputs()
    loss_fn = fm.CenterLoss(C, D, dtype=torch.float32, device="cpu")
    return [loss_fn(x, y), loss_fn(x, y), loss_fn.centers]


def auxiliary_losses():
    x, w, y = inputs()
    return [
        fm.IntraLoss()(x, w, y),
        fm.InterLoss()(w, y),
        fm.UniformLoss()(w),
        fm.RingLoss(2.0, dtype=torch.float32, device="cpu")(x, y),
    ]


def refreshed_neighbors():
    regularizer = fm.ExclusiveRegularizer(refresh="certified")
    return [regularizer(inputs()[1]), *regularizer.find(1.01 * inputs()[1])]


def optimizer():
    _, w, _ = inputs()
    w.requires_grad_()
    w.grad = torch.ones_like(w)
    step = fm.optim.ProjectedSGD([w], lr=0.1, momentum=0.9, weight_decay=1e-4)
    step.step(), step.step()
    return [w.detach()]


PATHS = {
    "margin": margin_loss,
    "exclusive": lambda: margin_loss(exclusive_weight=1.0, label_smoothing=0.1),
    "recomputed": lambda: margin_loss(exclusive_weight=1.0, workspace_mb=1e-6),
    "per-sample scales": lambda: margin_loss(scale=None),
    "linear": linear_loss,
    "sub-centers": lambda: margin_sub_centers(),
    "adaface": lambda: module(fm.AdaFaceLoss),
    "curricular": lambda: module(fm.CurricularFaceLoss),
    "magface": lambda: module(fm.MagFaceLoss),
    "softmax": lambda: module(fm.SoftmaxLoss),
    "nearest": lambda: list(fm.functional.nearest_class(inputs()[1])),
    "nearest of others": lambda: list(fm.functional.nearest_class(inputs()[0], inputs()[1], k=3)),
    "certified": refreshed_neighbors,
    "separability": lambda: [torch.tensor(fm.functional.separability(inputs()[1]), dtype=torch.float64, device="cpu")],
    "center": center_loss,
    "auxiliary_losses": auxiliary_losses,
    "optimizer": optimizer,
}


def margin_sub_centers():
    x, w, y = inputs()
    w.requires_grad_()
    loss = fm.functional.margin_cross_entropy(x, w, y % (C // 3), fm.Margin(m2=0.5), sub_centers=3)
    loss.backward()
    return [loss.detach(), w.grad]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")


STATES = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device meta": lambda: torch.device("meta"),
    "deterministic": deterministic,  # torch then also fills uninitialized memory
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("path", PATHS)
def test_results_are_the_same(path, state):
    expected = PATHS[path]()
    with STATES[state]():
        actual = PATHS[path]()
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_module_on_meta_device():
    """It computes shapes, as torch.nn modules do, and rejects tensors on another device."""
    with torch.device("meta"):
        loss_fn = fm.ArcFaceLoss(C, D)
        assert loss_fn.weight.is_meta
        assert loss_fn(torch.randn(N, D), torch.zeros(N, dtype=torch.int64)).is_meta
        embeddings, _, labels = inputs()
        with pytest.raises(ValueError, match="expected a tensor on"):
            loss_fn(embeddings, labels)


@pytest.mark.parametrize("module", [fm.ArcFaceLoss, fm.SoftmaxLoss])
@pytest.mark.parametrize("sparse", [False, True])
def test_sampled_classes_on_meta(module, sparse):
    """Classes cannot be sampled on meta; shapes are those of all classes."""
    loss_fn = module(C, D, device="meta", sample_rate=0.5, sparse=sparse, exclusive_weight=0.1)
    embeddings = torch.randn(N, D, device="meta", requires_grad=True)
    loss = loss_fn(embeddings, torch.zeros(N, dtype=torch.int64, device="meta"))
    loss.backward()
    assert loss.is_meta and loss.shape == () and embeddings.grad.shape == (N, D)
    assert loss_fn.weight.grad.shape == (C, D)


def test_calls_that_need_values_on_meta_raise():
    """The messages name the cause."""
    embeddings, weight = torch.randn(N, D, device="meta"), torch.randn(C, D, device="meta")
    labels = torch.zeros(N, dtype=torch.int64, device="meta")
    for function in (fm.functional.margin_cross_entropy, fm.functional.linear_cross_entropy):
        with pytest.raises(ValueError, match="weight: expected a CPU or CUDA tensor with a shard, got one on meta"):
            function(embeddings, weight, labels, shard=Shard(C, sample_rate=0.5))
    with pytest.raises(RuntimeError, match="weight: expected a CPU or CUDA tensor, whose values .* got one on meta"):
        fm.ArcFaceLoss(C, D, device="meta", exclusive_weight=0.1, exclusive_refresh="certified")
    with pytest.raises(RuntimeError, match="query: expected a CPU or CUDA tensor, whose values .* got one on meta"):
        fm.functional.nearest_class(weight, k=2)


FACTORIES = (
    "tensor",
    "full",
    "zeros",
    "ones",
    "empty",
    "arange",
    "linspace",
    "logspace",
    "rand",
    "randn",
    "randint",
    "eye",
)


def test_package_creates_no_tensor_with_default_dtype_or_device():
    """All code outside the trainer names device and dtype."""
    package, violations = Path(fm.__file__).parent, []
    for path in sorted(package.rglob("*.py")):
        if "trainer" in path.parts:
            continue
        for call in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                continue
            if ast.unparse(call.func.value) != "torch" or call.func.attr not in FACTORIES:
                continue
            named = {keyword.arg for keyword in call.keywords}
            integers = call.func.attr in (
                "arange",
                "randint",
                "tensor",
            )  # torch returns int64 for integers
            if None not in named and not {"device", *(() if integers else ("dtype",))} <= named:
                violations.append(f"{path.relative_to(package)}:{call.lineno}: {ast.unparse(call)}")
    assert not violations
