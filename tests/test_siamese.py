"""DeepFace's siamese loss against its formula over explicit pairs; memory, tiles and edge cases of its distances."""

import itertools
import math

import pytest
import torch
from loss_inputs import leaf, problem, relative_error
from ranks import RankError
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import fused_margin as fm
from fused_margin._ops import weighted_l1


def plain_loss(x, y, alpha, bias, *, normalize=True, balanced=True):
    """The mean cross-entropy of the genuine and of the impostor pairs, by a loop over all pairs of samples."""
    losses = {True: [], False: []}
    for i, j in itertools.combinations(range(len(x)), 2):
        if y[i] == -100 or y[j] == -100:
            continue
        a, b = (x[k] / x[k].norm() if normalize else x[k] for k in (i, j))
        odds = torch.exp(bias - sum(alpha[d] * (a[d] - b[d]).abs() for d in range(len(alpha))))
        probability = odds / (1 + odds)
        same = bool(y[i] == y[j])
        losses[same].append(-torch.log(probability if same else 1 - probability))
    if not balanced:
        return sum(losses[True] + losses[False]) / (len(losses[True]) + len(losses[False]))
    return sum(0.5 * sum(kind) / len(kind) for kind in losses.values() if kind)


def loss_of(size, alpha=None, bias=None, **options):
    loss_fn = fm.SiameseL1Loss(size, dtype=torch.float64, **options)
    with torch.no_grad():
        if alpha is not None:
            loss_fn.alpha.copy_(alpha)
            loss_fn.bias.copy_(bias)
    return loss_fn


def batch(samples=9, size=5):
    x, _, y = problem(samples, 4, size)
    alpha = torch.linspace(-1.0, 3.0, size, dtype=torch.float64)  # of either sign, as in the paper
    return x / 5.0, y, alpha, torch.tensor(0.7, dtype=torch.float64)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("balanced", [True, False])
def test_formula(normalize, balanced, ignored):
    x, y, alpha, bias = batch()
    if ignored:
        y[[2, 6]] = -100
    options = {"normalize": normalize, "balanced": balanced}
    loss_fn, a = loss_of(5, alpha, bias, **options), leaf(x)
    loss = loss_fn(a, y)
    loss.backward()
    b, weights, offset = leaf(x), leaf(alpha), leaf(bias)
    expected = plain_loss(b, y, weights, offset, **options)
    expected.backward()
    for ours, theirs in (
        (loss, expected), (a.grad, b.grad), (loss_fn.alpha.grad, weights.grad), (loss_fn.bias.grad, offset.grad)
    ):  # fmt: skip
        assert relative_error(ours.detach(), theirs.detach()) < 1e-10


