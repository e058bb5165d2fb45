"""The auxiliary losses against their papers' formulas, written out; memory and tiles of the sums over class pairs."""

import math

import pytest
import torch
from loss_inputs import LargestTensor, leaf, problem, relative_error
from torch.autograd import gradcheck
from torch.nn import functional as F

import fused_margin as fm
from fused_margin import reference
from fused_margin._ops import class_pair_sums

SMALLEST_WORKSPACE = 1e-6


def sum_over_others(function, values, own):
    """Row sums of a function of the values (R, C), without each row's own class."""
    own = F.one_hot(own, values.shape[1]).bool()
    return function(values.masked_fill(own, 0.5)).masked_fill(own, 0.0).sum(1)


def plain_angles(rows, w, own):
    return sum_over_others(torch.acos, reference.normalize(rows) @ reference.normalize(w).t(), own)


def plain_potentials(rows, w, own):
    squares = (reference.normalize(rows)[:, None] - reference.normalize(w)[None]).square().sum(2)
    return sum_over_others(lambda s: 1 / (1 + s.sqrt()), squares, own)


def plain_intra(x, w, y):
    return torch.acos(F.cosine_similarity(x, w[y])) / math.pi


def plain_inter(x, w, y):
    return -plain_angles(w[y], w, y) / (math.pi * (len(w) - 1))


def plain_uniform(w):
    return plain_potentials(w, w, torch.arange(len(w))).sum() / (len(w) * (len(w) - 1))


def compare(loss, plain, tolerance=1e-10):
    """Value and gradients of two functions of the same number of tensors."""

    def run(function, inputs):
        inputs = [leaf(i) for i in inputs]
        value = function(*inputs)
        value.sum().backward()
        return [value.detach(), *(torch.zeros_like(i) if i.grad is None else i.grad for i in inputs)]

    def comparison(*inputs):
        for ours, theirs in zip(run(loss, inputs), run(plain, inputs), strict=True):
            assert ours.shape == theirs.shape and relative_error(ours, theirs) < tolerance

    return comparison


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [False, True])
def test_formulas(reduction, ignored):
    x, w, y = problem(12, 30, 8)
    valid = torch.arange(12) % 4 != 1 if ignored else torch.ones(12, dtype=torch.bool)
    labels = y.masked_fill(~valid, -100)
    options = {"reduction": reduction}

    def reduced(values):
        values = values.masked_fill(~valid, 0.0)
        return {"mean": values.sum() / valid.sum(), "sum": values.sum(), "none": values}[reduction]

    center = fm.CenterLoss(30, 8, dtype=torch.float64, **options).eval()
    center.centers.normal_()
    compare(lambda a: center(a, labels), lambda a: reduced((a - center.centers[y]).square().sum(1) / 2))(x)
    ring = fm.RingLoss(3.0, dtype=torch.float64, **options)
    compare(lambda a: ring(a, labels), lambda a: reduced((a.norm(dim=1) - 3.0) ** 2 / 2))(x)
    intra, inter = fm.IntraLoss(**options), fm.InterLoss(**options)
    compare(lambda a, b: intra(a, b, labels), lambda a, b: reduced(plain_intra(a, b, y)))(x, w)
    compare(lambda a, b: inter(b, labels), lambda a, b: reduced(plain_inter(a, b, y)))(x, w)


def test_uniform():
    _, w, y = problem(12, 30, 8)
    compare(fm.UniformLoss(), plain_uniform)(w)
    y[5] = -100
    present = y[y >= 0].unique()
    assert len(present) < 11  # a class that occurs twice counts once
    compare(
        lambda b: fm.UniformLoss(batch_classes=True)(b, y),
        lambda b: plain_potentials(b[present], b, present).sum() / (len(present) * 29),
    )(w)


@pytest.mark.parametrize("workspace_mb", [256, SMALLEST_WORKSPACE])
@pytest.mark.parametrize("function", ["angle", "potential"])
def test_class_pair_gradients(function, workspace_mb):
    x, w, y = problem(5, 9, 4)
    options = {"workspace_mb": workspace_mb}
    assert gradcheck(lambda a, b: class_pair_sums.other_class_sums(a, b, y, function, **options), (leaf(x), leaf(w)))
    assert gradcheck(lambda b: class_pair_sums.other_class_sums(b[y], b, y, function, **options), (leaf(w),))
    assert gradcheck(lambda b: class_pair_sums.other_class_sums(None, b, None, function, **options), (leaf(w),))


