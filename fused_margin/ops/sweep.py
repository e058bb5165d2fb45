"""One sweep over the classes, chunk by chunk, on any device: sums, target cosines, nearest classes, and its backward.

Products are torch.mm into scratch; all that stands around them are the kernels of csrc/kernels.h, whose
comments define every array. Nothing of size N x C or C x C is ever whole, but for the exponentials that
workspace_mb has room to keep.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_margin.ops import bad_labels
from fused_margin.ops.backend import advise_huge_pages, kernels, on_device
from fused_margin.ops.plan import Plan, make_plan

LN2 = math.log(2.0)


class Sweep(NamedTuple):
    """What a sweep finds. The first five are its results, the others what its backward needs."""

    negative_logsumexp: Tensor  # (N,) float64, over the classes that are not the label's
    target_cosine: Tensor  # (N,) float64
    uniform_cosine: Tensor  # (N,) float64, sum_j class_weight_j cos_ij, or (0,)
    nearest_cosine: Tensor  # (C,) or (0,)
    nearest_index: Tensor  # (C,) int64 or (0,)
    normalized_embeddings: Tensor  # (N, D)
    embedding_inverse_norm: Tensor  # (N,)
    weight_inverse_norm: Tensor  # (C,)
    exponent: Tensor  # (chunks, N) float64, or (1, N) where one exponent serves all
    uniform_weight: Tensor  # (D,), sum_j class_weight_j w_hat_j, or (0,)
    kept: Tensor  # (N * kept classes,), chunk after chunk


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def fixed_exponent(scale: float | None, classes: int) -> float | None:
    """The power of two that all exponentials can share, or None where every (row, chunk) needs its own.

    With |cos| <= 1, exp(scale * cos - shift) stays within [1e-36, e^58] and its sum over the classes
    below float32's largest; e^58 leaves room for the division by the norm of a very short class weight.
    """
    if scale is None:
        return None
    shift = max(math.log(max(classes, 1)) / 2, scale - 58.0)
    return math.ceil(shift / LN2) if scale + shift <= 82.0 else None


def check_scale(scale: Tensor | None) -> None:
    """On CPU only: looking at the values of a CUDA tensor would wait for it."""
    if scale is not None and scale.device.type == "cpu" and not bool((scale >= 0).all()):
        raise ValueError(f"scale: expected non-negative numbers, got {scale[~(scale >= 0)][0].item()}")


class ClassRows:
    """The class weights as operands of matrix products: the caller's memory, or chunks of it converted."""

    def __init__(self, weight: Tensor, compute: torch.dtype):
        self.weight, self.compute = weight, compute

    def __call__(self, begin: int, end: int) -> Tensor:
        return self.weight[begin:end].to(self.compute)


