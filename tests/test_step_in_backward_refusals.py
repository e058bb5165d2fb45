"""What a step in the backward cannot do is an error, and class weights and momentum keep their bits."""

import pytest
import torch
from test_step_in_backward import C, D, example, state_of, unchanged
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fused_margin as fm
from fused_margin.optim import ProjectedSGD, step_in_backward


def accumulate(loss_fn, optimizer, x, y):
    yield loss_fn(x, y).backward()
    loss_fn(x, y).backward()


def backward_twice(loss_fn, optimizer, x, y):
    loss = loss_fn(x, y)
    loss.backward()
    yield optimizer.step()
    with torch.no_grad():
        loss_fn(x, y)
    loss.backward()


def changed_weight(loss_fn, optimizer, x, y):
    loss = loss_fn(x, y)
    with torch.no_grad():
        loss_fn.weight.mul_(1.0)
    yield
    loss.backward()


def with_hook(loss_fn, optimizer, x, y):
    hook = loss_fn.weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    yield
    try:
        loss_fn(x, y)
    finally:
        hook.remove()


def late_hook(loss_fn, optimizer, x, y):
    loss = loss_fn(x, y)
    hook = loss_fn.weight.register_hook(lambda gradient: gradient)
    yield
    try:
        loss.backward()
    finally:
        hook.remove()


def scaled(loss_fn, optimizer, x, y):
    scaler = torch.amp.GradScaler("cpu")
    yield
    scaler.scale(loss_fn(x, y)).backward()


def in_autocast(loss_fn, optimizer, x, y):
    yield
    with torch.autocast("cpu", torch.float16):
        loss_fn(x, y)


def second_loss(loss_fn, optimizer, x, y):
    other = fm.CosFaceLoss(C, D)
    other.weight = loss_fn.weight
    yield
    (loss_fn(x, y) + other(x, y)).backward()


def auxiliary(make):
    def use(loss_fn, optimizer, x, y):
        yield
        (loss_fn(x, y) + make()(x, loss_fn.weight, y)).backward()

    return use


def existing_gradient(loss_fn, optimizer, x, y):
    loss_fn.weight.grad = torch.zeros_like(loss_fn.weight)
    yield
    loss_fn(x, y).backward()


def two_batches(loss_fn, optimizer, x, y):
    yield
    (loss_fn(x, y) + loss_fn(x, y)).backward()


def changed_option(loss_fn, optimizer, x, y):
    optimizer.param_groups[0]["dampening"] = 0.5
    yield
    loss_fn(x, y).backward()


def momentum_in_float64(loss_fn, optimizer, x, y):
    state = optimizer.state[loss_fn.weight]
    name = "momentum_buffer" if "momentum_buffer" in state else "exp_avg"
    state[name] = state[name].double()
    yield
    loss_fn(x, y).backward()


def half_precision(loss_fn, optimizer, x, y):
    yield
    loss_fn(x.half(), y)


def plain(**options):
    def use(loss_fn, optimizer, x, y):
        yield
        loss_fn(x, y).backward(**options)

    return use


REFUSED = {
    "gradient accumulation": (accumulate, "second backward before optimizer.step"),
    "a second backward of one graph": (backward_twice, "freed|changed after this forward"),
    "changed class weights": (changed_weight, "changed after this forward"),
    "retain_graph": (plain(retain_graph=True), "retain_graph=True"),
    "create_graph": (plain(create_graph=True), "retain_graph=True|second derivatives"),
    "hooks": (with_hook, "hooks"),
    "late hooks": (late_hook, "hooks"),
    "GradScaler": (scaled, "GradScaler"),
    "autocast": (in_autocast, "autocast to float16"),
    "float16": (half_precision, "float16"),
    "another loss": (second_loss, "another term"),
    "exclusive term": (
        auxiliary(lambda: lambda x, w, y: fm.functional.exclusive_regularization(w)),
        "another term",
    ),
    "IntraLoss": (auxiliary(fm.IntraLoss), "another term"),
    "InterLoss": (auxiliary(lambda: lambda x, w, y: fm.InterLoss()(w, y)), "another term"),
    "UniformLoss": (auxiliary(lambda: lambda x, w, y: fm.UniformLoss()(w)), "another term"),
    "a gradient": (existing_gradient, "have a gradient"),
    "two batches": (two_batches, "two losses"),
    "an option": (changed_option, "dampening"),
    "a moment of another dtype": (momentum_in_float64, "expected a contiguous matrix"),
}


