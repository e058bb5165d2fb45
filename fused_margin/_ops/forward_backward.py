"""One sweep over the classes, chunk by chunk, on any device: sums, target cosines, nearest classes, and its backward.

What stands around the products is here; how a chunk's products and exponentials are made is portable.py's or
tensor_cores.py's. Nothing of size N x C or C x C is ever whole, but for what workspace_mb has room to keep.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fused_margin._ops import bad_labels
from fused_margin._ops.backends import portable, select, tensor_cores
from fused_margin._ops.inputs import Gradients, Problem, Sweep, SweepGradients
from fused_margin._ops.kernels import advise_huge_pages, kernels, on_device
from fused_margin._ops.nearest.search import find_nearest
from fused_margin._ops.plan import Plan, gradient_in_place, is_searched

LN2 = portable.LN2


def products_module(problem: Problem):
    return portable if problem.products == select.PORTABLE else tensor_cores


def check_scale(scale: Tensor | None) -> None:
    """On CPU only: looking at the values of a CUDA tensor would wait for it."""
    if scale is not None and scale.device.type == "cpu" and not bool((scale >= 0).all()):
        raise ValueError(f"scale: expected non-negative numbers, got {scale[~(scale >= 0)][0].item()}")


def empty_sweep(problem: Problem, uniform: bool, keep: bool) -> tuple[Plan, Sweep]:
    """The plan, and all of the sweep's tensors, unwritten; what was not asked for has no elements."""
    module, weight = products_module(problem), problem.weight
    plan = module.plan_of(problem, keep)
    samples, classes, size, compute = problem.samples, problem.classes, problem.size, problem.compute
    kept, kept_dtype = module.kept_elements(problem, plan)
    statistic = torch.float64
    return plan, Sweep(
        largest_logit=weight.new_empty(samples, dtype=statistic),
        relative_logsumexp=weight.new_empty(samples, dtype=statistic),
        target_cosine=weight.new_empty(samples, dtype=statistic),
        uniform_cosine=weight.new_empty(samples if uniform else 0, dtype=statistic),
        nearest_cosine=weight.new_empty(classes if problem.nearest else 0, dtype=compute),
        nearest_index=weight.new_empty(classes if problem.nearest else 0, dtype=torch.int64),
        target_row=weight.new_empty(samples if problem.sub_centers > 1 else 0, dtype=torch.int64),
        normalized_embeddings=weight.new_empty(samples, size, dtype=compute),
        embedding_inverse_norm=weight.new_empty(samples, dtype=compute),
        weight_inverse_norm=weight.new_empty(classes, dtype=compute),
        exponent=weight.new_empty(1 if module.has_shared_exponent(problem) else plan.chunks, samples, dtype=statistic),
        uniform_weight=weight.new_empty(size if uniform else 0, dtype=compute),
        kept=weight.new_empty(kept, dtype=kept_dtype),
    )


