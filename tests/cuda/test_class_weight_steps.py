"""Steps of class weights in the backward on a device, against the ordinary way there and on the CPU.

Small differences between two ways to round grow with every step, so that they are compared after few steps.
"""

from dataclasses import dataclass, field
from functools import cache

import pytest
import step_cases
import torch
from on_device import DEVICE, half_products, needs_cuda, sanitizer
from step_cases import DTYPES, SIZES, Rows, assert_close, assert_nearly_same_bits, bf16, f32, f64

import fused_margin as fm
from fused_margin._ops.backends import select
from fused_margin._ops.backends.select import kernels_on
from fused_margin.optim import ProjectedSGD, project_, step_in_backward

pytestmark = needs_cuda

STEPS = 20


def projected(parameters):
    return ProjectedSGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2)


def nesterov(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2)


def plain(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4, weight_decay=1e-2)


@dataclass
class Case:
    optimizer: object = projected
    options: dict = field(default_factory=dict)  # of the loss
    size: int = 64
    classes: int = 700
    dtype: torch.dtype = f32

    def train(self, device, in_backward, dtype=None, steps=STEPS, **options):
        """The class weights and their moments after some steps, all random numbers as in every other run."""
        options = {**self.options, **options}
        torch.manual_seed(0)
        loss_fn = fm.ArcFaceLoss(self.classes, self.size, scale=16.0, **options)
        start = torch.nn.functional.normalize(torch.randn(loss_fn.weight.shape, dtype=f64), dim=1)
        x = torch.randn(steps, 96, self.size, dtype=f64).to(f32)
        y = torch.randint(self.classes, (steps, 96)).to(device)
        loss_fn = loss_fn.to(device, dtype or self.dtype)
        with torch.no_grad():
            loss_fn.weight.copy_(start)
        optimizer = self.optimizer([loss_fn.weight])
        if in_backward:
            step_in_backward(loss_fn, optimizer)
        for k in range(steps):
            torch.manual_seed(k)  # of the classes that are drawn
            embeddings = x[k].to(device, f64 if dtype == f64 else f32).requires_grad_()
            loss_fn(embeddings, y[k]).backward()
            assert (loss_fn.weight.grad is None) == in_backward
            assert embeddings.grad.isfinite().all()
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state[loss_fn.weight]
        moments = [state[name] for name in ("momentum_buffer", "exp_avg", "exp_avg_sq") if name in state]
        return Run([t.detach().cpu().double() for t in (loss_fn.weight, *moments)], start)


@dataclass
class Run:
    tensors: list
    start: torch.Tensor

    def error(self, other):
        """The largest difference, relative to the change of the weights and to the size of the moments."""
        changes = [other.tensors[0] - self.start, *other.tensors[1:]]
        pairs = zip(self.tensors, other.tensors, changes, strict=True)
        return max(float((a - b).norm() / change.norm()) for a, b, change in pairs)


CASES = {
    "projected": Case(),
    "projected and smoothed": Case(options={"label_smoothing": 0.1}),
    "exclusive": Case(options={"exclusive_weight": 0.5}),
    "exclusive without momentum": Case(plain, {"exclusive_weight": 0.5}),
    "nesterov": Case(nesterov, {"exclusive_weight": 0.5}, size=40),
    "adamw": Case(adamw),
    "many chunks": Case(options={"workspace_mb": 0.2, "exclusive_weight": 0.5, "label_smoothing": 0.1}),
    "smallest chunks": Case(adamw, {"workspace_mb": 1e-6}, size=45),
    "long rows": Case(size=600, classes=300),
    "longest rows": Case(size=1030, classes=300),
}


@cache
def in_float64(name):
    return CASES[name].train("cpu", False, f64)


@half_products
@pytest.mark.parametrize("name", CASES)
def test_steps_of_a_loss(backend, name):
    ordinary, stepped = (CASES[name].train(DEVICE, in_backward) for in_backward in (False, True))
    limit = 1e-3 if CASES[name].optimizer is adamw else 1e-4
    assert stepped.error(ordinary) < limit and stepped.error(in_float64(name)) < limit


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
@pytest.mark.parametrize("optimizer", [projected, adamw], ids=["projected", "adamw"])
def test_steps_of_sub_centers(optimizer, dtype):
    case = Case(optimizer, {"sub_centers": 3, "workspace_mb": 0.2}, classes=200)
    ordinary, stepped = (case.train(DEVICE, in_backward, dtype) for in_backward in (False, True))
    limit = 1e-3 if dtype == f32 else 1e-10
    assert stepped.error(ordinary) < limit and stepped.error(case.train("cpu", False, f64)) < limit


@half_products
@pytest.mark.parametrize("optimizer", [projected, adamw], ids=["projected", "adamw"])
def test_steps_of_drawn_classes(backend, optimizer):
    """Sparse gradients step the drawn classes only, as a step in the backward does. AdamW has none."""
    case = Case(optimizer, {"sample_rate": 0.5, "workspace_mb": 0.2})
    stepped, again = (case.train(DEVICE, True) for _ in range(2))
    assert all(map(torch.equal, stepped.tensors, again.tensors))
    if optimizer is projected:
        assert stepped.error(case.train(DEVICE, False, sparse=True)) < 1e-3
    one = case.train(DEVICE, True, steps=1)
    changed = (one.tensors[1] != 0).any(1)
    assert 340 < changed.sum() < 360
    assert torch.equal(one.tensors[0][~changed], one.start.float().double()[~changed])


