"""The InsightFace drop-ins against InsightFace's formulas, written out: losses, gradients, sampling, optimizers."""

import math
import warnings

import pytest
import torch
from loss_inputs import leaf, problem, relative_error
from ranks import RankError
from torch import nn
from torch.nn import functional as F

import fused_margin as fm
from fused_margin.compat import insightface
from fused_margin.compat.insightface import ArcFace, CombinedMarginLoss, CosFace, PartialFC_V2
from fused_margin.distributed import slice_of

CLASSES, SIZE = 31, 6


def combined(s, m1, m2, m3):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CombinedMarginLoss(s, m1, m2, m3)


def oracle_logits(cosine, labels, s, m1, m2, m3, threshold=math.inf):
    """InsightFace's logits as full matrices; the margin and filtered classes have no gradient."""
    rows = torch.arange(len(labels))
    own = cosine[rows, labels].detach()
    moved = (m1 * own.arccos() + m2).cos() - m3
    dirty = (cosine > threshold).index_put((rows, labels), torch.tensor(False))
    cosine = torch.where(dirty, 0.0, cosine)
    return s * cosine.index_put((rows, labels), moved - own, accumulate=True)


def oracle(x, w, y, *numbers):
    cosine = (F.normalize(x) @ F.normalize(w).t()).clamp(-1, 1)
    return F.cross_entropy(oracle_logits(cosine, y, *numbers), y)


def truth(x, w, y, *numbers):
    """Loss and gradients in float64."""
    x, w = leaf(x.double()), leaf(w.double())
    loss = oracle(x, w, y, *numbers)
    loss.backward()
    return loss.detach(), x.grad, w.grad


def one_rank(group, margin_loss, num_classes, weight, x, y, options):
    torch.manual_seed(0)
    fc = PartialFC_V2(margin_loss, x.shape[1], num_classes, process_group=group, **options).to(x.dtype)
    with torch.no_grad():
        fc.weight.copy_(weight)
    x = leaf(x)
    loss = fc(x, y)
    loss.backward()
    return loss.detach(), x.grad, fc.weight.grad


def on_ranks(ranks, margin_loss, counts, x, w, y, **options):
    """The losses, and the gradients of all embeddings and all class weights."""
    world_size, num_classes = len(counts), len(w)
    arguments = []
    for rank, own_x, own_y in zip(range(world_size), x.split(counts), y.split(counts), strict=True):
        begin, end = slice_of(num_classes, rank, world_size)
        arguments.append((margin_loss, num_classes, w[begin:end], own_x, own_y, options))
    losses, x_grads, w_grads = zip(*ranks.run(one_rank, arguments), strict=True)
    return losses, torch.cat(x_grads), torch.cat(w_grads)


MARGINS = {
    "ArcFace": (ArcFace(), (64.0, 1.0, 0.5, 0.0)),
    "CosFace": (CosFace(), (64.0, 1.0, 0.0, 0.4)),
    "combined, ArcFace": (CombinedMarginLoss(64, 1.0, 0.5, 0.0), (64.0, 1.0, 0.5, 0.0)),
    "combined, CosFace": (CombinedMarginLoss(32, 1.0, 0.0, 0.4), (32.0, 1.0, 0.0, 0.4)),
    "combined, all": (combined(64, 0.9, 0.4, 0.15), (64.0, 0.9, 0.4, 0.15)),
}
FILTERED = {
    "filtered": (CombinedMarginLoss(64, 1.0, 0.5, 0.0, 0.4), (64.0, 1.0, 0.5, 0.0, 0.4)),
    "filtered, small scale": (CombinedMarginLoss(8, 1.0, 0.0, 0.3, 0.1), (8.0, 1.0, 0.0, 0.3, 0.1)),
}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", MARGINS | FILTERED)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_loss_and_gradients(ranks, world_size, name, dtype, bound):
    """Batches differ between ranks; one may have none."""
    margin_loss, numbers = (MARGINS | FILTERED)[name]
    counts = [[11], [7, 4], [6, 0, 5]][world_size - 1]
    x, w, y = problem(sum(counts), CLASSES, SIZE)
    x, w = x.to(dtype), w.to(dtype)
    losses, dx, dw = on_ranks(ranks, margin_loss, counts, x, w, y)
    loss, x_grad, w_grad = truth(x, w, y, *numbers)
    assert all(relative_error(actual, loss) < bound and actual.dtype == dtype for actual in losses)
    assert relative_error(dx, world_size * x_grad) < bound  # DistributedDataParallel divides by the world_size size
    assert relative_error(dw, w_grad) < bound


