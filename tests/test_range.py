"""The range of logits and class weights: up to the limit of float32; beyond it inf or NaN, never a wrong number."""

import math
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F

import fused_margin as fm
from fused_margin._ops.nearest import cache, quantized
from fused_margin.distributed import Shard, slice_of

N, C, D = 16, 50, 8
WORKSPACES = [256, 1e-6]


def error(measured, expected):
    return ((measured.double() - expected).norm() / expected.norm()).item()


def gradients_and_loss(loss, *leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def leaves(embedding_size, weight_size, dtype=torch.float32):
    torch.manual_seed(0)
    x, w = torch.randn(N, D) * embedding_size, torch.randn(C, D) * weight_size
    return [t.to(dtype).requires_grad_() for t in (x, w)], torch.randint(C, (N,))


@pytest.mark.parametrize("workspace_mb", WORKSPACES, ids=["saved", "recomputed"])
@pytest.mark.parametrize("size", [1e3, 1e6, 1e7, 1e9, 1e12, 1e20, 1e30, 1e37])
def test_large_logits(size, workspace_mb):
    (x, w), y = leaves(size, 1.0)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    expected = gradients_and_loss(F.cross_entropy(exact[0] @ exact[1].t(), y), *exact)
    loss = fm.functional.linear_cross_entropy(x, w, y, workspace_mb=workspace_mb)
    for measured, right in zip(gradients_and_loss(loss, x, w), expected, strict=True):
        assert error(measured, right) < 1e-6
    cosine = F.normalize(exact[0]) @ F.normalize(exact[1]).t()
    expected = gradients_and_loss(F.cross_entropy(exact[0].norm(dim=1, keepdim=True) * cosine, y), *exact)
    loss = fm.functional.margin_cross_entropy(x, w, y, fm.Margin(), None, workspace_mb=workspace_mb)
    for measured, right in zip(gradients_and_loss(loss, x, w), expected, strict=True):
        assert error(measured, right) < 1e-6


@pytest.mark.parametrize("logit", [10.0, 1e8, 1e12, 1e14, 1e16, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("workspace_mb", WORKSPACES, ids=["saved", "recomputed"])
def test_equal_logits_have_equal_probability(workspace_mb, dtype, logit):
    """The three largest logits are equal, in two chunks of 64 classes; the target's logit is the smallest."""
    x = torch.tensor([[logit, 0.0]], dtype=dtype)
    w = torch.tensor([[-1.0, 0.0]], dtype=dtype).repeat(128, 1)
    w[[3, 7, 70]] = torch.tensor([1.0, 0.0], dtype=dtype)
    w.requires_grad_()
    loss = fm.functional.linear_cross_entropy(x, w, torch.tensor([127]), workspace_mb=workspace_mb)
    (gradient,) = torch.autograd.grad(loss, w)
    expected = torch.zeros(128, dtype=torch.float64)
    expected[[3, 7, 70]], expected[127] = 1 / 3, -1.0
    torch.testing.assert_close(gradient[:, 0].double() / logit, expected, rtol=1e-6, atol=1e-8)


def test_chunk_with_only_the_target_class():
    """The sum of this chunk is empty, and the logits of the other chunk are very small."""
    (x, w), _ = leaves(1.0, 1.0)
    w, bias, y = w[:1].detach().repeat(65, 1).requires_grad_(), torch.full((65,), -2000.0), torch.full((N,), 64)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    expected = gradients_and_loss(F.cross_entropy(exact[0] @ exact[1].t() + bias.double(), y), *exact)
    loss = fm.functional.linear_cross_entropy(x, w, y, bias, workspace_mb=1e-6)
    for measured, right in zip(gradients_and_loss(loss, x, w), expected, strict=True):
        torch.testing.assert_close(measured.double(), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e9, 1e15])
def test_class_with_zero_probability(size, dtype):
    (x, w), y = leaves(size, 1.0, dtype)
    bias = torch.zeros(C, dtype=dtype)
    bias[7], y[y == 7] = -torch.inf, 8
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    expected = gradients_and_loss(F.cross_entropy(exact[0] @ exact[1].t() + bias.double(), y), *exact)
    loss = fm.functional.linear_cross_entropy(x, w, y, bias)
    for measured, right in zip(gradients_and_loss(loss, x, w), expected, strict=True):
        assert error(measured, right) < 1e-6


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e38), (torch.float64, 1e308)], ids=str)
def test_logits_out_of_range_are_not_finite(dtype, size):
    (x, w), y = leaves(1.0, 1.0, dtype)
    x = (F.normalize(x.detach()) * size * 1.7).requires_grad_()
    w = (F.normalize(w.detach()) * 4).requires_grad_()
    actual = gradients_and_loss(fm.functional.linear_cross_entropy(x, w, y), x, w)
    assert not actual[0].isfinite()