@pytest.mark.parametrize("optimizer", [ProjectedSGD, pytest.param(torch.optim.AdamW, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", REFUSED)
def test_refusals_change_nothing(case, optimizer):
    use, message = REFUSED[case]
    if case == "an option" and optimizer is torch.optim.AdamW:
        pytest.skip("AdamW has no dampening")
    loss_fn, optimizer, _, (x, y) = example(optimizer)
    running = use(loss_fn, optimizer, x, y)
    next(running)
    before = state_of(loss_fn, optimizer)
    with pytest.raises((RuntimeError, ValueError), match=message):
        next(running)
    assert unchanged(before, loss_fn, optimizer)


@pytest.mark.parametrize(
    ("loss", "options"),
    [(fm.ArcFaceLoss, {"sample_rate": 0.5}), (fm.SoftmaxLoss, {"bias": False})],
)
def test_exclusive_terms_that_are_separate(loss, options):
    """The exclusive term is over all classes, and has its own backward, so that it is refused."""
    loss_fn, optimizer, _, (x, y) = example(loss=loss, **options)
    loss_fn.exclusive_weight = 1.0
    before = state_of(loss_fn, optimizer)
    with pytest.raises(RuntimeError, match="another term"):
        loss_fn(x, y)
    assert unchanged(before, loss_fn, optimizer)


def test_gradient_of_a_regularizer_raises():
    """Autograd learns of it after the step, so that only an error can follow."""
    loss_fn, optimizer, _, (x, y) = example()
    with pytest.raises(RuntimeError, match="another loss|modified by an inplace"):
        (loss_fn(x, y) + loss_fn.weight.sum()).backward()
    with pytest.raises(RuntimeError, match="another loss"):
        optimizer.step()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda l, o: (nn.Linear(3, 3), o), TypeError, "loss_fn"),
        (lambda l, o: (fm.CenterLoss(5, 3), o), TypeError, "loss_fn"),
        (lambda l, o: (l, torch.optim.RMSprop(l.parameters())), TypeError, "RMSprop"),
        (lambda l, o: (l, ProjectedSGD([nn.Parameter(torch.ones(3, 3))], lr=0.1)), ValueError, "loss_fn.weight"),
        (
            lambda l, o: (l, torch.optim.SGD(l.parameters(), lr=0.1, momentum=0.9, dampening=0.1)),
            ValueError,
            "dampening",
        ),
        (lambda l, o: (l, torch.optim.SGD(l.parameters(), lr=0.1, maximize=True)), ValueError, "maximize"),
        (lambda l, o: (l, torch.optim.AdamW(l.parameters(), amsgrad=True)), ValueError, "amsgrad"),
        (lambda l, o: (l.requires_grad_(False), o), ValueError, "frozen"),
        (lambda l, o: (l.half(), o), TypeError, "float16"),
        (lambda l, o: (l, o) if step_in_backward(l, o) else None, RuntimeError, "already"),
    ],
)
def test_errors_of_the_call(change, error, message):
    loss_fn = fm.ArcFaceLoss(C, D)
    arguments = change(loss_fn, ProjectedSGD(loss_fn.parameters(), lr=0.1))
    with pytest.raises(error, match=message):
        step_in_backward(*arguments)


def test_strided_weights():
    loss_fn = fm.ArcFaceLoss(C, D)
    loss_fn.weight = nn.Parameter(loss_fn.weight.detach().t().contiguous().t())
    with pytest.raises(ValueError, match="contiguous"):
        step_in_backward(loss_fn, ProjectedSGD(loss_fn.parameters(), lr=0.1))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.loss_fn = nn.Linear(D, D), fm.ArcFaceLoss(C, D)

    def forward(self, x, y):
        return self.loss_fn(self.backbone(x), y)


def data_parallel(group):
    torch.manual_seed(0)
    model = Model()
    step_in_backward(model.loss_fn, ProjectedSGD(model.loss_fn.parameters(), lr=0.1))
    wrapped, before = DistributedDataParallel(model, process_group=group), model.loss_fn.weight.detach().clone()
    try:
        wrapped(torch.randn(4, D), torch.arange(4)).backward()
    except RuntimeError as error:
        return str(error), torch.equal(before, model.loss_fn.weight)
    return "no error", True


def test_data_parallel_is_refused(ranks):
    for message, same in ranks.run(data_parallel, [(), ()]):
        assert "DistributedDataParallel" in message and same
