"""Forward and backward over chunks of classes, on any device, for one rank or several.

A backend (portable.py or tensor_cores.py) computes the logits of a chunk and their exponentials; this file has the rest.
No matrix of size N x C or C x C is allocated, except the saved chunks that fit in workspace_mb. If classes are divided
among ranks, or drawn, divided.py gathers the samples before the chunks and combines the results of the ranks after them.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_margin import _checks
from fused_margin._ops import divided, targets
from fused_margin._ops.backends import portable, tensor_cores
from fused_margin._ops.backends.select import Kernels, advise_huge_pages, kernels_on
from fused_margin._ops.inputs import (
    PORTABLE,
    ChunkPlan,
    ForwardOutput,
    Gradients,
    LossInputs,
    OutputGradients,
    compute_dtype,
)
from fused_margin._ops.nearest import find_nearest_classes
from fused_margin._ops.nearest.gradient import remote_gradient
from fused_margin._ops.row_update import NO_COMPLETION, RowStepper, RowUpdate, parts, rows_per_part

LN2 = portable.LN2
BACKENDS: dict[str, ModuleType] = {PORTABLE: portable}  # all other names are families of tensor-core kernels


def allocate_output(inputs: LossInputs, uniform: bool, save_for_backward: bool) -> tuple[ChunkPlan, ForwardOutput]:
    """The plan, and uninitialised tensors for the output of one rank."""
    plan = BACKENDS.get(inputs.backend, tensor_cores).plan_chunks(inputs, save_for_backward)
    (samples, classes, size), weight = inputs.shape, inputs.weight
    compute = compute_dtype(inputs.embeddings, weight)
    nearest = classes if inputs.nearest else 0
    new_float64, new_int64 = (weight.new_empty(0, dtype=t).new_empty for t in (torch.float64, torch.int64))
    return plan, ForwardOutput(
        largest_logit=new_float64(samples),
        relative_logsumexp=new_float64(samples),
        target_cosine=new_float64(samples),
        uniform_cosine=new_float64(samples if uniform else 0),
        nearest_cosine=weight.new_empty(nearest, dtype=compute),
        nearest_index=new_int64(nearest),
        target_bias=new_float64(samples if inputs.bias is not None else 0),
        target_length=new_float64(samples if inputs.need_length else 0),
        target_row=new_int64(samples if inputs.sub_centers > 1 else 0),
        normalized_embeddings=weight.new_empty(samples, size, dtype=compute),
        embedding_inverse_norm=weight.new_empty(samples, dtype=compute),
        weight_inverse_norm=weight.new_empty(classes, dtype=compute),
        exponent=new_float64(plan.exponents, samples),
        uniform_weight=weight.new_empty(size if uniform else 0, dtype=compute),
        saved_chunks=weight.new_empty(plan.saved_elements, dtype=plan.saved_dtype),
        drawn_rows=new_int64(0),
        gathered_labels=new_int64(0),
        gathered_scale=new_float64(0),
        gathered_threshold=new_float64(0),
        gathered_largest=new_float64(0),
        gathered_logsumexp=new_float64(0),
    )


def forward(inputs: LossInputs, uniform: bool, ignore_index: int, save_for_backward: bool) -> ForwardOutput:
    if inputs.sample_scale is not None:
        _checks.scale_values(inputs.sample_scale)
    with kernels_on(inputs.weight.device) as run:
        if not inputs.is_divided or inputs.embeddings is None:
            return forward_chunks(run, inputs, None, uniform, ignore_index, save_for_backward)
        gathered = divided.gather_samples(inputs, ignore_index, save_for_backward)
        output = forward_chunks(run, gathered.inputs, gathered, uniform, divided.OTHER_CLASS, save_for_backward)
        return divided.combine_outputs(inputs, gathered, output)


def forward_chunks(
    run: Kernels,
    inputs: LossInputs,
    gathered: divided.GatheredSamples | None,
    uniform: bool,
    ignore_index: int,
    save_for_backward: bool,
) -> ForwardOutput:
    """The forward over the classes of this rank. Work on weights overlaps with the gathering of embeddings."""
    weight, (samples, classes, size) = inputs.weight, inputs.shape
    plan, output = allocate_output(inputs, uniform, save_for_backward)
    if inputs.nearest and not inputs.uses_tiled_nearest:
        cosine, index = find_nearest_classes(run, inputs, forward_chunks)
        output.nearest_cosine.copy_(cosine)
        output.nearest_index.copy_(index)
    norms_known = gathered is not None and inputs.backend == PORTABLE and not inputs.inner_product
    if norms_known:
        portable.find_norms(run, inputs, output)
    if gathered is not None:
        gathered.wait_for_embeddings()
    if inputs.embeddings is not None:
        reported = _checks.bad_label_buffer(weight.device)
        run.target_cosine(
            compute_like=output.normalized_embeddings, embeddings=inputs.embeddings, weight=weight,
            labels=inputs.labels, cosine=output.target_cosine,
            row=output.target_row if inputs.sub_centers > 1 else None, bad_label=reported.data_ptr(), samples=samples,
            classes=classes, size=size, ignore_index=ignore_index, sub_centers=inputs.sub_centers,
            inner_product=inputs.inner_product,
        )  # fmt: skip
        _checks.bad_label(reported, weight.device, f"for {classes // inputs.sub_centers} classes")
        if inputs.inner_product:
            output.normalized_embeddings.copy_(inputs.embeddings)
            output.embedding_inverse_norm.fill_(1.0)
        else:
            run.row_normalize(
                rows=inputs.embeddings, normalized=output.normalized_embeddings,
                inverse_norm=output.embedding_inverse_norm, count=samples, size=size,
            )  # fmt: skip
        if inputs.bias is not None or inputs.need_length:
            targets.write(inputs, output)
    if gathered is not None:
        inputs = divided.without_raw_embeddings(inputs, output)
    backend = BACKENDS.get(inputs.backend, tensor_cores).ChunkBackend(run, inputs, plan, output, norms_known)
    if uniform:
        output.uniform_weight.zero_()
    for k in range(plan.chunks):
        backend.forward_chunk(k)
        if uniform:
            begin, end = plan.bounds(k)
            per_row = output.weight_inverse_norm[begin:end]
            if inputs.class_weight is not None:
                per_row = per_row * inputs.class_weight[begin:end].to(per_row.dtype)
            output.uniform_weight.addmv_(weight[begin:end].to(per_row.dtype).t(), per_row)
    backend.finish_forward()
    if uniform and samples:
        torch.mv(output.normalized_embeddings.double(), output.uniform_weight.double(), out=output.uniform_cosine)
    return output


def backward(
    inputs: LossInputs,
    upstream: OutputGradients,
    saved: ForwardOutput,
    need_embeddings: bool,
    need_weight: bool,
    need_bias: bool,
    update: RowUpdate | None = None,
) -> Gradients:
    """The gradients of a call.

    Args:
        update: steps the weight by its gradient, which then is not returned. Only drawn classes are stepped.
    """
    with kernels_on(inputs.weight.device) as run:
        local, local_upstream = inputs, upstream
        if inputs.is_divided and inputs.embeddings is not None:
            local, local_upstream, saved = divided.gather_upstream(inputs, upstream, saved)
        stepper = None
        if update is not None:
            stepper = RowStepper(
                run, inputs.weight, update, selected=saved.drawn_rows if saved.drawn_rows.numel() else None,
                first_row=divided.first_row(inputs), skip=~are_finite(local, local_upstream, saved),
            )  # fmt: skip
        gradients = backward_chunks(
            run, local, local_upstream, saved, need_embeddings, need_weight, need_bias, stepper
        )  # fmt: skip
        if not inputs.is_divided:
            return gradients
        return divided.scatter_gradients(inputs, saved, gradients, need_embeddings, need_weight, need_bias)


def are_finite(inputs: LossInputs, upstream: OutputGradients, saved: ForwardOutput) -> Tensor:
    """Whether the gradient of weight is finite, by the numbers that it is computed from; (1,) bool.

    Numbers close to the largest of the compute dtype count as not finite, because their products overflow.
    """
    limit = torch.finfo(saved.normalized_embeddings.dtype).max / 2**20
    finite = torch.ones(1, dtype=torch.bool, device=saved.largest_logit.device)
    for gradient in upstream:
        if gradient is not None:
            finite &= (gradient.abs() < limit).all()
    finite &= saved.normalized_embeddings.isfinite().all()  # of ignored samples too: zero times NaN is NaN
    if upstream.nearest_cosine is not None:
        finite &= saved.nearest_cosine.isfinite().all()
    if upstream.logsumexp is not None:
        logsumexp = saved.largest_logit + saved.relative_logsumexp  # -inf if there are no other classes
        finite &= ((upstream.logsumexp == 0) | (logsumexp < math.inf)).all()
        finite &= (upstream.logsumexp * inputs.scale).abs().sum() < limit
    return finite


def backward_chunks(
    run: Kernels,
    inputs: LossInputs,
    upstream: OutputGradients,
    saved: ForwardOutput,
    need_embeddings: bool,
    need_weight: bool,
    need_bias: bool,
    stepper: RowStepper | None = None,
) -> Gradients:
    """The backward over the classes of this rank: their gradients, and their part of the gradients of all samples.

    With a stepper, the rows of a part are stepped as soon as their gradient is known, and no gradient of weight is stored.
    """
    weight, x_hat = inputs.weight, saved.normalized_embeddings
    samples, classes, size = inputs.shape
    module = BACKENDS.get(inputs.backend, tensor_cores)
    plan = module.plan_chunks(inputs, saved.saved_chunks.numel() > 0)
    d_weight = weight.new_empty(0)
    d_bias = x_hat.new_empty(classes if need_bias else 0)
    d_scale = saved.target_cosine.new_empty(samples if inputs.sample_scale is not None else 0)
    # The gradient of the unit embeddings is needed for the gradient of the scale too.
    need_dense = need_embeddings or inputs.sample_scale is not None
    need_rows = need_weight or stepper is not None
    target_gradient = (
        saved.target_cosine.new_zeros(samples)
        if upstream.target_cosine is None
        else upstream.target_cosine.contiguous()
    )
    target = TargetWeights(weight, saved.weight_inverse_norm, target_rows(inputs, saved))
    if stepper is not None and need_dense:
        target = target.gathered()  # the rows are stepped before the embeddings' gradient is complete
    backend = None  # the chunks have a dense gradient only through the logsumexp
    if inputs.embeddings is not None and upstream.logsumexp is not None:
        backend = module.ChunkBackend(run, inputs, plan, saved)
        backend.prepare_backward(row_scales(upstream.logsumexp, saved), need_dense, need_rows)
    else:
        d_bias.zero_()
    completion: dict[str, Any] = {
        "weight": weight, "inverse_norm": saved.weight_inverse_norm,
        "dense_scale": None if backend is None else backend.dense_scale, "samples": samples, "classes": classes,
        "size": size, "inner_product": inputs.inner_product,
    }  # fmt: skip
    rows_of_part, added, buffer = plan.chunk, None, None
    if need_rows:
        completion |= sparse_terms(inputs, upstream, saved, target_gradient)
    if need_rows and (stepper is not None or weight.device.type == "cpu"):
        rows_of_part = min(plan.chunk, rows_per_part(weight, x_hat.dtype, inputs.workspace_bytes, inputs.sub_centers))
    if stepper is not None:
        buffer = x_hat.new_empty(min(rows_of_part, classes), size)
        added = step_exclusive(run, inputs, upstream, saved, stepper, completion, buffer)
    elif need_weight:
        d_weight = torch.empty_like(weight)
        advise_huge_pages(d_weight)
        buffer = None if inputs.gradient_in_place else x_hat.new_empty(rows_of_part, size)
    for k in range(plan.chunks if backend is not None or need_rows else 0):
        if backend is not None:
            backend.prepare_chunk(k)
        first, last = plan.bounds(k)
        for begin, end in parts(first, last, rows_of_part):
            gradient = None
            if need_rows:
                gradient = d_weight[begin:end] if buffer is None else buffer[: end - begin]
            if backend is not None:
                backend.backward_rows(begin, end, gradient, d_bias[begin:end] if need_bias else None)
            elif gradient is not None:
                gradient.zero_()
            if gradient is None:
                continue
            part = {"gradient": gradient, "class_begin": begin, "chunk": end - begin}
            if stepper is not None:
                stepper.step(completion | part, added)
                continue
            run.project_weight_gradient(**completion, **part)
            if buffer is not None:
                d_weight[begin:end].copy_(gradient)
    d_embeddings = x_hat.new_empty(0)
    if need_dense:
        d_embeddings = torch.zeros_like(x_hat) if backend is None else backend.embedding_gradient()
        uniform_gradient = None if upstream.uniform_cosine is None else upstream.uniform_cosine.contiguous()
        run.project_embedding_gradient(
            gradient=d_embeddings, normalized_embeddings=x_hat, inverse_norm=saved.embedding_inverse_norm,
            weight=target.weight, weight_inverse_norm=target.inverse_norm, labels=target.rows,
            row_scale=None if backend is None else backend.embedding_scale, scale=inputs.scale,
            target_gradient=target_gradient, uniform_gradient=uniform_gradient,
            uniform_weight=None if uniform_gradient is None else saved.uniform_weight,
            scale_gradient=d_scale if inputs.sample_scale is not None else None, samples=samples,
            classes=len(target.weight), size=size, inner_product=inputs.inner_product,
        )  # fmt: skip
    if not need_embeddings:
        d_embeddings = x_hat.new_empty(0)
    elif inputs.embeddings is not None and inputs.embeddings.dtype != x_hat.dtype:
        d_embeddings = d_embeddings.to(inputs.embeddings.dtype)
    if need_bias and inputs.bias is not None:
        d_bias = targets.add_bias_gradient(inputs, d_bias.to(inputs.bias.dtype), upstream.target_bias)
    if need_weight and inputs.group and upstream.nearest_cosine is not None:
        d_weight.add_(remote_gradient(inputs, saved.nearest_index, upstream.nearest_cosine).to(d_weight.dtype))
    return Gradients(d_embeddings, d_weight, d_bias, d_scale)


def step_exclusive(
    run: Kernels,
    inputs: LossInputs,
    upstream: OutputGradients,
    saved: ForwardOutput,
    stepper: RowStepper,
    completion: dict[str, Any],
    buffer: Tensor,
) -> Tensor | None:
    """Adds the gradient of the cosines to nearest classes before any row changes, because it reads other rows.

    It goes into the momentum or, if that is not possible, into a matrix (C, D), which is returned.
    """
    if upstream.nearest_cosine is None:
        return None
    if inputs.group:
        return remote_gradient(inputs, saved.nearest_index, upstream.nearest_cosine)
    names = ("nearest", "sorted_nearest", "nearest_order", "nearest_gradient")
    terms = {name: completion[name] for name in names}
    completion |= dict.fromkeys(names)
    alone = {**NO_COMPLETION, **{name: completion[name] for name in COMPLETED}, **terms}
    into_momentum = not stepper.update.needs_whole_gradient()
    added = None if into_momentum else torch.zeros_like(inputs.weight, dtype=buffer.dtype)
    for begin, end in parts(0, len(inputs.weight), len(buffer)):
        gradient = buffer[: end - begin].zero_() if added is None else added[begin:end]
        part = {**alone, "gradient": gradient, "class_begin": begin, "chunk": end - begin}
        if added is None:
            stepper.add_to_momentum(part)
        else:
            run.project_weight_gradient(**part)
    if added is None:
        stepper.after_momentum()
    return added


COMPLETED = ("weight", "inverse_norm", "classes", "size", "inner_product")


class TargetWeights(NamedTuple):
    """The class weights of the samples' targets."""

    weight: Tensor  # (C, D)
    inverse_norm: Tensor  # (C,)
    rows: Tensor | None  # (N,) int64; a row outside [0, C) is that of another rank, or of an ignored sample

    def gathered(self) -> TargetWeights:
        """The same with a copy of the targets' rows."""
        classes, rows = len(self.weight), self.rows
        if not classes or rows is None:
            return self
        known = (rows >= 0) & (rows < classes)
        selected = torch.where(known, rows, 0)
        position = torch.arange(len(rows), device=rows.device)
        return TargetWeights(
            self.weight[selected], self.inverse_norm[selected], torch.where(known, position, -1)
        )  # fmt: skip


