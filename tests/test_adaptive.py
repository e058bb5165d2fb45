"""AdaFace, MagFace and ElasticFace against their papers' formulas, written out."""

import math

import pytest
import torch
from loss_inputs import leaf, problem, relative_error
from torch.nn import functional as F

import fused_margin as fm
from fused_margin import reference
from fused_margin.margins import minimum_scale


def compare(loss_fn, plain, x, y):
    """Loss and both gradients of a module and of `plain(embeddings, weight)`."""
    a = leaf(x)
    loss = loss_fn(a, y)
    loss.sum().backward()
    b, w = leaf(x), leaf(loss_fn.weight)
    expected = plain(b, w)
    expected.sum().backward()
    for m, e in ((loss, expected), (a.grad, b.grad), (loss_fn.weight.grad, w.grad)):
        assert relative_error(m, e) < 1e-9


def cross_entropy(x, w, y, psi, reduction="mean"):
    """Plain cross-entropy at scale 64 with psi(theta) as the target's logit."""
    cosine = reference.normalize(x) @ reference.normalize(w).t()
    own = F.one_hot(y, len(w)).bool()
    theta = torch.acos(cosine[own])
    return F.cross_entropy(64 * cosine.masked_scatter(own, psi(theta)), y, reduction=reduction)


def test_adaface():
    x, _, y = problem(40, 30, 8, spread=8.0, seed=1)
    loss_fn = fm.AdaFaceLoss(30, 8, dtype=torch.float64)
    loss_fn.norm_mean.fill_(22.0)
    loss_fn.norm_std.fill_(6.0)
    norm = x.norm(dim=1)
    mean, std = 0.99 * 22 + 0.01 * norm.mean(), 0.99 * 6 + 0.01 * norm.std()
    z = ((norm - mean) / (std + 1e-3) * 0.333).clamp(-1, 1)
    assert z.min() < -0.2 and z.max() > 0.2

    def plain(a, w):
        return cross_entropy(a, w, y, lambda t: torch.cos((t - 0.4 * z).clamp(0, math.pi)) - 0.4 - 0.4 * z)

    compare(loss_fn, plain, x, y)
    torch.testing.assert_close((loss_fn.norm_mean.squeeze(), loss_fn.norm_std.squeeze()), (mean, std))
    loss_fn.eval()(x, y)
    torch.testing.assert_close(loss_fn.norm_mean.squeeze(), mean)  # evaluation does not update the statistics


def test_adaface_at_the_poles_and_for_a_single_sample():
    w = torch.eye(4, dtype=torch.float64)
    loss_fn = fm.AdaFaceLoss(4, 4, dtype=torch.float64)
    with torch.no_grad():
        loss_fn.weight.copy_(w)
    x = leaf(torch.stack([50 * w[0], -50 * w[1]]))
    loss_fn(x, torch.tensor([0, 1])).backward()
    assert x.grad.isfinite().all() and loss_fn.weight.grad.isfinite().all()
    before = loss_fn.norm_std.clone()
    assert loss_fn(x[:1], torch.tensor([0])).isfinite() and loss_fn.norm_std == before


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_magface(reduction):
    x, _, y = problem(40, 30, 8, spread=20.0, seed=1)
    x[0] *= 0.01  # below the shortest norm, above the longest
    x[1] *= 10
    loss_fn = fm.MagFaceLoss(30, 8, reduction=reduction, dtype=torch.float64)

    def plain(a, w):
        norm = a.norm(dim=1).clamp(10, 110)
        margin = 0.45 + 0.35 * (norm - 10) / 100

        def psi(theta):
            phi = theta + margin
            return torch.where(phi > math.pi, -torch.cos(phi) - 2, torch.cos(phi))  # the monotone extension

        reward = 35 * (1 / norm + norm / 110**2)
        reward = {"mean": reward.mean(), "sum": reward.sum(), "none": reward}[reduction]
        return cross_entropy(a, w, y, psi, reduction) + reward

    compare(loss_fn, plain, x, y)


def test_magface_skips_ignored_samples():
    x, _, y = problem(10, 30, 8)
    loss_fn = fm.MagFaceLoss(30, 8, dtype=torch.float64)
    valid = torch.arange(10) != 4
    expected = loss_fn(x[valid], y[valid])
    torch.testing.assert_close(loss_fn(x, y.masked_fill(~valid, -100)), expected)


@pytest.mark.parametrize("kind", ["arc", "cos"])
def test_elasticface(kind):
    x, _, y = problem(2000, 30, 8)
    loss_fn = fm.ElasticFaceLoss(30, 8, margin=0.4, std=0.1, kind=kind, dtype=torch.float64)
    margin = loss_fn.current_margin(x, y)
    drawn, other = (margin.m2, margin.m3) if kind == "arc" else (margin.m3, margin.m2)
    assert other == 0 and abs(drawn.mean() - 0.4) < 0.01 and abs(drawn.std() - 0.1) < 0.01
    torch.manual_seed(5)
    loss = loss_fn(x, y)
    torch.manual_seed(5)
    name = "m2" if kind == "arc" else "m3"
    expected = reference.margin_cross_entropy(
        x, loss_fn.weight, y, {name: getattr(loss_fn.current_margin(x, y), name)}, 64.0
    )
    torch.testing.assert_close(loss, expected)
    still = (fm.ArcFaceLoss if kind == "arc" else fm.CosFaceLoss)(30, 8, margin=0.4, dtype=torch.float64)
    still.load_state_dict(loss_fn.state_dict())
    torch.testing.assert_close(loss_fn.eval()(x, y), still(x, y))