@pytest.mark.parametrize("options", [{}, {"sample_rate": 0.9}])
def test_more_ranks_than_classes(ranks, options):
    x, w, y = problem(7, 2, SIZE)
    losses, dx, dw = on_ranks(ranks, ArcFace(), [2, 4, 1], x, w, y, **options)
    loss, x_grad, w_grad = truth(x, w, y, 64.0, 1.0, 0.5, 0.0)
    assert all(relative_error(actual, loss) < 1e-9 for actual in losses)
    assert relative_error(dx, 3 * x_grad) < 1e-9 and relative_error(dw, w_grad) < 1e-9


def test_beyond_pi():
    """An embedding opposite to its class: the cosine is not monotone beyond pi, so the margin reduces the loss."""
    w = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    x = -w[:1] + 1e-3
    fc = PartialFC_V2(ArcFace(8.0, 0.5), 2, 2).double()
    with torch.no_grad():
        fc.weight.copy_(w)
    loss, expected = fc(x, torch.tensor([0])), oracle(x, w, torch.tensor([0]), 8.0, 1.0, 0.5, 0.0)
    own = F.normalize(x)[0].dot(w[0])
    assert own.arccos() + 0.5 > math.pi
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


def test_loss_has_no_cap():
    x, w = torch.eye(2)[:1], torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    fc = PartialFC_V2(CosFace(64.0, 0.4), 2, 2)
    with torch.no_grad():
        fc.weight.copy_(w)
    assert fc(x, torch.tensor([0])).item() == pytest.approx(64 * 2.4, rel=1e-5)  # theirs: 69.08


@pytest.mark.parametrize("form", [(-1,), (-1, 1)])
def test_margins_on_logits(form):
    """Logits are scaled, with a straight-through gradient; label -1 has no margin; the input is not modified."""
    cosine, labels = torch.rand(5, 4, dtype=torch.float64) * 2 - 1, torch.tensor([0, 3, -1, 1, -1])
    has = labels >= 0
    for margin_loss, numbers in MARGINS.values():
        given, before = leaf(cosine), cosine.clone()
        logits = margin_loss(given, labels.view(form))
        torch.testing.assert_close(logits[has], oracle_logits(cosine[has], labels[has], *numbers), rtol=1e-9, atol=0)
        torch.testing.assert_close(logits[~has], numbers[0] * cosine[~has], rtol=1e-9, atol=0)
        upstream = torch.randn_like(logits)
        logits.backward(upstream)
        torch.testing.assert_close(given.grad, numbers[0] * upstream)
        assert torch.equal(given, before)


def test_filtering_on_logits():
    """The logit of another class above the threshold is 0."""
    margin_loss = CombinedMarginLoss(10.0, 1.0, 0.0, 0.25, interclass_filtering_threshold=0.5)
    cosine = torch.tensor([[0.75, 0.625, 0.25], [0.75, 0.5, -0.75]], requires_grad=True)
    logits = margin_loss(cosine, torch.tensor([0, -1]))
    assert logits.tolist() == [[5.0, 0.0, 2.5], [0.0, 5.0, -7.5]]
    logits.sum().backward()
    assert cosine.grad.tolist() == [[10.0, 0.0, 10.0], [0.0, 10.0, 10.0]]


def test_attributes_and_state_dict():
    torch.manual_seed(3)
    fc = PartialFC_V2(ArcFace(), SIZE, 100, sample_rate=0.255)
    torch.manual_seed(3)
    assert torch.equal(fc.weight, torch.normal(0, 0.01, (100, SIZE)))  # their sampling
    assert (fc.rank, fc.world_size, fc.class_start, fc.num_local, fc.num_sample) == (0, 1, 0, 100, 25)
    assert (fc.embedding_size, fc.sample_rate, fc.fp16) == (SIZE, 0.255, False)
    assert list(fc.state_dict()) == ["weight"] and [name for name, _ in fc.named_parameters()] == ["weight"]
    assert PartialFC_V2(ArcFace(), SIZE, 100, 0.5, True).fp16


def attributes(group):
    fc = PartialFC_V2(ArcFace(), SIZE, 10, process_group=group)
    default = PartialFC_V2(ArcFace(), SIZE, 10)  # the default group of the process has four ranks
    return fc.rank, fc.world_size, fc.class_start, fc.num_local, tuple(fc.weight.shape), default.world_size