@pytest.mark.parametrize("options", [{}, {"normalize": False, "balanced": False}], ids=["default", "plain"])
def test_gradients(options):
    x, y, alpha, bias = batch(6)
    loss_fn = loss_of(5, **options)

    def loss(embeddings, alpha, bias):
        return torch.func.functional_call(loss_fn, {"alpha": alpha, "bias": bias}, (embeddings, y))

    assert gradcheck(loss, (leaf(x), leaf(alpha), leaf(bias)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [1, 2, 37])
@pytest.mark.parametrize("workspace_mb", [256, 1e-3, 1e-9])
def test_tiles_change_only_rounding(samples, dtype, workspace_mb):
    x, _, _ = problem(samples, 4, 6)
    x, alpha = x.to(dtype).t().contiguous().t(), torch.linspace(-1.0, 2.0, 6, dtype=dtype)
    a, b = leaf(x), leaf(alpha)
    distances = weighted_l1.weighted_l1_distances(a, b, workspace_mb=workspace_mb)
    upstream = torch.rand(samples, samples, dtype=dtype)
    distances.backward(upstream)
    c, d = leaf(x.double()), leaf(alpha.double())
    expected = ((c[:, None] - c).abs() * d).sum(2).triu(1)
    expected.backward(upstream.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for ours, theirs in ((distances, expected), (a.grad, c.grad), (b.grad, d.grad)):
        assert ours.dtype == dtype and relative_error(ours.detach(), theirs.detach()) < tolerance


@pytest.mark.parametrize("own", [slice(0, 5), slice(5, 5), slice(5, 12), slice(12, 20)])
@pytest.mark.parametrize("workspace_mb", [256, 1e-3])
def test_distances_of_some_rows(own, workspace_mb):
    """The part of all distances that a rank computes, and its gradients."""
    x, _, _ = problem(20, 4, 6)
    a, b, c, d = (
        leaf(x),
        leaf(torch.linspace(-1.0, 2.0, 6).double()),
        leaf(x),
        leaf(torch.linspace(-1.0, 2.0, 6).double()),
    )
    distances = weighted_l1.weighted_l1_distances(a, b, own, workspace_mb=workspace_mb)
    expected = ((c[:, None] - c).abs() * d).sum(2).triu(1)[own]
    upstream = torch.rand(expected.shape, dtype=torch.float64)
    distances.backward(upstream)
    expected.backward(upstream)
    for ours, theirs in ((distances, expected), (a.grad, c.grad), (b.grad, d.grad)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_shifted_rows_keep_the_precision_of_the_gradient():
    x, _, _ = problem(20, 4, 6)
    shifted, alpha = (x + 2.0**12).float(), torch.ones(6, requires_grad=True)
    weighted_l1.weighted_l1_distances(shifted, alpha).sum().backward()
    expected = torch.stack([(a - b).abs() for a, b in itertools.combinations(shifted.double(), 2)]).sum(0)
    assert relative_error(alpha.grad, expected) < 1e-5


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor created."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_memory_is_quadratic():
    rows, alpha = torch.randn(300, 512), torch.ones(512)
    tile = weighted_l1.TILE_BYTES["cpu"] // rows.element_size()
    with LargestTensor() as forward:
        distances = weighted_l1.forward(rows, alpha, 0, 300, 1 << 28)
    with LargestTensor() as backward:
        weighted_l1.backward(distances, rows, alpha, 0, 300, 1 << 28)
    for most in (forward.elements, backward.elements):
        assert most <= max(300 * 512, tile) < 300 * 300 * 512 // 10


@pytest.mark.parametrize("labels", [[-100, -100, -100], [-100, 1, -100], [], [3]])
@pytest.mark.parametrize("balanced", [True, False])
def test_batch_without_pairs(labels, balanced):
    """The loss and its gradient are 0."""
    loss_fn, x = fm.SiameseL1Loss(4, balanced=balanced), torch.randn(len(labels), 4, requires_grad=True)
    loss = loss_fn(x, torch.tensor(labels, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    for gradient in (x.grad, loss_fn.alpha.grad, loss_fn.bias.grad):
        assert gradient is not None and not gradient.any()  # not NaN either


def test_one_kind_of_pairs():
    x, _, alpha, bias = batch(5)
    for y in (torch.zeros(5, dtype=torch.int64), torch.arange(5)):
        loss = loss_of(5, alpha, bias)(x, y)
        torch.testing.assert_close(loss.detach(), plain_loss(x, y, alpha, bias))
        torch.testing.assert_close(loss * 2, loss_of(5, alpha, bias, balanced=False)(x, y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_and_integer_labels(dtype):
    x, y, _, _ = batch(9)
    loss_fn, a, b = fm.SiameseL1Loss(5), leaf(x.to(dtype)), leaf(x.to(dtype).double())
    loss, expected = loss_fn(a, y.to(torch.uint8)), loss_fn(b, y)
    assert loss.dtype == torch.float32 and relative_error(loss, expected) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss_fn(a, y), loss)
    loss.backward()
    expected.backward()
    assert a.grad.dtype == dtype
    assert relative_error(a.grad, b.grad) < 1.5 * relative_error(b.grad.to(dtype), b.grad) + 1e-6
    assert loss_fn.to(dtype)(a, y).dtype == torch.float32


def test_nan_propagates_from_samples_that_are_not_ignored():
    x, y, _, _ = batch(6)
    x[1, 2] = math.nan
    assert fm.SiameseL1Loss(5)(x, y).isnan()
    y[1] = -100
    a = leaf(x)
    loss = fm.SiameseL1Loss(5)(a, y)
    loss.backward()
    assert loss.isfinite() and a.grad.isfinite().all() and not a.grad[1].any()


def test_equal_and_zero_rows_have_finite_gradients():
    x = leaf(torch.zeros(4, 5))
    with torch.no_grad():
        x[0, 0] = x[1, 0] = 3.0
    fm.SiameseL1Loss(5)(x, torch.tensor([0, 0, 1, 1])).backward()
    assert x.grad.isfinite().all()


@pytest.mark.slow
def test_compiled_and_repeated_calls():
    torch._dynamo.reset()
    x, y, _, _ = batch(9)
    results = []
    loss_fn = fm.SiameseL1Loss(5)
    for function in (loss_fn, loss_fn, torch.compile(loss_fn, fullgraph=True, backend="aot_eager")):
        loss_fn.zero_grad()
        a = leaf(x.float())
        loss = function(a, y)
        loss.backward()
        results.append([loss.detach(), a.grad, loss_fn.alpha.grad.clone(), loss_fn.bias.grad.clone()])
    for once, again, compiled in zip(*results, strict=True):
        assert torch.equal(once, again)
        torch.testing.assert_close(compiled, once)


def test_opcheck():
    rows, alpha = leaf(torch.randn(5, 3)), leaf(torch.randn(3))
    torch.library.opcheck(weighted_l1.l1_distances, (rows, alpha, 1, 3, 1 << 20))
    distances = weighted_l1.weighted_l1_distances(rows, alpha)
    (gradient,) = torch.autograd.grad(distances.sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


def of_rank(group, embeddings, labels, alpha, bias, options):
    """The loss, and the gradients of the embeddings, of alpha and of the bias, summed over two steps."""
    loss_fn, x = loss_of(5, alpha, bias, process_group=group, **options), leaf(embeddings)
    for _ in range(2):
        loss = loss_fn(x, labels)
        loss.backward()
    assert loss_fn.process_group is group and len(loss_fn.state_dict()) == 2
    return loss.detach(), x.grad, loss_fn.alpha.grad, loss_fn.bias.grad


@pytest.mark.parametrize("options", [{}, {"normalize": False, "balanced": False}], ids=["default", "plain"])
@pytest.mark.parametrize("counts", [[6, 7], [0, 9, 4], [1, 12]])
def test_ranks_equal_one_device(ranks, counts, options):
    """The gradient of alpha and of the bias is the same on all ranks."""
    x, y, alpha, bias = batch(13)
    y[3] = -100
    loss, gradient, *of_parameters = of_rank(None, x, y, alpha, bias, options)
    torch.testing.assert_close(loss, plain_loss(x, y, alpha, bias, **options))
    parts = zip(x.split(counts), y.split(counts), strict=True)
    results = ranks.run(of_rank, [(*part, alpha, bias, options) for part in parts])
    for of_one, _, *own in results:
        torch.testing.assert_close(of_one, loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(own, of_parameters, rtol=1e-10, atol=1e-14)
        assert all(torch.equal(ours, first) for ours, first in zip(own, results[0][2:], strict=True))
    torch.testing.assert_close(torch.cat([own for _, own, *_ in results]), gradient, rtol=1e-10, atol=1e-14)


def test_ranks_without_pairs(ranks):
    x, _, alpha, bias = batch(2)
    labels = torch.tensor([3, -100])
    for loss, *gradients in ranks.run(of_rank, [(x[k : k + 1], labels[k : k + 1], alpha, bias, {}) for k in (0, 1)]):
        assert loss == 0 and not any(gradient.any() for gradient in gradients)


def wrong_size(group, size):
    fm.SiameseL1Loss(4, process_group=group)(torch.ones(2, size), torch.arange(2))


@pytest.mark.parametrize("sizes", [(4, 5), (5, 5)])
def test_wrong_size_raises_on_every_rank(ranks, sizes):
    with pytest.raises(RankError, match=r"(?s)rank 0: ValueError: embeddings: .*rank 1: ValueError: embeddings: "):
        ranks.run(wrong_size, [(size,) for size in sizes])


def test_mean_is_the_only_reduction():
    loss_fn = fm.SiameseL1Loss(4)
    with pytest.raises(ValueError, match="reduction: expected one of 'mean', got 'sum'"):
        loss_fn.reduction = "sum"
    assert loss_fn.reduction == "mean"


def test_learning():
    """The distance learns which dimensions tell identities apart, and the network moves the features."""
    torch.manual_seed(0)
    centers = torch.randn(8, 6)
    network, loss_fn = torch.nn.Linear(12, 6), fm.SiameseL1Loss(6)
    optimizer = torch.optim.Adam([*network.parameters(), *loss_fn.parameters()], lr=0.02)
    losses = []
    for _ in range(80):
        labels = torch.arange(8).repeat_interleave(4)
        inputs = torch.cat([centers[labels] + 0.2 * torch.randn(32, 6), 3.0 * torch.randn(32, 6)], 1)  # half is noise
        loss = loss_fn(network(inputs), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fm.SiameseL1Loss(0), ValueError, "embedding_size"),
        (lambda: fm.SiameseL1Loss(4, normalize="yes"), TypeError, "normalize"),
        (lambda: fm.SiameseL1Loss(4, balanced=2), TypeError, "balanced"),
        (lambda: fm.SiameseL1Loss(4, ignore_index=0.5), TypeError, "ignore_index"),
        (lambda: fm.SiameseL1Loss(4, workspace_mb=0), ValueError, "workspace_mb"),
        (lambda: fm.SiameseL1Loss(4, process_group="gloo"), TypeError, "process_group: expected a torch.distributed"),
        (lambda: setattr(fm.SiameseL1Loss(4), "process_group", None), AttributeError, "process_group"),
        (lambda: fm.SiameseL1Loss(4)(torch.ones(3, 5), torch.arange(3)), ValueError, "embeddings: expected embedding_size 4"),
        (lambda: fm.SiameseL1Loss(4)(torch.ones(4), torch.arange(3)), ValueError, "embeddings"),
        (lambda: fm.SiameseL1Loss(4)(torch.ones(3, 4), torch.arange(4)), ValueError, "labels"),
        (lambda: fm.SiameseL1Loss(4)(torch.ones(3, 4), torch.ones(3)), TypeError, "labels"),
        (lambda: fm.SiameseL1Loss(4)(torch.ones(3, 4), None), TypeError, "labels"),
    ],
)  # fmt: skip
def test_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
