"""step_in_backward against the ordinary way: a gradient, the step of torch's optimizer, a projection."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fused_margin as fm
from fused_margin._ops.inputs import LossInputs
from fused_margin._ops.library import FIELDS, forward_chunks
from fused_margin._ops.row_update import PART_BYTES, RowStepper, RowUpdate, Rule
from fused_margin._ops.weight_steps import backward_step, step_rows
from fused_margin.compat import insightface
from fused_margin.optim import ProjectedSGD, step_in_backward

N, C, D = 24, 90, 12
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
MOMENTUM = {"momentum": 0.9, "weight_decay": 5e-4}
OPTIMIZERS = {
    "projected": (ProjectedSGD, torch.optim.SGD, {"lr": 0.005, **MOMENTUM}),
    "projected without momentum": (ProjectedSGD, torch.optim.SGD, {"lr": 0.005, "momentum": 0.0, "weight_decay": 5e-4}),
    "sgd": (torch.optim.SGD, torch.optim.SGD, {"lr": 0.005, **MOMENTUM}),
    "nesterov": (torch.optim.SGD, torch.optim.SGD, {"lr": 0.005, "nesterov": True, **MOMENTUM}),
    "adamw": (torch.optim.AdamW, torch.optim.AdamW, {"lr": 0.002, "eps": 1e-3}),
    "adam": (torch.optim.Adam, torch.optim.Adam, {"lr": 0.002, "eps": 1e-3, "weight_decay": 0.01}),
}


def class_weight():
    return torch.rand(C, generator=torch.Generator().manual_seed(2)) + 0.5


class PerSampleMargin(fm.ArcFaceLoss):
    """A margin for each sample."""

    def current_margin(self, embeddings, labels):
        return fm.Margin(m2=0.2 + 0.3 * (labels % 5).double() / 5)


LOSSES = {
    "ArcFace": lambda **o: fm.ArcFaceLoss(C, D, scale=16.0, **o),
    "exclusive term": lambda **o: fm.ArcFaceLoss(C, D, scale=16.0, exclusive_weight=2.0, **o),
    "certified refresh": lambda **o: fm.ArcFaceLoss(
        C, D, scale=16.0, exclusive_weight=2.0, exclusive_refresh="certified", **o
    ),
    "label smoothing": lambda **o: fm.CosFaceLoss(
        C, D, scale=16.0, label_smoothing=0.1, class_weight=class_weight(), **o
    ),
    "class weights": lambda **o: fm.CosFaceLoss(C, D, scale=16.0, class_weight=class_weight(), **o),
    "sub-centers": lambda **o: fm.SubCenterArcFaceLoss(C, D, scale=16.0, sub_centers=3, **o),
    "per-sample margins": lambda **o: PerSampleMargin(C, D, scale=16.0, **o),
    "annealing": lambda **o: fm.SphereFaceLoss(C, D, **o),
    "norm of the embedding": lambda **o: fm.NormFaceLoss(C, D, scale=nn.Parameter(torch.tensor(16.0)), **o),
    "hard negatives": lambda **o: fm.CurricularFaceLoss(C, D, scale=16.0, **o),
    "inner products": lambda **o: fm.SoftmaxLoss(C, D, label_smoothing=0.1, **o),
    "lengths": lambda **o: fm.LSoftmaxLoss(C, D, **o),
    "many chunks": lambda **o: fm.ArcFaceLoss(C, D, scale=16.0, workspace_mb=1e-6, exclusive_weight=1.0, **o),
}


def batches(steps, dtype, classes=C, samples=N):
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(classes, D, generator=generator, dtype=torch.float64)
    for _ in range(steps):
        labels = torch.randint(classes, (samples,), generator=generator)
        noise = torch.randn(samples, D, generator=generator, dtype=torch.float64)
        yield (centers[labels] + 0.5 * noise).to(dtype).requires_grad_(), labels


def normalized_(loss_fn):
    with torch.no_grad():
        loss_fn.weight.copy_(F.normalize(loss_fn.weight.double(), dim=1))


def ordinary(make, name, steps, dtype):
    """The embeddings' gradient in the last step, and the loss, trained by torch's optimizer and F.normalize."""
    torch.manual_seed(0)
    loss_fn = make(dtype=dtype)
    ours, theirs, options = OPTIMIZERS[name]
    normalized_(loss_fn)
    optimizer = theirs(loss_fn.parameters(), **options)
    for step, (x, y) in enumerate(batches(steps, dtype)):
        torch.manual_seed(step)
        loss_fn(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if ours is ProjectedSGD:
            normalized_(loss_fn)
    return x.grad, loss_fn, optimizer


def in_backward(make, name, steps, dtype):
    torch.manual_seed(0)
    loss_fn = make(dtype=dtype)
    ours, _, options = OPTIMIZERS[name]
    normalized_(loss_fn)
    optimizer = ours(loss_fn.parameters() if ours is not ProjectedSGD else groups_of(loss_fn), **options)
    handle = step_in_backward(loss_fn, optimizer)
    for step, (x, y) in enumerate(batches(steps, dtype)):
        torch.manual_seed(step)
        loss_fn(x, y).backward()
        assert loss_fn.weight.grad is None
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    return x.grad, loss_fn, optimizer


def groups_of(loss_fn):
    others = [p for p in loss_fn.parameters() if p is not loss_fn.weight]
    return [{"params": [loss_fn.weight]}, *([{"params": others, "project": False}] if others else [])]


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def compare(make, name, steps, dtype):
    gradient, loss_fn, optimizer = in_backward(make, name, steps, dtype)
    expected_gradient, expected, expected_optimizer = ordinary(make, name, steps, dtype)
    tolerance = TOLERANCE[dtype]
    assert relative(gradient, expected_gradient) < 10 * tolerance
    for (key, value), wanted in zip(loss_fn.named_parameters(), expected.parameters(), strict=True):
        assert relative(value, wanted) <= tolerance, key
    state, wanted_state = optimizer.state[loss_fn.weight], expected_optimizer.state[expected.weight]
    for key in wanted_state:
        if wanted_state[key] is not None:
            assert relative(state[key], wanted_state[key]) <= 10 * tolerance, key


@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_ordinary_way(loss):
    compare(LOSSES[loss], "projected", 5, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_ordinary_way_for_200_steps(loss, dtype):
    compare(LOSSES[loss], "projected", 200, dtype)


@pytest.mark.parametrize("steps", [5, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("loss", [pytest.param("ArcFace", marks=pytest.mark.slow), "exclusive term"])
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "projected"])
def test_optimizers(optimizer, loss, steps):
    compare(LOSSES[loss], optimizer, steps, torch.float64)


def divided_training(group, inputs, options):
    """The class weights and momentum of one rank after training in the backward."""
    torch.manual_seed(0)
    loss_fn = fm.ArcFaceLoss(C, D, scale=16.0, process_group=group, dtype=torch.float64, **options)
    with torch.no_grad():
        loss_fn.weight.copy_(loss_fn.shard.local_part(start_weight(loss_fn.sub_centers)))
    optimizer = ProjectedSGD(loss_fn.parameters(), lr=0.005, **MOMENTUM)
    step_in_backward(loss_fn, optimizer)
    for x, y in inputs:
        x = x.requires_grad_()
        loss_fn(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss_fn.weight.detach(), optimizer.state[loss_fn.weight]["momentum_buffer"], x.grad


def start_weight(sub_centers):
    generator = torch.Generator().manual_seed(5)
    return F.normalize(torch.randn(C * sub_centers, D, generator=generator, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("world_size", [2, 3])
def test_divided_classes(ranks, world_size):
    compare_divided(ranks, world_size, {"exclusive_weight": 2.0, "label_smoothing": 0.1}, 3)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"exclusive_weight": 2.0}, {"label_smoothing": 0.1}, {"sub_centers": 2}], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_divided_classes_for_200_steps(ranks, world_size, options):
    compare_divided(ranks, world_size, options, 200)


def compare_divided(ranks, world_size, options, steps):
    inputs = [(x.detach(), y) for x, y in batches(steps, torch.float64)]
    parts = [[] for _ in range(world_size)]
    for x, y in inputs:
        for part, own in zip(
            parts, zip(x.tensor_split(world_size), y.tensor_split(world_size), strict=True), strict=True
        ):
            part.append(own)
    results = ranks.run(divided_training, [(part, options) for part in parts])

    loss_fn = fm.ArcFaceLoss(C, D, scale=16.0, dtype=torch.float64, **options)
    with torch.no_grad():
        loss_fn.weight.copy_(start_weight(loss_fn.sub_centers))
    optimizer = torch.optim.SGD(loss_fn.parameters(), lr=0.005, **MOMENTUM)
    for x, y in inputs:
        x = x.requires_grad_()
        loss_fn(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        normalized_(loss_fn)
    momentum = optimizer.state[loss_fn.weight]["momentum_buffer"]
    for index, expected in enumerate((loss_fn.weight.detach(), momentum, x.grad)):
        assert relative(torch.cat([result[index] for result in results]), expected) < 1e-12


@pytest.mark.parametrize("rate", [0.3, 1e-3])
def test_sampled_classes(rate):
    """Only the drawn rows and their momentum change, each by the step of torch.optim.SGD and a projection."""
    made = [
        fm.SubCenterArcFaceLoss(C, D, sub_centers=2, scale=16.0, sample_rate=rate, sparse=True, dtype=torch.float64)
        for _ in range(2)
    ]
    stepped, expected = made
    expected.load_state_dict(stepped.state_dict())
    optimizer = ProjectedSGD(stepped.parameters(), lr=0.05, **MOMENTUM)
    step_in_backward(stepped, optimizer)
    momentum = torch.zeros_like(expected.weight)
    changed = torch.zeros(2 * C, dtype=torch.bool)
    for step, (x, y) in enumerate(batches(6, torch.float64)):
        for loss_fn in made:
            torch.manual_seed(step)
            x.grad = None
            loss_fn(x, y).backward()
        gradient, expected.weight.grad = expected.weight.grad.coalesce(), None
        optimizer.step()
        rows, values = gradient.indices()[0], gradient.values()
        changed[rows] = True
        with torch.no_grad():
            momentum[rows] = 0.9 * momentum[rows] + values + 5e-4 * expected.weight[rows]
            expected.weight[rows] = F.normalize(expected.weight[rows] - 0.05 * momentum[rows], dim=1)
    assert 0 < changed.sum() < len(changed)
    torch.testing.assert_close(stepped.weight, expected.weight, rtol=0, atol=1e-13)
    torch.testing.assert_close(optimizer.state[stepped.weight]["momentum_buffer"], momentum, rtol=0, atol=1e-13)


def example(optimizer=ProjectedSGD, dtype=torch.float32, loss=fm.ArcFaceLoss, **options):
    """A loss that has made one step in the backward, its optimizer, its handle, and a batch."""
    torch.manual_seed(0)
    loss_fn = loss(C, D, dtype=dtype, **options)
    arguments = MOMENTUM if issubclass(optimizer, torch.optim.SGD) else {}
    optimizer = optimizer(loss_fn.parameters(), lr=0.05, **arguments)
    handle = step_in_backward(loss_fn, optimizer)
    (x, y), (next_x, next_y) = batches(2, torch.float64)
    loss_fn(x.detach().to(dtype), y).backward()
    optimizer.step()
    return loss_fn, optimizer, handle, (next_x.detach().to(dtype).requires_grad_(), next_y)


def state_of(loss_fn, optimizer):
    state = optimizer.state[loss_fn.weight]
    return [loss_fn.weight.detach().clone(), *(v.clone() for v in state.values() if isinstance(v, torch.Tensor))]


def unchanged(before, loss_fn, optimizer):
    return all(map(torch.equal, before, state_of(loss_fn, optimizer)))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e37])
@pytest.mark.parametrize("where", ["embeddings", "ignored embedding", "weight", "loss"])
def test_what_is_not_finite_changes_nothing(where, poison):
    if poison == 1e37 and where != "loss":
        pytest.skip("finite")
    loss_fn, optimizer, _, (x, y) = example(exclusive_weight=1.0)
    if where == "weight":
        with torch.no_grad():
            loss_fn.weight[3, 2] = poison
    elif where != "loss":
        y[1] = -100 if where == "ignored embedding" else y[1]
        with torch.no_grad():
            x[1, 0] = poison
    before = [t.clone() for t in state_of(loss_fn, optimizer)]
    (loss_fn(x, y) * (poison if where == "loss" else 1.0)).backward()
    optimizer.step()
    for old, new in zip(before, state_of(loss_fn, optimizer), strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num())
    if where == "weight":
        return
    loss_fn(torch.ones_like(x), y).backward()
    assert not unchanged(before, loss_fn, optimizer)


def test_other_derivatives_are_ordinary():
    """torch.autograd.grad returns gradients, and backward(inputs=...) accumulates only these; neither makes a step."""
    loss_fn, optimizer, handle, (x, y) = example(dtype=torch.float64, exclusive_weight=1.0)
    before = state_of(loss_fn, optimizer)
    gradients = torch.autograd.grad(loss_fn(x, y), [x, loss_fn.weight])
    loss_fn(x, y).backward(inputs=[x])
    with torch.no_grad():
        loss_fn(x, y)
    assert unchanged(before, loss_fn, optimizer) and loss_fn.weight.grad is None
    handle.remove()
    expected = torch.autograd.grad(loss_fn(x, y), [x, loss_fn.weight])
    for actual, wanted in zip((*gradients, x.grad), (*expected, expected[0]), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-14)
    loss_fn(x, y).backward()
    assert loss_fn.weight.grad is not None  # after `remove`


def test_copies_are_ordinary():
    loss_fn, _, handle, (x, y) = example()
    file = io.BytesIO()
    torch.save(loss_fn, file)
    file.seek(0)
    for other in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn)), torch.load(file, weights_only=False)):
        assert other.stepper is None
        other(x, y).backward()
        assert other.weight.grad is not None
    weight = loss_fn.weight.detach().clone().requires_grad_()
    torch.func.functional_call(loss_fn, {"weight": weight}, (x, y)).backward()
    assert weight.grad is not None and loss_fn.stepper is handle


@pytest.mark.parametrize("optimizer", [ProjectedSGD, torch.optim.AdamW])
@pytest.mark.parametrize("first", [True, False])
def test_state_is_the_optimizers(first, optimizer):
    """A run changes between both ways by a checkpoint, and scheduled learning rates act."""
    results = []
    for ways in ((first, not first), (False, False)):
        state = None
        for way in ways:
            torch.manual_seed(0)
            loss_fn = fm.ArcFaceLoss(C, D, scale=16.0, dtype=torch.float64)
            made = optimizer(loss_fn.parameters(), lr=0.01)
            schedule = torch.optim.lr_scheduler.StepLR(made, 2, 0.1)
            if state is not None:
                loss_fn.load_state_dict(state[0])
                made.load_state_dict(state[1])
                schedule.load_state_dict(state[2])
            if way:
                step_in_backward(loss_fn, made)
            for x, y in batches(3, torch.float64):
                loss_fn(x, y).backward()
                made.step()
                made.zero_grad()
                schedule.step()
            state = copy.deepcopy((loss_fn.state_dict(), made.state_dict(), schedule.state_dict()))
        results.append(loss_fn.weight.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_activation_checkpointing():
    results = []
    for wrapped in (False, True):
        loss_fn, optimizer, _, (x, y) = example(dtype=torch.float64)
        loss = checkpoint(loss_fn, x, y, use_reentrant=False) if wrapped else loss_fn(x, y)
        loss.backward()
        results.append((*state_of(loss_fn, optimizer), x.grad))
    assert all(map(torch.equal, *results))


def test_an_interrupted_step_is_not_continued(monkeypatch):
    loss_fn, optimizer, _, (x, y) = example(workspace_mb=1e-6)
    original, calls = RowStepper.step, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RowStepper, "step", interrupted)
        loss_fn(x, y).backward()
    optimizer.step()
    before = state_of(loss_fn, optimizer)
    with pytest.raises(RuntimeError, match="stopped an earlier step"):
        loss_fn(x, y).backward()
    assert unchanged(before, loss_fn, optimizer)


def test_subclasses_of_optimizers():
    class Own(torch.optim.SGD):
        pass

    class OwnStep(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    loss_fn = fm.ArcFaceLoss(C, D)
    step_in_backward(loss_fn, Own(loss_fn.parameters(), lr=0.1)).remove()
    with pytest.raises(TypeError, match="OwnStep"):
        step_in_backward(loss_fn, OwnStep(loss_fn.parameters(), lr=0.1))


@pytest.mark.slow
def test_compiled_step():
    """A whole training step under torch.compile, and other losses, which are not compiled again for every handle."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        loss_fn, optimizer, _, (x, y) = example(dtype=torch.float64)

        def step(x, y, loss_fn=loss_fn, optimizer=optimizer):
            loss_fn(x, y).backward()
            optimizer.step()
            optimizer.zero_grad()

        function = torch.compile(step, backend="eager") if compiled else step
        function(x, y)
        function(x, y)
        results.append(state_of(loss_fn, optimizer))
    assert all(map(torch.equal, *results))
    other, kept = torch.compile(fm.ArcFaceLoss(C, D), backend="eager", fullgraph=True), []
    for _ in range(10):
        other(x.float(), y).backward()
        loss_fn = fm.ArcFaceLoss(C, D)
        kept.append((loss_fn, step_in_backward(loss_fn, ProjectedSGD(loss_fn.parameters(), lr=0.1))))