def test_module_gradients():
    x, w, y = problem(5, 9, 4)
    center, ring = fm.CenterLoss(9, 4, dtype=torch.float64).eval(), fm.RingLoss(2.0, dtype=torch.float64)
    assert gradcheck(lambda a: center(a, y), (leaf(x),))
    assert gradcheck(lambda a, r: torch.func.functional_call(ring, {"radius": r}, (a,)), (leaf(x), leaf(ring.radius)))
    assert gradcheck(lambda a, b: fm.IntraLoss()(a, b, y), (leaf(x), leaf(w)))


# a tile has at least 64 rows and classes: these sizes make several ragged tiles
@pytest.mark.parametrize("samples", [150, 7])
@pytest.mark.parametrize("function", ["angle", "potential"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiling_changes_only_rounding(samples, function, dtype):
    x, w, y = problem(samples, 333, 6)
    x, w = x.to(dtype), w.to(dtype).t().contiguous().t()  # strided
    plain = {"angle": plain_angles, "potential": plain_potentials}[function]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    upstream = torch.rand(333, dtype=torch.float64)
    for workspace_mb in (256, 0.1, SMALLEST_WORKSPACE):

        def ours(a, b, own=y, workspace_mb=workspace_mb):
            sums = class_pair_sums.other_class_sums(a, b, own, function, workspace_mb=workspace_mb)
            return sums * upstream[: len(sums)]

        compare(ours, lambda a, b: plain(a.double(), b.double(), y) * upstream[:samples], tolerance)(x, w)
        compare(
            lambda b: ours(None, b, None),
            lambda b: plain(b.double(), b.double(), torch.arange(333)) * upstream,
            tolerance,
        )(w)


@pytest.mark.parametrize("symmetric", [False, True])
def test_cosine_matrix_is_never_materialized(symmetric):
    samples, classes, size, workspace = 700, 1500, 4, 1 << 18
    x, w, y = (t.float() if t.is_floating_point() else t for t in problem(samples, classes, size))
    rows, own = (None, None) if symmetric else (x, y)
    least = max(samples, classes) * size  # the size of the inputs and their gradients
    with LargestTensor() as forward:
        sums = class_pair_sums.forward(rows, w, own, "potential", workspace)
    with LargestTensor() as backward:
        class_pair_sums.backward(sums, rows, w, own, "potential", workspace)
    for most in (forward.elements, backward.elements):
        assert least <= most <= max(least, workspace // 12) < samples * classes // 10


def test_tiles_cover_pairs_once():
    """Every pair is in one tile or in the transpose of one; tile sizes respect the workspace."""
    for rows, classes, symmetric in ((150, 333, False), (333, 333, True), (1, 1000, False), (1000, 65, False)):
        weight = torch.empty(classes, 6)
        for workspace in (1, 1 << 16, 1 << 28):
            seen = torch.zeros(rows, classes)
            for tile in class_pair_sums.tiles(rows, weight, symmetric, torch.float32, workspace):
                part = seen[tile.rows, tile.columns]
                assert part.numel() * 12 <= max(workspace, 64 * 64 * 12)
                part += 1
                if tile.mirrored:
                    seen[tile.columns, tile.rows] += 1
            assert (seen == 1).all()


def test_center_update_by_hand():
    """Three samples, two of them of class 1."""
    loss_fn = fm.CenterLoss(4, 2, alpha=0.5)
    loss_fn.centers.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0], [7.0, 7.0]]))
    x = leaf(torch.tensor([[3.0, 1.0], [1.0, 4.0], [0.0, 0.0]]))
    loss = loss_fn(x, torch.tensor([1, 1, 2]))
    # squared distances 4 + 0, 0 + 9 and 4 + 0
    assert loss.item() == pytest.approx((4 + 9 + 4) / 2 / 3)
    # class 1: ((1, 1) - (3, 1) + (1, 1) - (1, 4)) / (1 + 2) = (-2/3, -1); class 2: (2, 0) / (1 + 1) = (1, 0)
    expected = torch.tensor([[0.0, 0.0], [1 + 1 / 3, 1.5], [1.5, 0.0], [7.0, 7.0]])
    torch.testing.assert_close(loss_fn.centers, expected)
    loss.backward()
    torch.testing.assert_close(x.grad, torch.tensor([[2.0, 0.0], [0.0, 3.0], [-2.0, 0.0]]) / 3)
    moved = loss_fn.centers.clone()
    loss_fn.eval()(x, torch.tensor([1, 1, 2]))
    assert torch.equal(loss_fn.centers, moved)
    assert list(loss_fn.parameters()) == [] and not loss_fn.centers.requires_grad


def test_ignored_nan_and_rejected_samples_update_no_center():
    x, _, y = problem(6, 5, 3)
    loss_fn = fm.CenterLoss(5, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="got 5 for 5 classes"):
        loss_fn(x, y.masked_fill(y == y[2], 5))
    assert loss_fn.centers.count_nonzero() == 0
    x[0, 1] = math.nan
    loss_fn(x, y.new_tensor([3, -100, 1, 1, -100, -100]))
    expected = torch.zeros(5, 3, dtype=torch.float64)
    expected[1] = (x[2] + x[3]) / 3 * 0.5
    torch.testing.assert_close(loss_fn.centers, expected)


