"""State that a forward updates in training mode: its precision under casts, and activation checkpointing."""

import copy
import pickle
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fused_margin as fm
from fused_margin.losses.running_state import recomputing

LOSSES = ["SphereFaceLoss", "LSoftmaxLoss", "AdaFaceLoss", "CurricularFaceLoss"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def labels():
    return torch.arange(16) * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_casts_keep_the_dtype_of_the_state(name, dtype):
    loss_fn = getattr(fm, name)(50, 32)
    loss_fn(torch.randn(16, 32), labels())
    before = {key: value.clone() for key, value in loss_fn.named_buffers()}
    loss_fn.to(dtype)
    assert loss_fn.weight.dtype == dtype and before
    for key, value in loss_fn.named_buffers():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key])
    loss_fn(torch.randn(16, 32, dtype=dtype), labels()).backward()
    assert loss_fn.weight.grad.dtype == dtype


def test_running_mean_of_norms_is_updated_in_bfloat16():
    loss_fn = fm.AdaFaceLoss(50, 32).bfloat16()
    embeddings = torch.full((16, 32), 4.5, dtype=torch.bfloat16)
    for _ in range(400):
        loss_fn(embeddings, labels())
    norm = 4.5 * 32**0.5
    assert loss_fn.norm_mean.item() == pytest.approx(norm + (20.0 - norm) * 0.99**400, rel=1e-9)


def test_state_moves_between_devices_and_through_state_dicts():
    loss_fn = fm.CurricularFaceLoss(50, 32)
    loss_fn(torch.randn(16, 32), labels())
    assert loss_fn.to("meta").t.dtype == torch.float64
    other = fm.CurricularFaceLoss(50, 32).half()
    other.load_state_dict({"weight": torch.zeros(50, 32), "t": torch.tensor([0.3], dtype=torch.float32)})
    assert other.t.dtype == torch.float64 and other.t.item() == pytest.approx(0.3, abs=1e-7)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved tensor hooks", "reentrant"])
