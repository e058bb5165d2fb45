"""nearest_class, the exclusive term and separability against full C x C matrices."""

import pytest
import torch
from loss_inputs import planned_inputs, problem, relative_error, saved_classes

import fused_margin as fm
from fused_margin import reference
from fused_margin._ops.backends.portable import plan_chunks
from fused_margin.functional import exclusive_regularization, nearest_class, separability

SMALL = 1e-6  # workspace_mb: tiles of the smallest size


@pytest.mark.parametrize("workspace_mb", [256, 0.3, SMALL])
@pytest.mark.parametrize("shape", [(2, 4), (16, 3), (507, 33), (1031, 8), (640, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_against_the_full_matrix(shape, dtype, workspace_mb):
    w = torch.randn(shape, dtype=dtype)
    cosine, index = nearest_class(w, workspace_mb=workspace_mb)
    expected, _ = reference.nearest_class(w.double())
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(cosine.double(), expected, rtol=0, atol=tolerance)
    unit = reference.normalize(w.double())
    assert (index != torch.arange(len(w))).all()
    torch.testing.assert_close((unit * unit[index]).sum(1), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("workspace_mb", [256, SMALL])
def test_ties_go_to_the_lowest_index(workspace_mb):
    w = torch.eye(3, dtype=torch.float32)[torch.arange(500) % 3]  # 3 distinct directions, each repeated many times
    cosine, index = nearest_class(w, workspace_mb=workspace_mb)
    assert (cosine == 1).all()
    expected = torch.where(torch.arange(500) < 3, torch.arange(500) + 3, torch.arange(500) % 3)
    assert torch.equal(index, expected)


@pytest.mark.parametrize("workspace_mb", [256, SMALL])
def test_gradient(workspace_mb):
    w = torch.randn(300, 12, dtype=torch.float64)
    upstream = torch.randn(300, dtype=torch.float64)
    gradients = []
    for function in (
        lambda v: nearest_class(v, workspace_mb=workspace_mb).cosine,
        lambda v: reference.nearest_class(v)[0],
    ):
        leaf = w.clone().requires_grad_()
        function(leaf).backward(upstream)
        gradients.append(leaf.grad)
    assert relative_error(*gradients) < 1e-12


def test_exclusive_regularization():
    x, w, y = problem(8, 200, 16)
    expected = reference.exclusive_regularization(w)
    torch.testing.assert_close(exclusive_regularization(w), expected)
    torch.testing.assert_close(fm.ExclusiveRegularizer()(w), expected)
    torch.testing.assert_close(exclusive_regularization(w.t().contiguous().t()), expected)
    with_term = fm.functional.margin_cross_entropy(x, w, y, exclusive_weight=2.0)
    torch.testing.assert_close(with_term - fm.functional.margin_cross_entropy(x, w, y), 2 * expected)
    half = w.to(torch.bfloat16)
    torch.testing.assert_close(
        exclusive_regularization(half), reference.exclusive_regularization(half.double()).float()
    )


def test_separability_of_random_directions():
    """10,575 uniform directions in 512 dimensions: mean 0.170, std 0.0134."""
    mean, std = separability(torch.randn(10_575, 512))
    assert abs(mean - 0.170) < 0.002
    assert abs(std - 0.0134) < 0.001
    assert isinstance(mean, float) and isinstance(std, float)


@pytest.mark.parametrize("samples", [0, 256])
@pytest.mark.parametrize("classes", [500, 10_575, 1_000_000])
@pytest.mark.parametrize("workspace_mb", [1, 8, 256])
def test_tiles_stay_within_the_workspace(samples, classes, workspace_mb):
    weight = torch.empty(classes, 512, device="meta")
    workspace = workspace_mb << 20
    plan = plan_chunks(planned_inputs(samples, weight, nearest=True, workspace_bytes=workspace), save_for_backward=True)
    scratch = plan.chunk * plan.chunk + samples * (
        saved_classes(plan) + (plan.chunk if plan.saved < plan.chunks else 0)
    )
    assert 4 * scratch <= workspace
    sizes = [end - begin for begin, end in map(plan.bounds, range(plan.chunks))]
    multiplied = sum(size * sum(sizes[: k + 1]) for k, size in enumerate(sizes))
    if classes > 10_000:
        assert multiplied < 0.56 * classes**2  # close to half of the full matrix


def test_zero_and_nan_rows():
    w = torch.randn(50, 8)
    w[7] = 0
    w[9, 3] = float("nan")
    cosine, index = nearest_class(w)
    assert cosine[7] == 0 and cosine[9].isnan()
    others = torch.arange(50) != 9
    assert cosine[others].isfinite().all() and (index[others] != 9).all()
    w = torch.randn(6, 4, dtype=torch.float64)
    w[2] = 0
    leaf = w.requires_grad_()
    exclusive_regularization(leaf).backward()
    assert leaf.grad.isfinite().all() and not leaf.grad[2].any()


NO_DERIVATIVE = {
    "several": lambda w: nearest_class(w, k=2),
    "inner products": lambda w: nearest_class(w, metric="inner_product"),
    "queries": lambda w: nearest_class(w, torch.eye(8)),
    "references": lambda w: nearest_class(torch.eye(8), w),
}


@pytest.mark.parametrize("name", NO_DERIVATIVE)
def test_torch_func_rejects_results_without_derivative(name):
    """The derivative would silently be 0. Rows selected by the index do have one."""
    w, function = torch.randn(20, 8), NO_DERIVATIVE[name]
    for transform in (
        lambda f: torch.func.grad(lambda v: f(v).cosine.sum())(w),
        lambda f: torch.func.jvp(lambda v: f(v).cosine, (w,), (w,)),
        lambda f: torch.func.vjp(lambda v: f(v).cosine, w),
    ):
        with pytest.raises(
            RuntimeError, match="nearest_class: with a reference, k > 1 or inner products .* no derivative"
        ):
            transform(function)

    def sum_of_rows(v):
        return (v * function(v.detach()).index.sum()).sum()

    expected = torch.full_like(w, function(w).index.sum().item())
    assert torch.equal(torch.func.grad(sum_of_rows)(w), expected)
    assert not function(w.clone().requires_grad_()).cosine.requires_grad
