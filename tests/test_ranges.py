"""Range loss and marginal loss against their papers' formulas in loops, their edge cases, and several ranks."""

import itertools
import math

import pytest
import torch
from loss_inputs import LargestTensor, leaf, relative_error
from torch.autograd import gradcheck

import fused_margin as fm

SIZES = [1, 2, 3, 5, 4]  # of the classes of a batch


def batch(seed=0, sizes=SIZES, size=6):
    """Shuffled embeddings (N, D) float64 and labels (N,), any integers."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.tensor([7, -3, 0, 900, 2])[: len(sizes)], torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    return torch.randn(len(labels), size, generator=generator, dtype=torch.float64), labels


def valid_rows(x, y, ignore_index=-100):
    return [(row, label) for row, label in zip(x, y.tolist(), strict=True) if label != ignore_index]


def plain_range(x, y, k, margin, alpha, beta, reduction="mean"):
    """arXiv:1611.08976, in loops over all pairs."""
    classes = {}
    for row, label in valid_rows(x, y):
        classes.setdefault(label, []).append(row)
    harmonic = []
    for rows in classes.values():
        ranges = sorted((((a - b) ** 2).sum() for a, b in itertools.combinations(rows, 2)), reverse=True)[:k]
        if ranges:
            harmonic.append(len(ranges) / sum(1 / r for r in ranges))
    means = [torch.stack(rows).mean(0) for rows in classes.values()]
    gaps = [((a - b) ** 2).sum() for a, b in itertools.combinations(means, 2)]
    intra = sum(harmonic) / (len(harmonic) if reduction == "mean" else 1) if harmonic else x.sum() * 0
    return alpha * intra + (beta * (margin - min(gaps)).clamp(min=0) if gaps else 0)


def plain_marginal(x, y, theta=1.2, xi=0.3, reduction="mean"):
    """Deng et al. 2017, eq. 4, as the sum over pairs of each sample."""
    rows = [(row / row.norm(), label) for row, label in valid_rows(x, y)]
    per_sample = [
        sum(
            (xi - (1 if a == b else -1) * (theta - ((u - v) ** 2).sum())).clamp(min=0)
            for j, (v, b) in enumerate(rows)
            if i != j
        )
        / (len(rows) - 1)
        for i, (u, a) in enumerate(rows)
    ]
    return sum(per_sample) / (len(rows) if reduction == "mean" else 1)


RANGE = {"k": 3, "margin": 9.0, "alpha": 0.7, "beta": 0.4}
PAIRS = {
    "range": (lambda **options: fm.RangeLoss(**RANGE, **options), lambda x, y, **o: plain_range(x, y, **RANGE, **o)),
    "marginal": (fm.MarginalLoss, plain_marginal),
}
NAMES = pytest.mark.parametrize("name", PAIRS)


def value_and_gradient(loss, x, y):
    x = leaf(x)
    value = loss(x, y)
    value.sum().backward()
    return value.detach(), x.grad


@NAMES
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [False, True])
def test_formulas(name, reduction, ignored):
    x, y = batch()
    if ignored:
        y[::4] = -100
        x[4] = math.nan  # ignored
    make, plain = PAIRS[name]
    ours = value_and_gradient(make(reduction=reduction), x, y)
    expected = value_and_gradient(lambda a, b: plain(a, b, reduction=reduction), x, y)
    for mine, theirs in zip(ours, expected, strict=True):
        assert relative_error(mine, theirs.nan_to_num()) < 1e-12
    assert expected[0] > 0.1


@pytest.mark.parametrize("k", [1, 2, 5, 100])
def test_number_of_ranges(k):
    """A class with fewer pairs uses all of its pairs."""
    x, y = batch(1)
    settings = {"k": k, "margin": 0.0, "alpha": 1.0, "beta": 0.0}
    torch.testing.assert_close(fm.RangeLoss(**settings)(x, y), plain_range(x, y, **settings))


def test_terms_of_range_loss():
    x, y = batch(2)
    inter = {"k": 2, "margin": 50.0, "alpha": 0.0, "beta": 1.0}
    gap = 50.0 - fm.RangeLoss(**inter)(x, y)
    assert 0 < gap < 50
    assert fm.RangeLoss(2, float(gap) * 0.99, 0.0, 1.0)(x, y) == 0  # nearest means are beyond the margin
    torch.testing.assert_close(fm.RangeLoss(2, float(gap) * 1.5, 0.0, 1.0)(x, y), gap / 2)


def test_ranges_of_a_small_class_far_from_the_origin():
    """Distances are those of differences, not of squares that cancel."""
    x, y = batch(3)
    settings = {"k": 2, "margin": 0.0, "alpha": 1.0, "beta": 0.0}
    moved = (x * 1e-2).float() + 100
    assert relative_error(fm.RangeLoss(**settings)(moved, y), plain_range(moved.double(), y, **settings)) < 1e-6


@NAMES
def test_gradcheck(name):
    x, y = batch(4, [2, 3, 1], 3)
    y[1] = -100
    assert gradcheck(lambda a: PAIRS[name][0]()(a, y), (leaf(x),))


def test_marginal_losses_of_samples():
    x, y = batch(5)
    y[3] = -100
    losses = fm.MarginalLoss(reduction="none")(x, y)
    assert losses.shape == y.shape and losses[3] == 0
    torch.testing.assert_close(losses.sum() / (len(y) - 1), fm.MarginalLoss()(x, y))
    one, y[y != y[0]] = int(y[0]), -100
    own = fm.MarginalLoss(0.5, 0.1, reduction="none")(x, y)[y == one]
    unit = torch.nn.functional.normalize(x[y == one])
    hinge = ((unit[:, None] - unit[None]).square().sum(2) - 0.4).clamp(min=0)
    torch.testing.assert_close(own, hinge.sum(1) / (len(unit) - 1))


@NAMES
@pytest.mark.parametrize("case", ["all ignored", "empty batch", "one sample"])
def test_batches_without_pairs(name, case):
    x, y = batch()
    samples = {"all ignored": slice(None), "empty batch": slice(0), "one sample": slice(1)}[case]
    x, y = leaf(x[samples].float()), y[samples]
    if case == "all ignored":
        x.data[2] = math.nan
        y = torch.full_like(y, -100)
    loss = PAIRS[name][0]()(x, y)
    loss.backward()
    assert loss == 0 and loss.dtype == torch.float32 and loss.dim() == 0
    assert x.grad is not None and not x.grad.any()  # not NaN either


@NAMES
@pytest.mark.parametrize("labels", [[4, 4, 4], [1, 2, 3]], ids=["one class", "no class has two samples"])
def test_batches_with_pairs_of_one_kind(name, labels):
    x, y = batch()[0][:3], torch.tensor(labels)
    make, plain = PAIRS[name]
    for mine, theirs in zip(value_and_gradient(make(), x, y), value_and_gradient(plain, x, y), strict=True):
        assert relative_error(mine, theirs) < 1e-12


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_equal_and_zero_embeddings_are_bounded(name, dtype):
    x, y = torch.zeros(8, 3, dtype=dtype), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    x[:3] = torch.tensor([1.0, 2.0, 3.0])  # equal within a class
    x[4] = x[0]  # and equal to another class; the rest is zero
    x[7] = 1e-30
    x = leaf(x)
    loss = PAIRS[name][0]()(x, y)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all() and x.grad.abs().max() < 20


def test_a_range_of_zero():
    """The harmonic mean tends to 0, and its gradient by the embeddings too."""
    y = torch.zeros(3, dtype=torch.int64)
    for offset, scale in ((0.0, 1.0), (1e-8, 1.0), (1e-3, 1e-12)):
        x = leaf(torch.tensor([[0.0, 0.0], [offset, 0.0], [1.0, 0.0]], dtype=torch.float64) * scale)
        loss = fm.RangeLoss(3, 0.0, 1.0, 0.0)(x, y)
        loss.backward()
        assert 0 <= loss <= 3.1 * (offset * scale) ** 2 and x.grad.abs().max() <= 6.1 * offset * scale


@NAMES
def test_nan_propagates(name):
    x, y = batch()
    x[2, 1] = math.nan
    assert PAIRS[name][0]()(x, y).isnan()


@NAMES
def test_half_strided_and_small_integers(name):
    x, y = batch()
    y = y.remainder(50)
    strided = leaf(x.float().t().contiguous().t())
    loss_fn = PAIRS[name][0]()
    expected, gradient = value_and_gradient(loss_fn, x.float(), y)
    loss = loss_fn(strided, y.to(torch.uint8))
    loss.backward()
    assert torch.equal(loss, expected) and torch.equal(strided.grad, gradient)
    for dtype in (torch.float16, torch.bfloat16):
        half = leaf(x.to(dtype))
        loss = loss_fn(half, y)
        loss.backward()
        expected, gradient = value_and_gradient(loss_fn, half.double(), y)
        assert loss.dtype == torch.float32 and relative_error(loss, expected) < 1e-6
        assert half.grad.dtype == dtype and relative_error(half.grad, gradient) < 0.01


@NAMES
def test_repeated_calls_have_equal_bits(name):
    x, y = batch(9, [40, 1, 30, 20, 7], 16)
    first, again = (value_and_gradient(PAIRS[name][0](), x.float(), y) for _ in range(2))
    assert all(map(torch.equal, first, again))


@NAMES
def test_memory_is_a_matrix_of_pairs(name):
    x, y = torch.randn(300, 8, requires_grad=True), torch.arange(300) % 60
    with LargestTensor() as largest:
        PAIRS[name][0]()(x, y).backward()
    assert largest.elements == 300 * 300


@pytest.mark.slow
@NAMES
def test_compiled_calls(name):
    x, y = batch()
    torch._dynamo.reset()
    loss_fn = PAIRS[name][0]()
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    eager, from_graph = (value_and_gradient(function, x.float(), y) for function in (loss_fn, compiled))
    torch.testing.assert_close(from_graph, eager)


X, Y = batch()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fm.RangeLoss(0), ValueError, "k: expected a positive integer, got 0"),
        (lambda: fm.RangeLoss(2.5), TypeError, "k: expected an integer"),
        (lambda: fm.RangeLoss(margin=-1.0), ValueError, "margin"),
        (lambda: fm.RangeLoss(alpha=math.inf), ValueError, "alpha"),
        (lambda: fm.RangeLoss(beta="1"), TypeError, "beta"),
        (lambda: fm.RangeLoss(reduction="none"), ValueError, "reduction: expected one of 'mean', 'sum'"),
        (lambda: fm.RangeLoss()(X[0], Y), ValueError, "embeddings"),
        (lambda: fm.RangeLoss()(X, Y[:3]), ValueError, "labels"),
        (lambda: fm.MarginalLoss(theta=-0.1), ValueError, "theta"),
        (lambda: fm.MarginalLoss(xi=None), TypeError, "xi"),
        (lambda: fm.MarginalLoss(ignore_index=0.5), TypeError, "ignore_index"),
        (lambda: fm.MarginalLoss()(X.long(), Y), TypeError, "embeddings"),
        (lambda: fm.MarginalLoss()(X, Y.double()), TypeError, "labels"),
        (lambda: fm.MarginalLoss()(X, Y.tolist()), TypeError, "labels"),
        (lambda: setattr(fm.MarginalLoss(), "process_group", None), AttributeError, "process_group: cannot be changed"),
    ],
)
def test_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@NAMES
def test_training_lowers_the_loss(name):
    x, y = batch(6)
    x, loss_fn = leaf(x), PAIRS[name][0]()
    optimizer = torch.optim.SGD([x], 0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(loss_fn(x, y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[10] < losses[0]


def one_rank(group, name, options, embeddings, labels):
    loss_fn = PAIRS[name][0](process_group=group, **options)
    assert loss_fn.process_group is group
    return value_and_gradient(loss_fn, embeddings, labels)


@NAMES
@pytest.mark.parametrize("counts", [[8, 7], [0, 6, 9]])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}], ids=["mean", "sum"])
def test_ranks_equal_one_device(ranks, name, counts, options):
    x, y = batch(7)
    y[4] = -100
    parts = list(zip(x.split(counts), y.split(counts), strict=True))
    results = ranks.run(one_rank, [(name, options, *part) for part in parts])
    expected, gradient = value_and_gradient(PAIRS[name][0](**options), x, y)
    for loss, _ in results:
        torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.cat([own for _, own in results]), gradient)


def test_losses_of_the_samples_of_each_rank(ranks):
    x, y = batch(8)
    parts = list(zip(x.split([8, 7]), y.split([8, 7]), strict=True))
    results = ranks.run(one_rank, [("marginal", {"reduction": "none"}, *part) for part in parts])
    expected, gradient = value_and_gradient(fm.MarginalLoss(reduction="none"), x, y)
    torch.testing.assert_close(torch.cat([losses for losses, _ in results]), expected)
    torch.testing.assert_close(torch.cat([own for _, own in results]), gradient)
