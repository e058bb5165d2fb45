"""AM-Softmax, CoCo and vMF against the formulas of their papers, and against other libraries."""

import math

import pytest
import torch
from loss_inputs import leaf, problem, relative_error
from pytorch_metric_learning import losses
from scipy.special import ive

import fused_margin as fm
from fused_margin.margins import minimum_scale

N, C, D = 9, 12, 6


def unit(row):
    return row / math.sqrt(float((row**2).sum()))


def am_softmax(x, w, y, s=30.0, m=0.35):
    """arXiv:1801.05599."""
    total = 0.0
    for row, label in zip(x, y.tolist(), strict=True):
        cosine = [float(unit(row) @ unit(center)) for center in w]
        own = math.exp(s * (cosine[label] - m))
        total -= math.log(own / (own + sum(math.exp(s * c) for j, c in enumerate(cosine) if j != label)))
    return total / len(y)


def coco(x, w, y, alpha):
    """arXiv:1710.00870: cross-entropy of one-hot labels and the softmax of normalized, scaled features by centroids."""
    total = 0.0
    for row, label in zip(x, y.tolist(), strict=True):
        scaled = alpha * unit(row)
        exponentials = [math.exp(float(unit(center) @ scaled)) for center in w]
        total -= math.log(exponentials[label] / sum(exponentials))
    return total / len(y)


def log_density(x, mean, kappa):
    """log of the von Mises-Fisher density C_d(kappa) exp(kappa mean . x), with its normalizer."""
    order = len(x) / 2 - 1
    log_bessel = math.log(ive(order, kappa)) + kappa
    return order * math.log(kappa) - len(x) / 2 * math.log(2 * math.pi) - log_bessel + kappa * float(mean @ x)


def vmf(x, w, y, kappa=16.0):
    """arXiv:1706.04264: minus the log posterior of the component of the class, with equal priors."""
    total = 0.0
    for row, label in zip(x, y.tolist(), strict=True):
        densities = [math.exp(log_density(unit(row), unit(mean), kappa)) / C for mean in w]
        total -= math.log(densities[label] / sum(densities))
    return total / len(y)


def coco_alpha(classes):
    """Own cosine 1, others 0: a loss of log(1 + (C - 1) exp(-alpha)) = 1e-4."""
    return math.log((classes - 1) / (math.exp(1e-4) - 1))


LOSSES = {
    "am-softmax": (fm.AMSoftmaxLoss, {}, am_softmax),
    "am-softmax with other numbers": (
        lambda *sizes, **o: fm.AMSoftmaxLoss(*sizes, 0.2, 12.0, **o),
        {},
        lambda *a: am_softmax(*a, 12.0, 0.2),
    ),
    "coco": (fm.CoCoLoss, {}, lambda *a: coco(*a, coco_alpha(C))),
    "coco with alpha": (fm.CoCoLoss, {"alpha": 6.25}, lambda *a: coco(*a, 6.25)),
    "vmf": (fm.VMFLoss, {}, vmf),
    "vmf with kappa": (fm.VMFLoss, {"kappa": 5.0}, lambda *a: vmf(*a, 5.0)),
}


def of_library(name):
    """pytorch-metric-learning's loss, which has its weights in columns."""
    if name.startswith("am"):
        return losses.CosFaceLoss(C, D, margin=0.35, scale=30)
    scale = coco_alpha(C) if name == "coco" else 16.0
    return losses.NormalizedSoftmaxLoss(C, D, temperature=1 / scale)


def with_weight(loss_fn, w):
    loss_fn.weight.data.copy_(w)
    return loss_fn


@pytest.mark.parametrize("name", LOSSES)
def test_formulas_of_the_papers(name):
    x, w, y = problem(N, C, D)
    make, options, plain = LOSSES[name]
    loss_fn = with_weight(make(C, D, dtype=torch.float64, **options), w)
    assert loss_fn(x, y).item() == pytest.approx(plain(x, w, y), rel=1e-12)


@pytest.mark.parametrize("name", ["am-softmax", "coco", "vmf"])
def test_pytorch_metric_learning_has_the_same(name):
    x, w, y = problem(N, C, D)
    ours = with_weight(LOSSES[name][0](C, D, dtype=torch.float64), w)
    theirs = of_library(name).double()
    theirs.W.data.copy_(w.t())
    results = []
    for loss_fn, weight in ((ours, ours.weight), (theirs, theirs.W)):
        a = leaf(x)
        loss = loss_fn(a, y)
        loss.backward()
        results.append((loss.detach(), a.grad, weight.grad if weight is ours.weight else weight.grad.t()))
    for mine, other in zip(*results, strict=True):
        assert relative_error(mine, other) < 1e-9


@pytest.mark.parametrize(
    ("loss_class", "parent"),
    [(fm.AMSoftmaxLoss, fm.CosFaceLoss), (fm.CoCoLoss, fm.NormFaceLoss), (fm.VMFLoss, fm.NormFaceLoss)],
)
def test_training_and_names(loss_class, parent):
    torch.manual_seed(0)
    x, _, y = problem(60, 4, D)
    loss_fn = loss_class(4, D)
    assert isinstance(loss_fn, parent)
    embed = torch.nn.Linear(D, D)
    optimizer = torch.optim.Adam([*embed.parameters(), *loss_fn.parameters()], 0.05)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        values.append(loss_fn(embed(x.float()), y))
        values[-1].backward()
        optimizer.step()
    assert values[-1] < 0.9 * values[0]


def test_numbers_are_settings():
    x, w, y = problem(N, C, D)
    for loss_class, name in ((fm.CoCoLoss, "alpha"), (fm.VMFLoss, "kappa")):
        loss_fn = with_weight(loss_class(C, D, dtype=torch.float64), w)
        setattr(loss_fn, name, 9.0)
        assert loss_fn.scale == getattr(loss_fn, name) == 9.0
        assert loss_fn(x, y).item() == pytest.approx(coco(x, w, y, 9.0), rel=1e-12)
        for wrong, error in ((0.0, ValueError), ("9", TypeError), (math.inf, ValueError)):
            with pytest.raises(error, match=name):
                setattr(loss_fn, name, wrong)
            with pytest.raises(error, match=name):
                loss_class(C, D, wrong)
        assert loss_fn.scale == 9.0


def test_default_alpha_suits_the_number_of_classes(recwarn):
    for classes in (1, 2, 10, 87_020, 1_000_000):
        alpha = fm.CoCoLoss(classes, 1).alpha
        assert alpha == pytest.approx(coco_alpha(max(2, classes)))
        assert classes < 2 or alpha > minimum_scale(classes, 0.9)
    assert not recwarn.list