@half_products
@pytest.mark.parametrize("optimizer", [projected, adamw], ids=["projected", "adamw"])
def test_steps_of_bfloat16_weights(backend, optimizer):
    """The random bits do not depend on the device. Steps smaller than a unit in the last place count on average."""
    case = Case(optimizer, {"workspace_mb": 0.3}, dtype=bf16)
    one = case.train(DEVICE, True, steps=1)
    with select.force_backend(select.PORTABLE):
        on_cpu = case.train("cpu", True, steps=1)
    assert (one.tensors[0] != on_cpu.tensors[0]).double().mean() < 0.05  # other bits would change about half of them
    for a, b in zip(one.tensors, on_cpu.tensors, strict=True):
        limit = 2 * torch.finfo(bf16).eps
        torch.testing.assert_close(a, b, rtol=limit, atol=limit * float(b.abs().max()))
    many = case.train(DEVICE, True)
    with select.force_backend(select.PORTABLE):
        exact = case.train("cpu", False, f64)
    assert torch.nn.functional.cosine_similarity(many.tensors[0], exact.tensors[0]).min() > 0.999


@half_products
def test_a_loss_that_is_not_finite_changes_nothing(backend):
    for value in (torch.nan, torch.inf):
        loss_fn = fm.ArcFaceLoss(500, 64, device=DEVICE, exclusive_weight=0.1, workspace_mb=0.2)
        optimizer = projected([loss_fn.weight])
        step_in_backward(loss_fn, optimizer)
        x, y = torch.randn(2, 33, 64, device=DEVICE), torch.randint(500, (33,), device=DEVICE)
        x[1, 7, 5] = value
        before = []
        for k in range(2):
            loss = loss_fn(x[k].requires_grad_() if k == 0 else x[k], y)
            loss.backward()
            optimizer.step()
            state = [loss_fn.weight.detach().clone(), optimizer.state[loss_fn.weight]["momentum_buffer"].clone()]
            if k == 0:
                before = state
        assert not loss.isfinite()
        assert all(map(torch.equal, before, state)) and before[1].any()


@pytest.mark.parametrize("size", [*SIZES, 45])
@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_projected_steps_of_an_ordinary_gradient(dtype, size):
    start = torch.randn(1000, size, device=DEVICE, dtype=dtype)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = projected([ours]), torch.optim.SGD([theirs], lr=0.05, momentum=0.9, weight_decay=1e-2)
    for _ in range(5):
        gradient = torch.randn_like(start)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
        project_(theirs.detach())
    limit = 1e-5 if dtype == f32 else 1e-13
    torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit)
    buffers = [o.state[p]["momentum_buffer"] for o, p in zip(optimizers, (ours, theirs), strict=True)]
    torch.testing.assert_close(*buffers, rtol=limit, atol=limit)


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("rule", ["projected sgd", "momentum", pytest.param("projected adam", marks=sanitizer)])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_kernel_against_the_cpu(dtypes, rule, stochastic):
    (compute, stored), update = DTYPES[dtypes], step_cases.RULES[rule]._replace(stochastic=stochastic)
    for size in SIZES:
        rows, gradient = Rows.of(update, 33, size, stored), torch.randn(33, size, dtype=compute)
        added, selected = torch.randn(33, size, dtype=compute), torch.randperm(33)[:20].sort().values
        for part, chosen in ((33, None), (20, selected)):
            results = []
            for device in map(torch.device, ("cpu", DEVICE)):
                with kernels_on(device) as run:
                    stepped = step_cases.step(
                        run, rows.map(lambda t, device=device: t.to(device)), gradient[:part].to(device), update,
                        added=added.to(device), selected=None if chosen is None else chosen.to(device),
                        skip=torch.zeros(1, dtype=torch.bool, device=device),
                    )  # fmt: skip
                results.append(stepped.map(torch.Tensor.cpu))
            expected, measured = results
            if stored == bf16:
                assert_nearly_same_bits(measured, expected)
            else:
                assert_close(measured, expected, compute)


@half_products
@sanitizer
def test_steps_in_several_parts(backend):
    """Few small steps with all terms, for compute-sanitizer."""
    case = Case(projected, {"exclusive_weight": 0.5, "workspace_mb": 1e-6}, size=40, classes=200)
    if backend != select.PORTABLE:
        case.size = 64
    ordinary, stepped = (case.train(DEVICE, in_backward, steps=2) for in_backward in (False, True))
    assert stepped.error(ordinary) < 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_results_are_deterministic(size):
    """Rows of bfloat16 included: the random bits depend on the step and the element alone."""
    for optimizer in (projected, adamw):
        case = Case(optimizer, {"exclusive_weight": 0.5}, size=size, classes=301, dtype=bf16)
        first, *others = (case.train(DEVICE, True, steps=5) for _ in range(4))
        for other in others:
            assert all(map(torch.equal, first.tensors, other.tensors))