def test_centers_are_deterministic():
    x, _, y = problem(4000, 50, 64)
    x, centers = x.float(), []
    for _ in range(2):
        loss_fn = fm.CenterLoss(50, 64)
        for _ in range(3):
            loss_fn(x, y)
        centers.append(loss_fn.centers)
    assert torch.equal(*centers)


def test_ring_radius_starts_at_the_first_batch():
    x, _, y = problem(12, 30, 8)
    loss_fn = fm.RingLoss(dtype=torch.float64)
    y[3], x[5, 0] = -100, math.nan
    finite = (torch.arange(12) != 3) & (torch.arange(12) != 5)
    mean = x[finite].norm(dim=1).mean()
    assert loss_fn.eval()(x[finite]) == (x[finite].norm(dim=1) - mean).square().mean() / 2
    assert not loss_fn.initialised
    assert loss_fn.train()(x, y).isnan()
    torch.testing.assert_close(loss_fn.radius.detach(), mean)
    loss = loss_fn(x[finite] * 2)  # the radius does not change
    torch.testing.assert_close(loss, (2 * x[finite].norm(dim=1) - mean).square().mean() / 2)
    loss.backward()
    torch.testing.assert_close(loss_fn.radius.grad, -mean)
    other = fm.RingLoss(dtype=torch.float64)
    other.load_state_dict(loss_fn.state_dict())
    assert other.initialised and other.radius == loss_fn.radius
    only_ignored = fm.RingLoss()
    only_ignored(x[:2].float(), torch.tensor([-100, -100]))
    assert not only_ignored.initialised and only_ignored.radius == 0


def test_ring_gradient_of_the_first_batch():
    x, _, _ = problem(12, 30, 8)
    started, fixed = fm.RingLoss(dtype=torch.float64), fm.RingLoss(x.norm(dim=1).mean().item(), dtype=torch.float64)
    gradients = []
    for loss_fn in (started, fixed):
        a = leaf(x)
        loss_fn(a).backward()
        gradients.append((a.grad, loss_fn.radius.grad))
    torch.testing.assert_close(*gradients)


LOSSES = {
    "center": (lambda: fm.CenterLoss(30, 8), "xy"),
    "ring": (fm.RingLoss, "xy"),
    "intra": (fm.IntraLoss, "xwy"),
    "inter": (fm.InterLoss, "wy"),
    "uniform": (fm.UniformLoss, "w"),
    "uniform of a batch": (lambda: fm.UniformLoss(batch_classes=True), "wy"),
}


def auxiliary_loss(name):
    """An auxiliary loss as a function of embeddings, weight and labels, with its own module."""
    make, takes = LOSSES[name]
    module = make()
    return lambda x, w, y: module(*({"x": x, "w": w, "y": y}[argument] for argument in takes))


