"""Center-invariant loss: its formula, the gradient of a sample through the mean of its class, and its centers."""

import math

import pytest
import torch
from loss_inputs import leaf, problem, relative_error
from pytorch_metric_learning.regularizers import CenterInvariantRegularizer

import fused_margin as fm
from fused_margin.distributed import slice_sizes


def make(classes=9, size=4, **options):
    """A loss with random centers, which do not move."""
    loss_fn = fm.CenterInvariantLoss(classes, size, dtype=torch.float64, **options).eval()
    loss_fn.centers.normal_()
    return loss_fn


def invariant(centers, label):
    """The term of one sample, written out."""
    squares = [float((center**2).sum()) for center in centers]
    return (squares[label] - sum(squares) / len(squares)) ** 2 / 4


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_formula(reduction):
    x, _, y = problem(12, 9, 4)
    y[3] = -100
    loss_fn = make(gamma=0.3, center_weight=0.2, reduction=reduction)
    expected = torch.zeros(12, dtype=torch.float64)
    for i, label in enumerate(y.tolist()):
        if label != -100:
            center = loss_fn.centers[label]
            expected[i] = 0.3 * invariant(loss_fn.centers, label) + 0.2 * ((x[i] - center) ** 2).sum() / 2
    expected = {"mean": expected.sum() / 11, "sum": expected.sum(), "none": expected}[reduction]
    torch.testing.assert_close(loss_fn(x, y), expected)


def test_every_class_once_is_pytorch_metric_learning():
    """Its regularizer is the mean of the same term over the rows of a matrix."""
    loss_fn = make(center_weight=0.0)
    theirs = CenterInvariantRegularizer()(loss_fn.centers)
    torch.testing.assert_close(loss_fn(torch.randn(9, 4, dtype=torch.float64), torch.arange(9)), theirs)


@pytest.mark.parametrize("center_weight", [0.0, 0.5])
def test_gradient_is_that_of_the_mean_of_the_training_images(center_weight):
    """With centers that are the means of a data set, the loss of each sample as a function of this sample alone."""
    x, _, y = problem(30, 5, 4, spread=1.0)
    y[:5] = torch.arange(5)
    loss_fn = make(5, gamma=0.7, center_weight=center_weight, class_counts=y.bincount(minlength=5), reduction="sum")
    loss_fn.centers.copy_(torch.stack([x[y == label].mean(0) for label in range(5)]))
    ours = leaf(x)
    loss_fn(ours, y).backward()
    for i in range(30):
        sample = leaf(x[i])
        data = torch.cat([x[:i], sample[None], x[i + 1 :]])
        centers = torch.stack([data[y == label].mean(0) for label in range(5)])
        squares = centers.square().sum(1)
        loss = 0.7 * (squares[y[i]] - squares.mean()).square() / 4
        loss = loss + center_weight * (sample - centers[y[i]].detach()).square().sum() / 2
        (gradient,) = torch.autograd.grad(loss, sample)
        torch.testing.assert_close(ours.grad[i], gradient)


def test_class_counts_divide_the_gradient():
    x, _, y = problem(12, 9, 4)
    counts = torch.arange(9)  # a class that has no training image counts as one that has one
    loss_fn, gradients = make(), []
    for class_counts in (None, counts):
        loss_fn.class_counts = class_counts
        a = leaf(x)
        loss_fn(a, y).backward()
        gradients.append(a.grad)
    torch.testing.assert_close(gradients[1], gradients[0] / counts.clamp(min=1)[y].unsqueeze(1))
    assert "class_counts" not in loss_fn.state_dict()
    assert torch.equal(loss_fn.half().class_counts, counts)


def test_centers_move_as_in_center_loss():
    ours, center_loss = fm.CenterInvariantLoss(9, 4, 0.3, gamma=2.0), fm.CenterLoss(9, 4, 0.3)
    for seed in range(3):
        x, _, y = problem(12, 9, 4, seed=seed)
        ours(x.float(), y), center_loss(x.float(), y)
    assert center_loss.centers.any() and torch.equal(ours.centers, center_loss.centers)
    only_center = fm.CenterInvariantLoss(9, 4, gamma=0.0, center_weight=1.0).eval()
    only_center.load_state_dict(center_loss.state_dict())
    assert torch.equal(only_center(x.float(), y), center_loss.eval()(x.float(), y))