def on_a_rank(group, weight, classes, x, y):
    """Loss and gradients of this rank's samples and classes."""
    begin, end = slice_of(classes, group.rank(), group.size())
    x, weight = x.clone().requires_grad_(), weight[begin:end].clone().requires_grad_()
    loss = fm.functional.linear_cross_entropy(x, weight, y, shard=Shard(classes, group))
    return gradients_and_loss(loss, x, weight)


@pytest.mark.parametrize("size", [1e3, 1e16, 1e37])
def test_large_logits_of_divided_classes(ranks, size):
    (x, w), y = leaves(size, 1.0)
    w = w.detach().clone()
    w[[7, 40, 41]] = 3 * w[7]  # the same logits on both ranks
    w.requires_grad_()
    expected = gradients_and_loss(fm.functional.linear_cross_entropy(x, w, y), x, w)
    parts = [(w.detach(), C, x.detach()[rank::2], y[rank::2]) for rank in range(2)]
    results = ranks.run(on_a_rank, parts)
    d_x = torch.empty_like(x)
    for rank, (loss, of_x, _) in enumerate(results):
        assert error(loss, expected[0].double()) < 1e-6
        d_x[rank::2] = of_x
    assert error(d_x, expected[1].double()) < 1e-6
    assert error(torch.cat([of_w for *_, of_w in results]), expected[2].double()) < 1e-6


@pytest.mark.parametrize("workspace_mb", WORKSPACES, ids=["saved", "recomputed"])
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e10, 1e19, 1e24, 1e30])
def test_lengths_of_class_weights(size, workspace_mb):
    """torch.nn.functional.normalize fails from 1e19, where the square of a float32 is infinite."""
    (x, w), y = leaves(1.0, size)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    unit = F.normalize(exact[1], eps=1e-300)
    nearest = (unit @ unit.t()).fill_diagonal_(-2.0).amax(1).mean()
    expected = gradients_and_loss(F.cross_entropy(64 * F.normalize(exact[0]) @ unit.t(), y) + nearest, *exact)
    loss = fm.functional.margin_cross_entropy(x, w, y, fm.Margin(), exclusive_weight=1.0, workspace_mb=workspace_mb)
    for measured, right in zip(gradients_and_loss(loss, x, w), expected, strict=True):
        assert error(measured.double() * size, right * size) < 2e-6


def nearest_of_large_weights(group, weight, classes):
    """The nearest classes by every available search, with floating-point codes."""
    begin, end = slice_of(classes, group.rank(), group.size())
    part, results = weight[begin:end], []
    with (
        patch.object(quantized, "int8_is_fastest", lambda rows: False),
        patch.object(cache, "int8_is_fastest", lambda rows: False),
    ):
        for shard in [Shard(classes, group)] if group.size() > 1 else [Shard(classes, group), None]:
            results.append(fm.functional.nearest_class(part, shard=shard))
            results += [fm.ExclusiveRegularizer(refresh=how, shard=shard).find(part) for how in ("certified", 2)]
    return [tuple(each) for each in results]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("size", [1e-12, 1e19, 1e24, 1e36])
def test_nearest_of_large_class_weights(ranks, size, world_size):
    torch.manual_seed(0)
    unit = F.normalize(torch.randn(C, D, dtype=torch.float64))
    weight = (unit * torch.logspace(0, 1, C, dtype=torch.float64).unsqueeze(1) * size * 1.01).float()
    cosine, index = (unit @ unit.t()).fill_diagonal_(-2.0).max(1)
    results = ranks.run(nearest_of_large_weights, [(weight, C)] * world_size)
    for parts in zip(*results, strict=True):
        assert torch.equal(torch.cat([at for _, at in parts]), index)
        torch.testing.assert_close(torch.cat([c for c, _ in parts]).double(), cosine, rtol=0, atol=1e-6)


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("alone", [True, False], ids=["one set", "reference"])
@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize(
    ("dtype", "of_query", "of_reference"),
    [
        (torch.float64, 1e19, 1e19),
        (torch.float64, 1e-19, 1e60),
        (torch.float64, 1e200, 1e50),
        (torch.float64, 1e307, 1e-300),
        (torch.float64, 1e-140, 1e-140),
        (torch.float32, 2e18, 2e18),
        (torch.float32, 1e36, 1e-10),
        (torch.bfloat16, 2e18, 2e18),
    ],
    ids=str,
)
def test_inner_products_of_large_rows(dtype, of_query, of_reference, number, alone, int8):
    """Norms of rows vary a thousandfold and products fit the dtype; a row with NaN is never the nearest."""
    torch.manual_seed(0)
    if alone:
        of_query = of_reference = math.sqrt(of_query * of_reference)
    sizes = torch.logspace(-3, 0, C, dtype=torch.float64).unsqueeze(1)
    query, reference = (
        (torch.randn(C, D, dtype=torch.float64) * sizes * s).to(dtype) for s in (of_query, of_reference)
    )
    for rows in (query, reference):
        rows[9, 2] = torch.nan
    left = query.double() / of_query
    right = left if alone else reference.double() / of_reference
    products = left @ right.t()
    products[:, 9] = -torch.inf
    if alone:
        products.fill_diagonal_(-torch.inf)
    value, index = products.topk(number, 1)
    with patch.object(quantized, "int8_is_fastest", quantized.int8_is_fastest if int8 else lambda rows: False):
        actual = fm.functional.nearest_class(query, None if alone else reference, k=number, metric="inner_product")
    at, cosine = actual.index.view(C, number), actual.cosine.view(C, number).double()
    valid = torch.arange(C) != 9
    assert torch.equal(at[valid], index[valid]) and cosine[9].isnan().all()
    cosine = cosine / of_query / of_reference
    torch.testing.assert_close(cosine[valid], value[valid], rtol=4 * torch.finfo(dtype).eps, atol=1e-12)