@pytest.mark.parametrize("name", LOSSES)
def test_half_inputs_and_integer_labels(name):
    x, w, y = problem(12, 30, 8)
    for dtype in (torch.float16, torch.bfloat16):
        a, b = leaf(x.to(dtype)), leaf(w.to(dtype))
        c, d = leaf(a.double()), leaf(b.double())
        loss, expected = auxiliary_loss(name)(a, b, y.to(torch.uint8)), auxiliary_loss(name)(c, d, y)
        assert loss.dtype == torch.float32 and relative_error(loss, expected) < 1e-5
        loss.backward()
        expected.backward()
        for ours, theirs in ((a, c), (b, d)):
            assert (ours.grad is None) == (theirs.grad is None)
            if ours.grad is not None:
                rounding = relative_error(theirs.grad.to(dtype), theirs.grad)
                assert ours.grad.dtype == dtype and relative_error(ours.grad, theirs.grad) < 1.5 * rounding + 1e-6


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_stay_finite_at_the_poles(name, dtype):
    w = torch.zeros(30, 8, dtype=dtype)
    w[:4, :4] = torch.eye(4)
    w[1], w[2] = w[0], -w[0]  # two equal classes, one opposite; all after the fourth are zero
    x, y = leaf(torch.stack([50 * w[0], -50 * w[0], 0 * w[0]])), torch.tensor([0, 0, 3])
    w = leaf(w)
    auxiliary_loss(name)(x, w, y).backward()
    for tensor in (x, w):
        if tensor.grad is not None:
            # the true gradients are at most 1 for a unit vector; a clamped one is not larger
            assert tensor.grad.isfinite().all() and tensor.grad.abs().max() < 60
    if w.grad is not None:
        assert (w.grad[4:] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_and_repeated_calls(name):
    x, w, y = problem(12, 30, 8)
    x, w = x.float(), w.float()
    torch._dynamo.reset()
    results = []
    for function in (
        auxiliary_loss(name),
        auxiliary_loss(name),
        torch.compile(auxiliary_loss(name), fullgraph=True, backend="aot_eager"),
    ):
        a, b = leaf(x), leaf(w)
        loss = function(a, b, y)
        loss.backward()
        results.append([loss.detach(), *(t.grad for t in (a, b) if t.grad is not None)])
    for once, again, compiled in zip(*results, strict=True):
        assert torch.equal(once, again)
        torch.testing.assert_close(compiled, once)


@pytest.mark.parametrize("make", [lambda: fm.CenterLoss(5, 3), fm.RingLoss], ids=["center", "ring"])
def test_compiled_call_updates_state(make):
    torch._dynamo.reset()
    eager, compiled = make(), make()
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x, _, y = problem(6, 5, 3, seed=seed)
        eager(x.float(), y)
        step(x.float(), y)
    for name, value in eager.state_dict().items():
        assert value.count_nonzero() > 0 and torch.equal(compiled.state_dict()[name], value)


def test_opcheck():
    x, w, y = problem(5, 9, 4)
    arguments = (leaf(x.float()), leaf(w.float()), y, "angle", 1 << 20)
    torch.library.opcheck(class_pair_sums.pair_sums, arguments)
    torch.library.opcheck(class_pair_sums.pair_sums, (None, arguments[1], None, "potential", 1 << 20))
    weight = leaf(w)
    sums = class_pair_sums.other_class_sums(None, weight, None, "angle")
    (gradient,) = torch.autograd.grad(sums.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


def test_nan_propagates():
    x, w, y = problem(5, 30, 8)
    x[0, 0] = w[int(y[3]), 0] = math.nan
    for name in LOSSES:
        assert auxiliary_loss(name)(x, w, y).isnan(), name


def test_state_dicts():
    x, _, y = problem(6, 5, 3)
    loss_fn, other = fm.CenterLoss(5, 3), fm.CenterLoss(5, 3)
    loss_fn(x.float(), y)
    other.load_state_dict(loss_fn.state_dict())
    assert torch.equal(other(x.float(), y), loss_fn(x.float(), y)) and torch.equal(other.centers, loss_fn.centers)
    assert [list(fm.IntraLoss().state_dict()), list(fm.InterLoss().state_dict()), list(fm.UniformLoss().state_dict())] == [
        [], [], []
    ]  # fmt: skip


X, W, Y = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, -100])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fm.CenterLoss(0, 3), ValueError, "num_classes"),
        (lambda: fm.CenterLoss(5, 3, alpha=1.5), ValueError, "alpha"),
        (lambda: fm.CenterLoss(5, 3, reduction="max"), ValueError, "reduction"),
        (lambda: fm.CenterLoss(5, 3)(X[:, :2], Y), ValueError, "embeddings"),
        (lambda: fm.CenterLoss(5, 3)(X, Y[:3]), ValueError, "labels"),
        (lambda: fm.CenterLoss(2, 3)(X, Y), ValueError, "got 2 for 2 classes"),
        (lambda: fm.RingLoss(-1.0), ValueError, "radius"),
        (lambda: fm.RingLoss()(X[0]), ValueError, "embeddings"),
        (lambda: fm.RingLoss()(X, Y.float()), TypeError, "labels"),
        (lambda: fm.IntraLoss(ignore_index=0.5), TypeError, "ignore_index"),
        (lambda: fm.IntraLoss()(X, W[:, :2], Y), ValueError, "embeddings"),
        (lambda: fm.IntraLoss()(X, W, Y - 50), ValueError, "got -50"),
        (lambda: fm.InterLoss(workspace_mb=0), ValueError, "workspace_mb"),
        (lambda: fm.InterLoss()(W[:1], Y), ValueError, "weight"),
        (lambda: fm.InterLoss()(W, Y[None]), ValueError, "labels"),
        (lambda: fm.InterLoss()(W, [0, 1]), TypeError, "labels"),
        (lambda: fm.UniformLoss()(W[0]), ValueError, "weight"),
        (lambda: fm.UniformLoss(batch_classes=True)(W), TypeError, "labels"),
        (lambda: fm.UniformLoss(batch_classes=True)(W, Y + 4), ValueError, "labels"),
        (lambda: class_pair_sums.other_class_sums(X, W, Y, "distance"), ValueError, "function"),
        (lambda: class_pair_sums.other_class_sums(X, W, None, "angle"), TypeError, "own"),
    ],
)
def test_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