def forward(
    embeddings: Tensor | None,
    weight: Tensor,
    labels: Tensor | None,
    scale: Tensor | None,
    scale_value: float,
    class_weight: Tensor | None,
    uniform: bool,
    nearest: bool,
    ignore_index: int,
    workspace_bytes: int,
    keep: bool,
) -> Sweep:
    """embeddings (N, D), weight (C, D), labels (N,) int64, scale (N,) float64 or None for scale_value."""
    compute = compute_dtype(embeddings, weight)
    (classes, size), device = weight.shape, weight.device
    samples = 0 if embeddings is None else embeddings.shape[0]
    plan = make_plan(samples, weight, compute, nearest=nearest, keep=keep, workspace_bytes=workspace_bytes)
    shared = fixed_exponent(scale_value if scale is None else None, classes)
    result = empty_sweep(samples, plan, weight, compute, shared is not None, uniform, nearest)
    check_scale(scale)
    with on_device(device), torch.autocast(device.type, enabled=False):
        run = kernels(device)
        rows = ClassRows(weight, compute)
        if embeddings is not None:
            reported = bad_labels.flag(device)
            run.target_cosine(
                compute_like=result.normalized_embeddings, embeddings=embeddings, weight=weight, labels=labels,
                cosine=result.target_cosine, bad_label=reported.data_ptr(), samples=samples, classes=classes, size=size,
                ignore_index=ignore_index,
            )  # fmt: skip
            bad_labels.check(reported, device, classes)
            run.row_normalize(
                rows=embeddings, normalized=result.normalized_embeddings, inverse_norm=result.embedding_inverse_norm,
                count=samples, size=size,
            )  # fmt: skip
        if uniform:
            result.uniform_weight.zero_()
        if nearest:
            result.nearest_cosine.fill_(-4.0)  # below every cosine; a row of NaN finds no class
            result.nearest_index.zero_()
            result.nearest_index[:1] = 1
        advise_huge_pages(result.kept)
        scratch = Scratch(samples, plan, result.kept, run.class_major)
        sums = result.target_cosine.new_empty(plan.chunks, samples)
        exponents = result.exponent if shared is None else torch.empty_like(sums)
        for k in range(plan.chunks):
            begin, end = plan.bounds(k)
            operand, inverse_norm = rows(begin, end), result.weight_inverse_norm[begin:end]
            run.row_normalize(rows=operand, normalized=None, inverse_norm=inverse_norm, count=end - begin, size=size)
            if embeddings is not None:
                products = scratch(k)
                torch.mm(result.normalized_embeddings, operand.t(), out=products)
                run.exponent_sum(
                    products=products, inverse_norm=inverse_norm, labels=labels,
                    scale=scale_value if scale is None else scale, fixed_exponent=shared, exponent=exponents[k],
                    sum=sums[k], samples=samples, chunk=end - begin, class_begin=begin,
                )  # fmt: skip
            if uniform:
                per_row = inverse_norm if class_weight is None else inverse_norm * class_weight[begin:end].to(compute)
                result.uniform_weight.addmv_(operand.t(), per_row)
            if nearest:
                update_nearest(run, rows, plan, operand, begin, result)
        if embeddings is not None:
            torch.logsumexp(sums.log_().add_(exponents, alpha=LN2), dim=0, out=result.negative_logsumexp)
            if shared is not None:
                result.exponent.fill_(shared)
            if uniform:
                torch.mv(
                    result.normalized_embeddings.double(), result.uniform_weight.double(), out=result.uniform_cosine
                )
        if nearest:
            result.nearest_cosine.masked_fill_(result.nearest_cosine < -2.0, math.nan).clamp_(-1.0, 1.0)
    return result