def test_norms_approach_their_mean():
    x, _, y = problem(60, 6, 4, spread=0.3)
    x = leaf(x + torch.nn.functional.one_hot(y, 6)[:, :4] * (1 + y.unsqueeze(1)))
    loss_fn = fm.CenterInvariantLoss(6, 4, gamma=0.1, center_weight=0.1, reduction="sum", dtype=torch.float64)
    optimizer, spreads = torch.optim.SGD([x], 0.01), []
    for _ in range(150):
        optimizer.zero_grad()
        loss_fn(x, y).backward()
        optimizer.step()
        spreads.append(loss_fn.centers.square().sum(1).std())
    assert spreads[-1] < 0.5 * spreads[10]


def test_edge_cases():
    x, _, y = problem(6, 9, 4)
    loss_fn = make()
    a = leaf(x)
    loss = loss_fn(a, torch.full_like(y, -100))
    loss.backward()
    assert loss.isnan() and not a.grad.any()  # as center loss, and torch.nn.functional.cross_entropy
    assert loss_fn(x[:0], y[:0]).isnan() and make(reduction="sum")(x[:0], y[:0]) == 0
    x[2, 0] = math.nan
    assert loss_fn(x, y).isnan()
    assert make(1)(x[:2], torch.tensor([0, 0])) < 1e-25  # one class has the mean norm
    zero = leaf(torch.zeros(2, 4))
    fm.CenterInvariantLoss(9, 4)(zero, y[:2]).backward()
    assert not zero.grad.any()


def test_half_inputs():
    x, _, y = problem(12, 9, 4)
    loss_fn = make(center_weight=0.1)
    loss_fn.centers = loss_fn.centers.float()
    half, full = leaf(x.bfloat16()), leaf(x.bfloat16().float())
    loss, expected = loss_fn(half, y.to(torch.uint8)), loss_fn(full, y)
    loss.backward(), expected.backward()
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert half.grad.dtype == torch.bfloat16 and relative_error(half.grad, full.grad) < 0.01


@pytest.mark.slow
def test_compiled_calls_move_the_centers():
    torch._dynamo.reset()
    eager, compiled = fm.CenterInvariantLoss(9, 4), fm.CenterInvariantLoss(9, 4)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x, _, y = problem(12, 9, 4, seed=seed)
        torch.testing.assert_close(step(x.float(), y), eager(x.float(), y))
    assert torch.equal(compiled.centers, eager.centers)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gamma": -1.0}, ValueError, "gamma"),
        ({"center_weight": "x"}, TypeError, "center_weight"),
        ({"alpha": 2.0}, ValueError, "alpha"),
        ({"class_counts": torch.ones(9)}, TypeError, "class_counts: expected integers, got torch.float32"),
        ({"class_counts": "many"}, TypeError, "class_counts: expected a tensor of integers, got str"),
        ({"class_counts": torch.ones(3, dtype=int)}, ValueError, r"class_counts: expected shape \(9,\), got \(3,\)"),
        ({"class_counts": torch.full((9,), -1)}, ValueError, "class_counts: expected numbers of at least 0, got -1"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        fm.CenterInvariantLoss(9, 4, **options)


def one_rank(group, batches, options):
    """The losses and gradients of some steps, and the centers of this rank after them."""
    loss_fn = fm.CenterInvariantLoss(7, 4, gamma=0.1, process_group=group, dtype=torch.float64, **options)
    results = []
    for x, y in batches:
        x = leaf(x)
        loss = loss_fn(x, y)
        loss.sum().backward()
        results.append((loss.detach(), x.grad))
    return results, loss_fn.centers


@pytest.mark.parametrize("counts", [[7, 5], [0, 4, 8]])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ranks_equal_one_device(ranks, counts, reduction):
    batches = [problem(12, 7, 4, seed=seed)[::2] for seed in range(3)]
    options = {"center_weight": 0.2, "class_counts": torch.arange(1, 8), "reduction": reduction}
    expected, centers = one_rank(None, batches, options)
    parts = zip(*(zip(x.split(counts), y.split(counts), strict=True) for x, y in batches), strict=True)
    results = ranks.run(one_rank, [(list(part), options) for part in parts])
    for step, (loss, gradient) in enumerate(expected):
        losses = [own[step][0] for own, _ in results]
        for own in losses if reduction == "mean" else [torch.cat(losses)]:
            torch.testing.assert_close(own, loss)
        torch.testing.assert_close(torch.cat([own[step][1] for own, _ in results]), gradient)
    assert [len(own) for _, own in results] == slice_sizes(7, len(counts))
    torch.testing.assert_close(torch.cat([own for _, own in results]), centers)