def test_slice_of_each_rank(ranks):
    assert ranks.run(attributes, [()] * 3) == [
        (0, 3, 0, 4, (4, SIZE), 4),
        (1, 3, 4, 3, (3, SIZE), 4),
        (2, 3, 7, 3, (3, SIZE), 4),
    ]


@pytest.mark.parametrize("threshold", [0, 0.4])
@pytest.mark.parametrize("sparse", [False, True])
def test_sampling(ranks, sparse, threshold):
    """The loss is over the sampled classes, which include the targets."""
    x, w, y = problem(9, 40, SIZE)
    margin_loss = CombinedMarginLoss(8.0, 1.0, 0.5, 0.0, threshold)
    losses, dx, dw = on_ranks(ranks, margin_loss, [5, 4], x, w, y, sample_rate=0.5, sparse=sparse)
    assert dw.is_sparse == sparse
    dw = dw.to_dense()
    sampled = dw.abs().sum(dim=1).nonzero().squeeze(1)
    assert len(sampled) == 20 and (sampled < 20).sum() == 10 and torch.isin(y, sampled).all()
    numbers = (8.0, 1.0, 0.5, 0.0, threshold or math.inf)
    loss, x_grad, w_grad = truth(x, w[sampled], torch.searchsorted(sampled, y), *numbers)
    assert all(relative_error(actual, loss) < 1e-9 for actual in losses)
    assert relative_error(dx, 2 * x_grad) < 1e-9
    assert relative_error(dw[sampled], w_grad) < 1e-9


def test_more_targets_than_the_sample_rate_allows():
    fc = PartialFC_V2(CosFace(), SIZE, 40, sample_rate=0.1, sparse=True)
    fc(torch.randn(12, SIZE), torch.arange(12)).backward()
    assert fc.weight.grad.coalesce().indices()[0].tolist() == list(range(12))


SAMPLED_OPTIMIZERS = {
    "SGD": (False, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01)),
    "AdamW": (False, lambda p: torch.optim.AdamW(p, lr=0.01)),
    "ProjectedSGD": (
        True,
        lambda p: fm.optim.ProjectedSGD([{"params": list(p), "project": False}], lr=0.1, weight_decay=0.01),
    ),
}


@pytest.mark.parametrize("name", SAMPLED_OPTIMIZERS)
def test_optimizers_with_sampling(name):
    """Dense gradients update every class, with momentum and decay, as theirs do; sparse ones only sampled classes."""
    sparse, make = SAMPLED_OPTIMIZERS[name]
    fc = PartialFC_V2(ArcFace(8.0), SIZE, 40, sample_rate=0.2, sparse=sparse).double()
    dense_weight = nn.Parameter(fc.weight.detach().clone())
    alone = [nn.Parameter(row.clone()) for row in fc.weight.detach()]  # updated only when it has a gradient
    optimizer, dense = make(fc.parameters()), torch.optim.SGD(alone, lr=0.1, momentum=0.9, weight_decay=0.01)
    if not sparse:
        dense = make([dense_weight])
    for seed in range(4):
        x, _, y = problem(3, 40, SIZE, seed=seed)
        optimizer.zero_grad()
        fc(x, y).backward()
        gradient = fc.weight.grad
        if sparse:
            for row, parameter in enumerate(alone):
                sampled = row in gradient.coalesce().indices()[0]
                parameter.grad = gradient.to_dense()[row] if sampled else None
        else:
            dense_weight.grad = gradient.clone()
        optimizer.step()
        dense.step()
        expected = torch.stack(list(alone)) if sparse else dense_weight
        torch.testing.assert_close(fc.weight, expected, rtol=1e-9, atol=1e-12)


def test_fp16_allows_half_products(monkeypatch):
    """Kernels read autocast; without the option an outer autocast has no effect."""
    heard = []
    wrapped = insightface.margin_cross_entropy

    def listen(*args, **kwargs):
        heard.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return wrapped(*args, **kwargs)

    monkeypatch.setattr(insightface, "margin_cross_entropy", listen)
    x, w, y = problem(5, CLASSES, SIZE)
    losses = []
    for fp16 in (True, False):
        fc = PartialFC_V2(ArcFace(), SIZE, CLASSES, fp16=fp16)
        with torch.no_grad():
            fc.weight.copy_(w)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(fc(x.float(), y))
    assert heard[0] == (True, torch.float16) and not heard[1][0]
    assert losses[0].dtype == torch.float32 and relative_error(losses[0], losses[1]) < 1e-2