@pytest.mark.parametrize("name", [*LOSSES, "ElasticFaceLoss", "ArcFaceLoss"])
def test_activation_checkpointing(name, use_reentrant):
    torch.manual_seed(0)
    plain = getattr(fm, name)(50, 32)
    other = copy.deepcopy(plain)
    for step in range(3):
        x = (3 * torch.randn(16, 32)).requires_grad_()
        again = x.detach().clone().requires_grad_()
        torch.manual_seed(step)
        plain(x, labels()).backward()
        torch.manual_seed(step)
        y = labels()
        checkpoint(other, again, y, use_reentrant=use_reentrant).backward()
        torch.testing.assert_close(again.grad, x.grad, rtol=0, atol=0)
    for (key, value), expected in zip(other.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(value, expected), key


@pytest.mark.parametrize("refresh", ["certified", 2])
def test_activation_checkpointing_of_the_exclusive_term(refresh):
    torch.manual_seed(0)
    plain = fm.ArcFaceLoss(50, 32, exclusive_weight=1.0, exclusive_refresh=refresh)
    other = copy.deepcopy(plain)
    for _ in range(3):
        x, y = torch.randn(16, 32, requires_grad=True), labels()
        for loss_fn in (plain, other):
            loss_fn.zero_grad()
        plain(x, y).backward()
        checkpoint(other, x, y, use_reentrant=False).backward()
        assert torch.equal(plain.weight.grad, other.weight.grad)
        with torch.no_grad():
            for loss_fn in (plain, other):
                loss_fn.weight.sub_(0.1 * plain.weight.grad)
    for (key, value), expected in zip(other.exclusive.named_buffers(), plain.exclusive.buffers(), strict=True):
        assert torch.equal(value[0], expected[0]), key


def two_views(call, loss_fn, x):
    """Two batches with the same labels; the second uses the state after the first."""
    return call(loss_fn, x[0], labels()) + call(loss_fn, x[1], labels())


def several_batches(call, loss_fn, x):
    return sum(call(loss_fn, part, labels() + k) for k, part in enumerate(x))


def another_forward_without_gradient(call, loss_fn, x):
    loss = call(loss_fn, x[0], labels())
    with torch.no_grad():
        loss_fn(x[0], labels())
    return loss


def labels_created_inside(call, loss_fn, x):
    return call(lambda x, y: loss_fn(x, y.clone()), x[0], labels())


def rows_with_nan(call, loss_fn, x):
    y = labels()
    y[3] = -100
    return call(loss_fn, torch.where(torch.arange(16).unsqueeze(1) == 3, torch.nan, x[0]), y)


STEPS = [two_views, several_batches, another_forward_without_gradient, labels_created_inside, rows_with_nan]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved tensor hooks", "reentrant"])
@pytest.mark.parametrize("name", [*LOSSES, "CenterLoss"])
def test_recomputation_uses_the_state_of_the_first_forward(name, use_reentrant, step):
    if use_reentrant and step is another_forward_without_gradient:
        pytest.skip("a reentrant checkpoint runs without gradient too, so nothing tells these two forwards apart")
    torch.manual_seed(0)
    plain = getattr(fm, name)(50, 32)
    other = copy.deepcopy(plain)
    gradients = []
    for loss_fn, call in (
        (plain, lambda function, *batch: function(*batch)),
        (other, lambda function, *batch: checkpoint(function, *batch, use_reentrant=use_reentrant)),
    ):
        torch.manual_seed(1)
        for _ in range(2):
            x = [(scale * torch.randn(16, 32)).requires_grad_() for scale in (3, 6, 1)]
            loss = step(call, loss_fn, x)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                loss.backward()
            gradients.append([part.grad for part in x])
    for first, again in zip(gradients[:2], gradients[2:], strict=True):
        for expected, measured in zip(first, again, strict=True):
            assert (measured is None) == (expected is None)
            if measured is not None:
                torch.testing.assert_close(measured, expected, rtol=0, atol=0, equal_nan=True)
    for (key, value), expected in zip(other.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(value, expected), key


class Subclass(torch.Tensor):
    """A tensor subclass for embeddings."""


@pytest.mark.parametrize("kind", [torch.Tensor, Subclass])
@pytest.mark.parametrize("name", [*LOSSES, "CenterLoss"])
def test_second_backward(name, kind):
    torch.manual_seed(0)
    plain = getattr(fm, name)(50, 32)
    other, x = copy.deepcopy(plain), (3 * torch.randn(16, 32)).requires_grad_()
    (expected,) = torch.autograd.grad(plain(x, labels()), x)
    y = labels()
    loss = checkpoint(lambda x: other(x.as_subclass(kind), y), x, use_reentrant=False)
    for last in (False, True):
        (actual,) = torch.autograd.grad(loss, x, retain_graph=not last)
        assert torch.equal(actual.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("labels", [None, [1, 2], "1"])
@pytest.mark.parametrize("name", [*LOSSES, "CenterLoss"])
def test_errors_of_labels_are_clear(name, labels):
    with pytest.raises(TypeError, match="labels: expected an integer tensor of shape"):
        getattr(fm, name)(50, 32)(torch.randn(2, 32), labels)


def test_forgotten_forward_warns_once(monkeypatch):
    monkeypatch.setattr(fm.AdaFaceLoss, "MAX_PENDING", 1)
    loss_fn = fm.AdaFaceLoss(50, 32)
    batches = [(torch.randn(16, 32, requires_grad=True), labels()) for _ in range(3)]
    losses = [checkpoint(loss_fn, *batch, use_reentrant=False) for batch in batches]
    state = loss_fn.norm_mean.clone()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.stack(losses).sum().backward()
    assert torch.equal(loss_fn.norm_mean, state)
    messages = [str(each.message) for each in seen if "activation checkpointing" in str(each.message)]
    assert len(messages) == 1 and messages[0].startswith(
        "AdaFaceLoss: activation checkpointing recomputes a forward whose"
    )


def test_center_loss_keeps_the_state_of_eight_forwards():
    """The state of a forward has the size of its embeddings."""
    loss_fn = fm.CenterLoss(50, 32)
    for _ in range(9):
        loss_fn(torch.randn(16, 32), labels())
    assert len(loss_fn._pending) == 8


@pytest.mark.parametrize("name", [*LOSSES, "CenterLoss"])
def test_compiled_and_checkpointed(name):
    """The state is updated once per step; the gradient uses the current state, with a warning."""
    torch.manual_seed(0)
    plain = getattr(fm, name)(50, 32)
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            x, y = torch.randn(16, 32, requires_grad=True), labels()
            plain(x, y)
            checkpoint(compiled, x, y, use_reentrant=False).backward()
    assert any("recomputes a forward compiled by torch.compile" in str(each.message) for each in seen)
    for (key, value), expected in zip(other.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, msg=key)


def test_ring_loss_recomputes_its_first_batch():
    x = torch.randn(16, 32)
    gradients = []
    for again in (False, True):
        loss_fn, leaf = fm.RingLoss(reduction="none"), x.clone().requires_grad_()
        loss = checkpoint(loss_fn, leaf, use_reentrant=False) if again else loss_fn(leaf)
        (loss * torch.linspace(0, 1, 16)).sum().backward()
        gradients.append((leaf.grad, loss_fn.radius.grad, loss_fn.radius.detach()))
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["ArcFaceLoss", "SoftmaxLoss", "LSoftmaxLoss", "CurricularFaceLoss"])
@pytest.mark.parametrize("sparse", [False, True])
def test_activation_checkpointing_of_sampled_classes(name, sparse):
    torch.manual_seed(0)
    plain = getattr(fm, name)(50, 32, sample_rate=0.5, sparse=sparse)
    other, x = copy.deepcopy(plain), torch.randn(16, 32, requires_grad=True)
    torch.manual_seed(1)
    plain(x, labels()).backward()
    torch.manual_seed(1)
    checkpoint(other, x, labels(), use_reentrant=False).backward()
    assert torch.equal(other.weight.grad.to_dense(), plain.weight.grad.to_dense())


def test_activation_checkpointing_of_losses_over_class_pairs():
    weight = torch.randn(50, 32, requires_grad=True)
    for loss in (fm.UniformLoss(), lambda w: fm.InterLoss()(w, labels())):
        expected = torch.autograd.grad(loss(weight), weight)
        assert torch.equal(*torch.autograd.grad(checkpoint(loss, weight, use_reentrant=False), weight), *expected)


def test_centers_are_updated_in_bfloat16():
    loss_fn = fm.CenterLoss(4, 8, alpha=0.01).bfloat16()
    assert fm.CenterLoss(4, 8, dtype=torch.float16).centers.dtype == loss_fn.centers.dtype == torch.float32
    embeddings = torch.full((4, 8), 3.0, dtype=torch.bfloat16)
    for _ in range(2000):
        loss_fn(embeddings, torch.arange(4))
    torch.testing.assert_close(loss_fn.centers, torch.full((4, 8), 3.0 * (1 - (1 - 0.005) ** 2000)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["AdaFaceLoss", "CurricularFaceLoss", "CenterLoss"])
def test_assigned_state_keeps_its_dtype(name):
    loss_fn = getattr(fm, name)(50, 32)
    before = {key: value.dtype for key, value in loss_fn.named_buffers()}
    state = {key: value.bfloat16() for key, value in loss_fn.state_dict().items()}
    loss_fn.load_state_dict(state, assign=True)
    assert {key: value.dtype for key, value in loss_fn.named_buffers()} == before
    loss_fn(torch.randn(16, 32), labels())


@pytest.mark.parametrize("name", LOSSES)
def test_vmap_in_training(name):
    """All batches share one count of forwards; they cannot share running statistics."""
    loss_fn, x, y = getattr(fm, name)(50, 32), torch.randn(3, 16, 32), labels()
    vectorized = torch.vmap(loss_fn, in_dims=(0, None))
    if hasattr(loss_fn, "iteration"):
        expected = copy.deepcopy(loss_fn)
        torch.testing.assert_close(vectorized(x, y), torch.stack([copy.deepcopy(expected)(part, y) for part in x]))
        assert loss_fn.iteration == 1
    else:
        with pytest.raises(RuntimeError, match=rf"{name}: torch.vmap cannot update \w+, .* call eval\(\)"):
            vectorized(x, y)


def test_recomputation_is_detected():
    """Detection relies on a private function of torch; the test fails where that function changes."""
    seen = []

    def forward(x):
        seen.append(recomputing())
        return x.sin()

    checkpoint(forward, torch.ones(3, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [False, True] and not recomputing()


def test_modules_are_picklable():
    loss_fn = fm.AdaFaceLoss(50, 32)
    loss_fn(torch.randn(16, 32), labels())
    assert torch.equal(pickle.loads(pickle.dumps(loss_fn)).norm_mean, loss_fn.norm_mean)