def target_rows(inputs: LossInputs, saved: ForwardOutput) -> Tensor | None:
    """The row (N,) of weight of every sample's target."""
    return saved.target_row if inputs.sub_centers > 1 else inputs.labels


def row_scales(gradient: Tensor, saved: ForwardOutput) -> Tensor:
    """The factors from the exponentials of a chunk to dL / d logit: gradient * 2^exponent / exp(logsumexp)."""
    largest, relative = saved.largest_logit, saved.relative_logsumexp
    scales = gradient * torch.exp(saved.exponent * LN2 - largest - relative)
    # An ignored row, and a row without other classes, has no gradient, and its exponentials are undefined.
    return scales.masked_fill_((gradient == 0) | (relative == -math.inf), 0.0)


def sparse_terms(
    inputs: LossInputs, upstream: OutputGradients, saved: ForwardOutput, target_gradient: Tensor
) -> dict[str, Tensor | None]:
    """The sparse terms of the weight gradient, as arguments of project_weight_gradient."""
    terms: dict[str, Tensor | None] = dict.fromkeys(
        ("normalized_embeddings", "sorted_labels", "label_order", "target_gradient", "uniform_direction", "class_weight",
         "length_gradient", "nearest", "sorted_nearest", "nearest_order", "nearest_gradient")
    )  # fmt: skip
    x_hat = saved.normalized_embeddings
    rows = target_rows(inputs, saved)
    if inputs.labels is not None and rows is not None:
        terms["sorted_labels"], terms["label_order"] = torch.sort(rows, stable=True)
        terms["normalized_embeddings"], terms["target_gradient"] = x_hat, target_gradient
    if upstream.uniform_cosine is not None:
        terms["uniform_direction"] = torch.mv(x_hat.t(), upstream.uniform_cosine.to(x_hat.dtype))
        terms["class_weight"] = inputs.class_weight
    terms["length_gradient"] = targets.length_gradient(inputs, upstream.target_length)
    if upstream.nearest_cosine is not None and not inputs.group:
        terms["nearest"] = saved.nearest_index
        terms["sorted_nearest"], terms["nearest_order"] = torch.sort(saved.nearest_index, stable=True)
        terms["nearest_gradient"] = upstream.nearest_cosine.to(x_hat.dtype).contiguous()
    return terms