def update_nearest(run, rows: ClassRows, plan: Plan, columns: Tensor, column_begin: int, result: Sweep) -> None:
    """Compares a chunk of classes with all classes up to its end. Ascending order gives ties to the lowest index."""
    column_count = columns.shape[0]
    buffer = columns.new_empty(plan.chunk * column_count)
    for k in range(column_begin // plan.chunk + 1):
        begin, end = plan.bounds(k)
        products = buffer[: (end - begin) * column_count].view(end - begin, column_count)
        torch.mm(columns if begin == column_begin else rows(begin, end), columns.t(), out=products)
        run.nearest_tile(
            products=products, inverse_norm=result.weight_inverse_norm, cosine=result.nearest_cosine,
            index=result.nearest_index, rows=end - begin, columns=column_count, row_begin=begin,
            column_begin=column_begin,
        )  # fmt: skip


class Scratch:
    """Where a chunk's products (N, classes) go: their kept place, or a buffer that the next chunk overwrites."""

    def __init__(self, samples: int, plan: Plan, kept: Tensor, class_major: bool):
        self.samples, self.plan, self.kept, self.class_major = samples, plan, kept, class_major
        self.buffer = kept.new_empty(samples * plan.chunk if plan.kept < plan.chunks else 0)
        advise_huge_pages(self.buffer)

    def __call__(self, k: int) -> Tensor:
        begin, end = self.plan.bounds(k)
        if k < self.plan.kept:
            flat = self.kept[self.samples * begin : self.samples * end]
        else:
            flat = self.buffer[: self.samples * (end - begin)]
        return flat.view(end - begin, self.samples).t() if self.class_major else flat.view(self.samples, end - begin)


def empty_sweep(
    samples: int, plan: Plan, weight: Tensor, compute: torch.dtype, shared: bool, uniform: bool, nearest: bool
) -> Sweep:
    """All of a sweep's tensors, unwritten; what was not asked for has no elements."""
    (classes, size), statistic = weight.shape, torch.float64
    return Sweep(
        negative_logsumexp=weight.new_empty(samples, dtype=statistic),
        target_cosine=weight.new_empty(samples, dtype=statistic),
        uniform_cosine=weight.new_empty(samples if uniform else 0, dtype=statistic),
        nearest_cosine=weight.new_empty(classes if nearest else 0, dtype=compute),
        nearest_index=weight.new_empty(classes if nearest else 0, dtype=torch.int64),
        normalized_embeddings=weight.new_empty(samples, size, dtype=compute),
        embedding_inverse_norm=weight.new_empty(samples, dtype=compute),
        weight_inverse_norm=weight.new_empty(classes, dtype=compute),
        exponent=weight.new_empty(1 if shared else plan.chunks, samples, dtype=statistic),
        uniform_weight=weight.new_empty(size if uniform else 0, dtype=compute),
        kept=weight.new_empty(samples * plan.kept_classes, dtype=compute),
    )


class SweepGradients(NamedTuple):
    """Upstream gradients of a sweep's results; None where nothing depends on them."""

    negative_logsumexp: Tensor | None
    target_cosine: Tensor | None
    uniform_cosine: Tensor | None
    nearest_cosine: Tensor | None


def backward(
    upstream: SweepGradients,
    embeddings: Tensor | None,
    weight: Tensor,
    labels: Tensor | None,
    scale: Tensor | None,
    scale_value: float,
    class_weight: Tensor | None,
    saved: Sweep,
    nearest: bool,
    workspace_bytes: int,
    need_embeddings: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of embeddings (N, D), weight (C, D) and scale (N,); an empty tensor for what is not needed."""
    compute, device = saved.normalized_embeddings.dtype, weight.device
    (classes, size), x_hat = weight.shape, saved.normalized_embeddings
    samples = 0 if embeddings is None else embeddings.shape[0]
    plan = make_plan(
        samples, weight, compute, nearest=nearest, keep=saved.kept.numel() > 0, workspace_bytes=workspace_bytes
    )
    d_weight = weight.new_empty(0)
    d_scale = saved.target_cosine.new_empty(samples if scale is not None else 0)
    # of the embeddings, before the Jacobian; the scale's gradient is read off it too
    need_dense = need_embeddings or scale is not None
    d_embeddings = x_hat.new_zeros(samples if need_dense else 0, size)
    with on_device(device), torch.autocast(device.type, enabled=False):
        run = kernels(device)
        rows = ClassRows(weight, compute)
        dense = embeddings is not None and upstream.negative_logsumexp is not None
        target_gradient = (
            saved.target_cosine.new_zeros(samples)
            if upstream.target_cosine is None
            else upstream.target_cosine.contiguous()
        )
        if dense:
            row_scale = row_scales(upstream.negative_logsumexp, saved)  # (chunks or 1, N)
            shared = row_scale.shape[0] == 1
            to_classes = row_scale * (scale_value if scale is None else scale)
            scratch, left = Scratch(samples, plan, saved.kept, run.class_major), torch.empty_like(x_hat)
            partial = None if shared else torch.empty_like(d_embeddings)
            discard = torch.empty_like(saved.target_cosine)
        if need_weight:
            d_weight = torch.empty_like(weight)
            advise_huge_pages(d_weight)
            sparse = sparse_terms(upstream, labels, class_weight, saved, target_gradient, nearest)
            in_place = d_weight.dtype == compute and d_weight.is_contiguous()
            buffer = None if in_place else x_hat.new_empty(plan.chunk, size)
        for k in range(plan.chunks if dense or need_weight else 0):
            begin, end = plan.bounds(k)
            operand = rows(begin, end)
            gradient = None
            if need_weight:
                gradient = d_weight[begin:end] if in_place else buffer[: end - begin]
            if dense:
                exponentials = scratch(k)
                if k >= plan.kept:
                    torch.mm(x_hat, operand.t(), out=exponentials)
                    run.exponent_sum(
                        products=exponentials, inverse_norm=saved.weight_inverse_norm[begin:end], labels=labels,
                        scale=scale_value if scale is None else scale,
                        fixed_exponent=fixed_exponent(scale_value, classes) if shared and scale is None else None,
                        exponent=discard, sum=torch.empty_like(discard), samples=samples, chunk=end - begin,
                        class_begin=begin,
                    )  # fmt: skip
                if need_dense and shared:
                    d_embeddings.addmm_(exponentials, operand)
                elif need_dense:
                    torch.mm(exponentials, operand, out=partial)
                    d_embeddings.addcmul_(partial, row_scale[k].to(compute).unsqueeze(1))
                if need_weight:
                    if k == 0 or not shared:
                        torch.mul(x_hat, to_classes[0 if shared else k].to(compute).unsqueeze(1), out=left)
                    torch.mm(exponentials.t(), left, out=gradient)
            elif need_weight:
                gradient.zero_()
            if need_weight:
                run.project_weight_gradient(
                    gradient=gradient, weight=weight, inverse_norm=saved.weight_inverse_norm, **sparse,
                    samples=samples, classes=classes, size=size, class_begin=begin, chunk=end - begin,
                )  # fmt: skip
                if not in_place:
                    d_weight[begin:end].copy_(gradient)
        if need_dense:
            uniform = upstream.uniform_cosine is not None
            run.project_embedding_gradient(
                gradient=d_embeddings, normalized_embeddings=x_hat, inverse_norm=saved.embedding_inverse_norm,
                weight=weight, weight_inverse_norm=saved.weight_inverse_norm, labels=labels,
                row_scale=row_scale[0] if dense and shared else None, scale=scale_value if scale is None else scale,
                target_gradient=target_gradient,
                uniform_gradient=upstream.uniform_cosine.contiguous() if uniform else None,
                uniform_weight=saved.uniform_weight if uniform else None,
                scale_gradient=d_scale if scale is not None else None, samples=samples, classes=classes, size=size,
            )  # fmt: skip
    if not need_embeddings:
        d_embeddings = d_embeddings.new_empty(0)
    elif embeddings.dtype != compute:
        d_embeddings = d_embeddings.to(embeddings.dtype)
    return d_embeddings, d_weight, d_scale


def row_scales(gradient: Tensor, saved: Sweep) -> Tensor:
    """What turns a chunk's exponentials into dL / d logit: gradient * 2^exponent / exp(negative_logsumexp)."""
    scales = gradient * torch.exp(saved.exponent * LN2 - saved.negative_logsumexp)
    # a row that is ignored, or has no other class, has no gradient; its exponentials may be anything
    return scales.masked_fill_((gradient == 0) | (saved.negative_logsumexp == -math.inf), 0.0)


def sparse_terms(
    upstream: SweepGradients,
    labels: Tensor | None,
    class_weight: Tensor | None,
    saved: Sweep,
    target_gradient: Tensor,
    nearest: bool,
) -> dict[str, Tensor | None]:
    """The weight gradient's terms that touch few rows, as project_weight_gradient takes them."""
    terms = dict.fromkeys(
        ("normalized_embeddings", "sorted_labels", "label_order", "target_gradient", "uniform_direction", "class_weight",
         "nearest", "sorted_nearest", "nearest_order", "nearest_gradient")
    )  # fmt: skip
    x_hat = saved.normalized_embeddings
    if labels is not None:
        terms["sorted_labels"], terms["label_order"] = torch.sort(labels, stable=True)
        terms["normalized_embeddings"], terms["target_gradient"] = x_hat, target_gradient
    if upstream.uniform_cosine is not None:
        terms["uniform_direction"] = torch.mv(x_hat.t(), upstream.uniform_cosine.to(x_hat.dtype))
        terms["class_weight"] = class_weight
    if nearest and upstream.nearest_cosine is not None:
        terms["nearest"] = saved.nearest_index
        terms["sorted_nearest"], terms["nearest_order"] = torch.sort(saved.nearest_index, stable=True)
        terms["nearest_gradient"] = upstream.nearest_cosine.to(x_hat.dtype).contiguous()
    return terms