def forward(
    problem: Problem, uniform: bool, ignore_index: int, keep: bool, arrive: Callable[[], None] | None = None
) -> Sweep:
    """`arrive` waits for embeddings that are still being sent; what needs only the weights is done before."""
    weight, device = problem.weight, problem.weight.device
    samples, classes, size = problem.samples, problem.classes, problem.size
    plan, result = empty_sweep(problem, uniform, keep)
    check_scale(problem.scale)
    with on_device(device), torch.autocast(device.type, enabled=False):
        run = kernels(device)
        if problem.nearest:
            fill_nearest(run, problem, result)
        norms_known = arrive is not None and problem.products == select.PORTABLE and not problem.inner_product
        if norms_known:
            portable.find_norms(run, problem, result)
        if arrive is not None:
            arrive()
        if problem.embeddings is not None:
            reported = bad_labels.flag(device)
            run.target_cosine(
                compute_like=result.normalized_embeddings, embeddings=problem.embeddings, weight=weight,
                labels=problem.labels, cosine=result.target_cosine,
                row=result.target_row if problem.sub_centers > 1 else None, bad_label=reported.data_ptr(),
                samples=samples, classes=classes, size=size, ignore_index=ignore_index,
                sub_centers=problem.sub_centers, inner_product=problem.inner_product,
            )  # fmt: skip
            bad_labels.check(reported, device, classes // problem.sub_centers)
            if problem.inner_product:
                result.normalized_embeddings.copy_(problem.embeddings)
                result.embedding_inverse_norm.fill_(1.0)
            else:
                run.row_normalize(
                    rows=problem.embeddings, normalized=result.normalized_embeddings,
                    inverse_norm=result.embedding_inverse_norm, count=samples, size=size,
                )  # fmt: skip
        products = products_module(problem).Products(run, problem, plan, result)
        products.norms_known = norms_known
        if uniform:
            result.uniform_weight.zero_()
        for k in range(plan.chunks):
            products.add(k)
            if uniform:
                begin, end = plan.bounds(k)
                per_row = result.weight_inverse_norm[begin:end]
                if problem.class_weight is not None:
                    per_row = per_row * problem.class_weight[begin:end].to(problem.compute)
                result.uniform_weight.addmv_(weight[begin:end].to(problem.compute).t(), per_row)
        products.finish()
        if uniform and samples:
            torch.mv(result.normalized_embeddings.double(), result.uniform_weight.double(), out=result.uniform_cosine)
    return result


def fill_nearest(run, problem: Problem, result: Sweep) -> None:
    """The nearest classes, where they are known or searched for before the sweep."""
    if problem.known_index is not None:
        cosine, index = problem.known_cosine, problem.known_index
    elif is_searched(problem):
        cosine, index = find_nearest(run, problem.weight, None, 1, False, problem.workspace_bytes).answers(
            problem.compute
        )
        cosine, index = cosine.squeeze(1), index.squeeze(1)
    else:
        return
    result.nearest_cosine.copy_(cosine)
    result.nearest_index.copy_(index)


def backward(
    problem: Problem, upstream: SweepGradients, saved: Sweep, need_embeddings: bool, need_weight: bool, need_bias: bool
) -> Gradients:
    compute, weight, device = problem.compute, problem.weight, problem.weight.device
    samples, classes, size, x_hat = problem.samples, problem.classes, problem.size, saved.normalized_embeddings
    module = products_module(problem)
    plan = module.plan_of(problem, saved.kept.numel() > 0)
    d_weight = weight.new_empty(0)
    d_bias = x_hat.new_empty(classes if need_bias else 0)
    d_scale = saved.target_cosine.new_empty(samples if problem.scale is not None else 0)
    # of the embeddings, before the Jacobian; the scale's gradient is read off it too
    need_dense = need_embeddings or problem.scale is not None
    with on_device(device), torch.autocast(device.type, enabled=False):
        run = kernels(device)
        dense = problem.embeddings is not None and upstream.negative_logsumexp is not None
        target_gradient = (
            saved.target_cosine.new_zeros(samples)
            if upstream.target_cosine is None
            else upstream.target_cosine.contiguous()
        )
        if dense:
            products = module.Products(run, problem, plan, saved)
            products.prepare(row_scales(upstream.negative_logsumexp, saved), need_dense, need_weight)
        else:
            d_bias.zero_()
        if need_weight:
            d_weight = torch.empty_like(weight)
            advise_huge_pages(d_weight)
            sparse = sparse_terms(problem, upstream, saved, target_gradient)
            in_place = gradient_in_place(problem)
            buffer = None if in_place else x_hat.new_empty(plan.chunk, size)
        for k in range(plan.chunks if dense or need_weight else 0):
            begin, end = plan.bounds(k)
            gradient = None
            if need_weight:
                gradient = d_weight[begin:end] if in_place else buffer[: end - begin]
            if dense:
                products.accumulate(k, gradient, d_bias[begin:end] if need_bias else None)
            elif need_weight:
                gradient.zero_()
            if need_weight:
                run.project_weight_gradient(
                    gradient=gradient, weight=weight, inverse_norm=saved.weight_inverse_norm,
                    dense_scale=products.dense_scale if dense else None, **sparse, samples=samples, classes=classes,
                    size=size, class_begin=begin, chunk=end - begin, inner_product=problem.inner_product,
                )  # fmt: skip
                if not in_place:
                    d_weight[begin:end].copy_(gradient)
        d_embeddings = x_hat.new_empty(0)
        if need_dense:
            d_embeddings = products.embedding_gradient() if dense else torch.zeros_like(x_hat)
            uniform = upstream.uniform_cosine is not None
            run.project_embedding_gradient(
                gradient=d_embeddings, normalized_embeddings=x_hat, inverse_norm=saved.embedding_inverse_norm,
                weight=weight, weight_inverse_norm=saved.weight_inverse_norm, labels=target_rows(problem, saved),
                row_scale=products.embedding_scale if dense else None, scale=problem.scales,
                target_gradient=target_gradient,
                uniform_gradient=upstream.uniform_cosine.contiguous() if uniform else None,
                uniform_weight=saved.uniform_weight if uniform else None,
                scale_gradient=d_scale if problem.scale is not None else None, samples=samples, classes=classes,
                size=size, inner_product=problem.inner_product,
            )  # fmt: skip
    if not need_embeddings:
        d_embeddings = x_hat.new_empty(0)
    elif problem.embeddings.dtype != compute:
        d_embeddings = d_embeddings.to(problem.embeddings.dtype)
    if need_bias:
        d_bias = d_bias.to(problem.bias.dtype)
    return Gradients(d_embeddings, d_weight, d_bias, d_scale)


def target_rows(problem: Problem, saved: Sweep) -> Tensor | None:
    """The row of weight (N,) that is every sample's target."""
    return saved.target_row if problem.sub_centers > 1 else problem.labels


def row_scales(gradient: Tensor, saved: Sweep) -> Tensor:
    """What turns a chunk's exponentials into dL / d logit: gradient * 2^exponent / exp(negative_logsumexp)."""
    scales = gradient * torch.exp(saved.exponent * LN2 - saved.largest_logit - saved.relative_logsumexp)
    # a row that is ignored, or has no other class, has no gradient; its exponentials may be anything
    return scales.masked_fill_((gradient == 0) | (saved.relative_logsumexp == -math.inf), 0.0)


def sparse_terms(
    problem: Problem, upstream: SweepGradients, saved: Sweep, target_gradient: Tensor
) -> dict[str, Tensor | None]:
    """The weight gradient's terms that touch few rows, as project_weight_gradient takes them."""
    terms = dict.fromkeys(
        ("normalized_embeddings", "sorted_labels", "label_order", "target_gradient", "uniform_direction", "class_weight",
         "nearest", "sorted_nearest", "nearest_order", "nearest_gradient")
    )  # fmt: skip
    x_hat = saved.normalized_embeddings
    if problem.labels is not None:
        terms["sorted_labels"], terms["label_order"] = torch.sort(target_rows(problem, saved), stable=True)
        terms["normalized_embeddings"], terms["target_gradient"] = x_hat, target_gradient
    if upstream.uniform_cosine is not None:
        terms["uniform_direction"] = torch.mv(x_hat.t(), upstream.uniform_cosine.to(x_hat.dtype))
        terms["class_weight"] = problem.class_weight
    if problem.nearest and upstream.nearest_cosine is not None:
        terms["nearest"] = saved.nearest_index
        terms["sorted_nearest"], terms["nearest_order"] = torch.sort(saved.nearest_index, stable=True)
        terms["nearest_gradient"] = upstream.nearest_cosine.to(x_hat.dtype).contiguous()
    return terms