def test_margins_may_change_between_steps():
    x, w, y = problem(5, CLASSES, SIZE)
    fc = PartialFC_V2(CombinedMarginLoss(64, 1.0, 0.0, 0.0), SIZE, CLASSES).double()
    with torch.no_grad():
        fc.weight.copy_(w)
    for s, m2, threshold in ((64.0, 0.2, 0), (32.0, 0.4, 0.3), (32.0, 0.4, 2.0)):  # no cosine is above 2
        fc.margin_softmax.s, fc.margin_softmax.m2 = s, m2
        fc.margin_softmax.interclass_filtering_threshold = threshold
        expected = oracle(x, w, y, s, 1.0, m2, 0.0, threshold or math.inf)
        torch.testing.assert_close(fc(x, y), expected, rtol=1e-9, atol=0)


def test_column_labels_are_not_modified():
    x, _, y = problem(5, CLASSES, SIZE)
    fc = PartialFC_V2(ArcFace(), SIZE, CLASSES).double()
    column = y.unsqueeze(1)
    assert torch.equal(fc(x, column), fc(x, y)) and column.shape == (5, 1)


class OwnForward(ArcFace):
    def forward(self, logits, labels):
        return logits


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: PartialFC_V2(nn.Identity(), 4, 10), TypeError, "margin_loss: expected CombinedMarginLoss, ArcFace or"),
        (lambda: PartialFC_V2(OwnForward(), 4, 10), TypeError, "margin_loss: expected .* got .*OwnForward"),
        (lambda: PartialFC_V2(fm.ArcFaceLoss(10, 4), 4, 10), TypeError, "got fused_margin.losses.margin.ArcFaceLoss"),
        (
            lambda: CombinedMarginLoss(64, 1, 0.5, 0, -0.4),
            ValueError,
            "interclass_filtering_threshold: expected a number in",
        ),
        (lambda: PartialFC_V2(ArcFace(), 4, 10, 0.0), ValueError, "sample_rate: expected a number in"),
        (lambda: PartialFC_V2(ArcFace(), 4, 0), ValueError, "num_classes: expected a positive integer"),
        (lambda: CombinedMarginLoss(64, 0.0, 0.5, 0), ValueError, "m1: expected a positive number"),
        (lambda: ArcFace(0.0), ValueError, "s: expected a number in"),
        (lambda: ArcFace(64.0, math.nan), ValueError, "margin: expected a number in"),
        (lambda: CosFace(64.0, "0.4"), TypeError, "m: expected a number, got str"),
        (
            lambda: PartialFC_V2(ArcFace(), 4, 10)(torch.randn(2, 4), torch.tensor([3, -1])),
            ValueError,
            "labels: expected values in .* got -1",
        ),
        (
            lambda: PartialFC_V2(ArcFace(), 4, 10)(torch.randn(2, 4), torch.tensor([[3, 1]])),
            ValueError,
            "labels: expected shape",
        ),
        (
            lambda: ArcFace()(torch.rand(2, 4), torch.tensor([1, 4])),
            ValueError,
            "labels: expected values in .* got 4 for 4 classes",
        ),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_margins_that_insightface_ignores_warn():
    with pytest.warns(UserWarning, match="m1=1.0, m2=0.3 and m3=0.2 are applied together; insightface applies m3"):
        CombinedMarginLoss(64, 1.0, 0.3, 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CombinedMarginLoss(64, 1.0, 0.0, 0.2)


def bad_label(group, labels):
    PartialFC_V2(ArcFace(), SIZE, 10, process_group=group)(torch.randn(len(labels), SIZE), torch.tensor(labels))


def test_bad_label_raises_on_every_rank(ranks):
    with pytest.raises(RankError) as caught:
        ranks.run(bad_label, [([1, 2],), ([3, 10, 4],)])
    assert str(caught.value).count("got 10 on rank 1 for 10 classes\n") >= 2


def other_weights(group):
    fc = PartialFC_V2(ArcFace(), SIZE, 10, process_group=group)
    fc.weight = torch.nn.Parameter(torch.randn(fc.num_local + 1, SIZE))
    with pytest.raises(ValueError, match="weight: expected the 5 rows that rank . of 2 has of 10 classes, got 6"):
        fc(torch.randn(2, SIZE), torch.tensor([1, 2]))


def test_weights_of_another_division_are_an_error(ranks):
    ranks.run(other_weights, [()] * 2)