def test_elasticface_gives_the_hardest_samples_the_largest_margin():
    x, _, y = problem(50, 30, 8, seed=1)  # not the seed of the weights, which would repeat some of them as embeddings
    loss_fn = fm.ElasticFaceLoss(30, 8, by_difficulty=True, dtype=torch.float64)
    cosine = F.cosine_similarity(x, loss_fn.weight[y])
    margin = loss_fn.current_margin(x, y).m2
    assert (margin[cosine.argsort()].diff() <= 0).all() and margin.std() > 0.01


@pytest.mark.parametrize("module", [fm.AdaFaceLoss, fm.MagFaceLoss, fm.ElasticFaceLoss])
def test_module_conventions(module):
    x, _, y = problem(12, 30, 8)
    loss_fn = module(30, 8, exclusive_weight=0.1, easy=True, class_weight=torch.rand(30))
    other = module(30, 8, class_weight=torch.ones(30), exclusive_weight=0.1, easy=True)
    other.load_state_dict(loss_fn.state_dict())
    torch.manual_seed(3)
    expected = loss_fn.eval()(x.float(), y)
    assert torch.equal(other.eval()(x.float(), y), expected)
    torch._dynamo.reset()
    compiled = torch.compile(loss_fn.train(), fullgraph=True, backend="aot_eager")
    a = leaf(x.float())
    compiled(a, y).backward()
    assert a.grad.isfinite().all() and a.grad.norm() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fm.AdaFaceLoss(10, 4, margin=-0.1), "margin"),
        (lambda: fm.AdaFaceLoss(10, 4, concentration=0.0), "concentration"),
        (lambda: fm.MagFaceLoss(10, 4, norms=(10.0, 10.0)), r"norms\[1\]"),
        (lambda: fm.MagFaceLoss(10, 4, margins=(0.8, 0.4)), r"margins\[1\]"),
        (lambda: fm.ElasticFaceLoss(10, 4, kind="both"), "kind"),
        (lambda: minimum_scale(1, 0.9), "num_classes"),
        (lambda: minimum_scale(10, 1.0), "probability"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("classes", "probability"), [(2, 0.9), (10, 0.9), (10_575, 0.99)])
def test_minimum_scale_reaches_the_probability(classes, probability):
    """At the bound, a sample on its own class weight, with weights at equal angles, has exactly that probability."""
    scale = minimum_scale(classes, probability)
    apart = -1 / (classes - 1)
    reached = 1 / (1 + (classes - 1) * math.exp(scale * (apart - 1)))
    assert abs(reached - probability) < 1e-12


@pytest.mark.parametrize("module", [fm.SphereFaceLoss, fm.AdaFaceLoss, fm.MagFaceLoss, fm.ElasticFaceLoss])
def test_nan_embedding_gives_nan_loss_and_keeps_statistics(module):
    x, _, y = problem(12, 30, 8, seed=1)
    loss_fn = module(30, 8, dtype=torch.float64)
    bad = x.clone()
    bad[3, 0] = math.nan
    assert loss_fn(bad, y).isnan()
    assert loss_fn(x, y).isfinite()


def test_rejected_or_ignored_batch_keeps_adaface_statistics():
    x, _, y = problem(12, 30, 8)
    loss_fn = fm.AdaFaceLoss(30, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="labels"):
        loss_fn(x, y + 30)
    loss_fn(x, y.fill_(-100))
    assert loss_fn.norm_mean == 20 and loss_fn.norm_std == 100


@pytest.mark.parametrize("module", [fm.AdaFaceLoss, fm.MagFaceLoss, fm.ElasticFaceLoss])
def test_invalid_batches_raise_before_any_computation(module):
    x, _, y = problem(12, 30, 8)
    loss_fn = module(30, 8, dtype=torch.float64)
    for batch in (x[:, :7], x[0], x.long(), x.numpy()):
        with pytest.raises((ValueError, TypeError), match="embeddings"):
            loss_fn(batch, y)
    assert "m1=" not in repr(loss_fn)
    with pytest.raises(TypeError, match="margins"):
        fm.MagFaceLoss(10, 4, margins=0.5)


@pytest.mark.parametrize("module", [fm.AdaFaceLoss, fm.MagFaceLoss, fm.CurricularFaceLoss])
def test_unsigned_labels(module):
    """-100, the ignore_index, is 156 as uint8."""
    x, _, y = problem(9, 200, 8, spread=8.0)
    y[:3] = 156
    state = module(200, 8, dtype=torch.float64).state_dict()
    results = []
    for labels in (y, y.to(torch.uint8)):
        loss_fn = module(200, 8, dtype=torch.float64)
        loss_fn.load_state_dict(state)
        results.append((loss_fn(x, labels), loss_fn.state_dict()))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