FLOAT64 = {
    "intra": lambda x, w, y: fm.IntraLoss(reduction="none")(x, w, y),
    "inter": lambda x, w, y: fm.InterLoss(reduction="none")(w, y),
    "uniform": lambda x, w, y: fm.UniformLoss()(w),
    "nearest": lambda x, w, y: fm.functional.nearest_class(w).cosine,
    "exclusive": lambda x, w, y: fm.functional.exclusive_regularization(w),
    "margin": lambda x, w, y: fm.functional.margin_cross_entropy(x, w, y, reduction="none"),
}


@pytest.mark.parametrize("name", FLOAT64)
def test_float64_rows_out_of_range_are_nan(name):
    """Squares are finite up to norms of 1e154; a larger row is not treated as zero."""
    (x, w), y = leaves(1.0, 1.0, torch.float64)
    expected = FLOAT64[name](x, w, y)
    torch.testing.assert_close(FLOAT64[name](x * 1e150, w * 1e150, y), expected)
    assert FLOAT64[name](x * 1e200, w * 1e200, y).isnan().all()


LOGITS = {
    "arcface": fm.ArcFaceLoss,
    "sphereface": fm.SphereFaceLoss,
    "modified softmax": fm.ModifiedSoftmaxLoss,
    "sub-center": fm.SubCenterArcFaceLoss,
}


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e20),
        (torch.float32, 1e30),
        (torch.float32, 1e-11),
        (torch.bfloat16, 1e30),
        (torch.float64, 1e100),
    ],
    ids=str,
)
def test_logits_of_large_embeddings(name, dtype, size):
    """torch.nn.functional.normalize sums squares in the dtype of the rows."""
    torch.manual_seed(0)
    x = (torch.randn(N, D, dtype=torch.float64) * size).to(dtype)
    x[3] = 0
    loss_fn, upstream = LOGITS[name](C, D, dtype=torch.promote_types(dtype, torch.float32)), torch.randn(N, C)
    with torch.no_grad():
        loss_fn.weight[4] = 0
        if loss_fn.scale is not None:
            loss_fn.weight[5] *= 1e20
    exact = LOGITS[name](C, D, dtype=torch.float64)
    exact.load_state_dict(loss_fn.state_dict())
    actual, expected = x.requires_grad_(), x.detach().double().requires_grad_()
    logits, right = loss_fn.logits(actual), exact.logits(expected)
    unit = F.normalize(expected, eps=1e-300)
    cosine = (unit @ F.normalize(exact.weight).t()).unflatten(1, (C, -1)).amax(2)
    scale = expected.norm(dim=1, keepdim=True) if exact.scale is None else exact.scale
    torch.testing.assert_close(right, cosine * scale)
    assert logits.dtype == torch.promote_types(dtype, torch.float32) and not logits[3].any()
    assert error(logits, right) < 1e-6
    (logits * upstream).sum().backward()
    (right * upstream).sum().backward()
    assert error(actual.grad * size, expected.grad * size) < 2 * torch.finfo(dtype).eps + 1e-6
    lengths = exact.weight.detach().norm(dim=1, keepdim=True)
    assert error(loss_fn.weight.grad * lengths, exact.weight.grad * lengths) < 1e-5


@pytest.mark.parametrize("size", [1e-11, 1.0, 1e30])
def test_running_mean_of_target_cosines(size):
    """CurricularFace's t: it uses the loss's cosines of small rows, not those of torch.nn.functional.normalize."""
    (x, w), y = leaves(1.0, 1.0, torch.float64)
    loss_fn = fm.CurricularFaceLoss(C, D, momentum=1.0, dtype=torch.float64)
    with torch.no_grad():
        loss_fn.weight.copy_(w * size)
        x[3] = 0
    loss_fn(x * size, y)
    torch.testing.assert_close(loss_fn.t, F.cosine_similarity(x, w[y]).mean().reshape(1).detach())