@pytest.mark.slow
def test_compiled():
    """torch.compile leaves the call out of its graphs."""
    results = []
    for compiled in (False, True):
        loss_fn, optimizer, _, (x, y) = example(dtype=torch.float64)
        head = lambda x, y, loss_fn=loss_fn: loss_fn(x * 2, y) + 0.0
        (torch.compile(head) if compiled else head)(x, y).backward()
        results.append((*state_of(loss_fn, optimizer), x.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def bfloat16_weights(threads=2, workspace_mb=256, seed=0, stochastic=True, optimizer=ProjectedSGD, lr=0.05):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    loss_fn = fm.ArcFaceLoss(700, 257, scale=16.0, dtype=torch.bfloat16, workspace_mb=workspace_mb)
    made = optimizer(loss_fn.parameters(), lr=lr)
    step_in_backward(loss_fn, made, stochastic_rounding=stochastic, seed=seed)
    x = torch.randn(8, 257)
    for _ in range(3):
        loss_fn(x, torch.arange(8)).backward()
        made.step()
    return state_of(loss_fn, made)


@pytest.mark.parametrize("optimizer", [ProjectedSGD, torch.optim.AdamW])
def test_stochastic_rounding_repeats(optimizer):
    threads = torch.get_num_threads()
    try:
        expected = bfloat16_weights(optimizer=optimizer)
        assert all(map(torch.equal, expected, bfloat16_weights(threads=1, optimizer=optimizer)))
        assert not all(map(torch.equal, expected, bfloat16_weights(seed=1, optimizer=optimizer)))
        assert not all(map(torch.equal, expected, bfloat16_weights(stochastic=False, optimizer=optimizer)))
    finally:
        torch.set_num_threads(threads)


def test_small_steps_of_bfloat16_weights():
    """Steps far below half a unit in the last place: rounding to nearest loses them, stochastic rounding does not."""
    torch.manual_seed(0)
    start = torch.randn(300, 64).bfloat16()
    moved = {}
    for stochastic in (True, False):
        loss_fn = fm.SoftmaxLoss(300, 64, bias=False, dtype=torch.bfloat16)
        with torch.no_grad():
            loss_fn.weight.copy_(start)
        optimizer = torch.optim.SGD(loss_fn.parameters(), lr=1e-4, weight_decay=1.0)
        step_in_backward(loss_fn, optimizer, stochastic_rounding=stochastic)
        for _ in range(50):
            loss_fn(torch.zeros(1, 64, requires_grad=True), torch.zeros(1, dtype=torch.long)).backward()
            optimizer.step()
        moved[stochastic] = (loss_fn.weight.double().abs().mean() / start.double().abs().mean()).item()
    assert moved[False] == 1.0
    assert abs(moved[True] - (1 - 1e-4) ** 50) < 1e-3


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_partial_fc(rate):
    """InsightFace's head: the same step as with a stored gradient."""
    results = []
    for way in (False, True):
        torch.manual_seed(0)
        head = insightface.PartialFC_V2(insightface.ArcFace(), D, C, sample_rate=rate, sparse=True)
        optimizer = ProjectedSGD([{"params": list(head.parameters()), "project": False}], lr=0.01, **MOMENTUM)
        if way:
            step_in_backward(head, optimizer)
        for step, (x, y) in enumerate(batches(3, torch.float32)):
            torch.manual_seed(step)
            head(x, y).backward()
            assert way == (head.weight.grad is None)
            optimizer.step()
            optimizer.zero_grad()
        results.append(head.weight.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_opcheck():
    torch.manual_seed(0)
    weight, gradient, momentum = torch.randn(3, 20, 5).unbind()
    update = RowUpdate(momentum, None, Rule.SGD, 0.1, beta1=0.9, project=True)
    torch.library.opcheck(step_rows, (weight.clone(), gradient, None, *update))
    torch.library.opcheck(step_rows, (weight.clone(), gradient[:2].clone(), torch.tensor([3, 7]), *update))
    inputs = LossInputs(torch.randn(4, 5), weight, 1 << 20, "portable", torch.arange(4), scale_value=16.0)
    values = [getattr(inputs, field.name) for field in FIELDS]
    saved = forward_chunks(*values, False, -100, True)
    upstream = torch.ones(2, 4, dtype=torch.float64).unbind()
    torch.library.opcheck(backward_step, (*values, *upstream, None, None, None, None, *saved, True, False, *update))


@pytest.mark.parametrize("rule", list(Rule))
def test_steps_do_not_depend_on_parts_and_threads(rule, monkeypatch):
    """Bits of the step of a gradient, in bfloat16 with stochastic rounding."""
    torch.manual_seed(0)
    start, gradient = torch.randn(5000, 33).bfloat16(), torch.randn(5000, 33)
    threads, results = torch.get_num_threads(), []
    try:
        for count, size in ((1, 8 << 20), (2, 8 << 20), (3, 1 << 10), (2, 100_000)):
            torch.set_num_threads(count)
            monkeypatch.setitem(PART_BYTES, "cpu", size)
            weight, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
            update = RowUpdate(
                first, second, rule, 0.1, beta1=0.9, beta2=0.99, eps=1e-8, project=True, stochastic=True, seed=3, step=2
            )
            step_rows(weight, gradient, None, *update)
            results.append((weight, first, second))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_example_in_the_documentation():
    text = (Path(__file__).parents[1] / "docs/guide/step-in-backward.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], names)  # noqa: S102
    assert names["loss_fn"].weight.grad is None
    torch.testing.assert_close(names["loss_fn"].weight.norm(dim=1), torch.ones(1000))
