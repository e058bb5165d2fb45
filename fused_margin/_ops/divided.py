"""Classes divided among ranks, or drawn: gathers samples, draws classes, and combines the results of the ranks.

Ranks exchange O(N D) values: the embeddings, their gradients, and a few numbers per sample. The norms of class weights
are computed while the embeddings are gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_margin import _checks
from fused_margin._ops.inputs import DTYPES, ForwardOutput, Gradients, LossInputs, OutputGradients, compute_dtype
from fused_margin._ops.normalization import target_cosines
from fused_margin.distributed import Shard, named_shard, padded

# Label of a sample whose class is on another rank, and of padding. It is below every label that can be sent, and kernels
# can multiply it by a number of sub-centers without overflow.
OTHER_CLASS = -(2**53)


@dataclass
class GatheredSamples:
    """The M = world_size * max_samples samples of all ranks, as inputs for the classes of this rank."""

    shard: Shard
    inputs: LossInputs  # its labels (M,) count from the first row that takes part
    wait_for_embeddings: Callable[[], None]  # the embeddings of `inputs` may be read only after this call
    max_samples: int  # maximum number of samples of a rank
    drawn_rows: Tensor | None  # rows of weight that take part, or None for all rows


def gather_counts(shard: Shard, rows: Tensor, needs_gradient: bool, name: str = "embeddings") -> list[int]:
    """Number of rows (R, D) of every rank.

    Raises:
        ValueError: on every rank, if the rows of one differ from those of rank 0, so that no rank waits forever.
    """
    own = [rows.shape[0], rows.shape[1], DTYPES.index(rows.dtype), needs_gradient]
    gathered = shard.all_gather(torch.tensor(own, device=rows.device)).tolist()
    for rank, (_, *other) in enumerate(gathered):
        if other != gathered[0][1:]:
            first, second = (
                f"embedding_size {size}, {DTYPES[dtype]}, {'with' if needs else 'without'} gradient"
                for _, size, dtype, needs in (gathered[0], gathered[rank])
            )
            raise ValueError(f"{name}: expected the same on all ranks, got {first} on rank 0, {second} on rank {rank}")
    return [count for count, *_ in gathered]


def gather_samples(inputs: LossInputs, ignore_index: int, needs_gradient: bool) -> GatheredSamples:
    """Gathers the samples of all ranks.

    Raises:
        ValueError: on every rank, if a label of any rank is out of range.
    """
    assert inputs.embeddings is not None
    shard = named_shard(inputs.group, inputs.num_classes)
    samples = gather_counts(shard, inputs.embeddings, needs_gradient)
    max_samples, device = max(samples), inputs.weight.device
    per_sample = [t for t in (inputs.labels, inputs.sample_scale, inputs.hard_threshold) if t is not None]
    numbers = torch.stack([t.double() for t in per_sample], dim=1)  # labels below 2^53 are exact
    sent, wait = shard.start_all_gather(padded(inputs.embeddings, max_samples))
    embeddings = torch.empty_like(sent, dtype=compute_dtype(inputs.embeddings, inputs.weight)).flatten(0, 1)

    def wait_for_embeddings() -> None:
        wait()
        embeddings.copy_(sent.flatten(0, 1))

    labels, *others = shard.all_gather(padded(numbers, max_samples)).unbind(dim=2)
    labels = labels.long()
    valid = torch.arange(max_samples, device=device) < torch.tensor(samples, device=device).unsqueeze(1)
    valid &= labels != ignore_index
    wrong = valid & ((labels < 0) | (labels >= shard.num_classes))
    if device.type == "cpu" and bool(wrong.any()):
        rank = int(wrong.any(dim=1).nonzero()[0])
        where = f"on rank {rank} " if shard.world_size > 1 else ""
        raise _checks.bad_label_error(int(labels[wrong][0]), f"{where}for {shard.num_classes} classes")
    local_labels = labels - shard.begin
    local_labels = torch.where(valid & (local_labels >= 0) & (local_labels < shard.size), local_labels, OTHER_CLASS)
    local_labels = torch.where(wrong, labels, local_labels).flatten()  # on CUDA the kernel reports wrong labels
    gathered = iter(number.flatten().clone() for number in others)
    local = replace(
        inputs,
        embeddings=embeddings,
        labels=local_labels,
        sample_scale=None if inputs.sample_scale is None else next(gathered),
        hard_threshold=None if inputs.hard_threshold is None else next(gathered),
    )
    rows = None
    if inputs.sample_rate < 1 and shard.size:
        classes, position = draw_classes(inputs, local_labels, shard.size)
        rows = rows_of(classes, inputs.sub_centers)
        local = replace(_of_rows(local, rows), labels=position)
    return GatheredSamples(shard, local, wait_for_embeddings, max_samples, rows)


def draw_classes(inputs: LossInputs, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Draws classes: the classes of the samples, and others up to the sample rate (PartialFC, arXiv:2203.15565).

    Returns:
        Drawn classes (R,) in ascending order, and the labels (M,) as positions in them. Labels of other ranks stay.
    """
    priority = torch.rand(classes, dtype=torch.float32, device=labels.device)  # reproducible by torch.manual_seed
    known = (labels >= 0) & (labels < classes)
    is_own = torch.zeros(classes, dtype=torch.bool, device=labels.device)
    is_own[labels[known]] = True
    number = max(int(inputs.sample_rate * classes), int(is_own.sum()), 1)
    drawn = priority.masked_fill_(is_own, 2.0).topk(number).indices.sort().values
    position = torch.searchsorted(drawn, labels.clamp(0, classes - 1))
    return drawn, torch.where(known, position, labels)


def first_row(inputs: LossInputs) -> int:
    """The number of the first row of `inputs.weight` among the rows of all ranks."""
    return named_shard(inputs.group, inputs.num_classes).begin * inputs.sub_centers if inputs.group else 0


def rows_of(classes: Tensor, sub_centers: int) -> Tensor:
    """The rows of weight of some classes."""
    return (classes.unsqueeze(1) * sub_centers + torch.arange(sub_centers, device=classes.device)).flatten()


def _of_rows(inputs: LossInputs, rows: Tensor) -> LossInputs:
    """The inputs with only some rows of weight, all rows of some classes."""
    classes = rows[:: inputs.sub_centers] // inputs.sub_centers
    class_weight = None if inputs.class_weight is None else inputs.class_weight[classes]
    bias = None if inputs.bias is None else inputs.bias[classes]
    return replace(inputs, weight=inputs.weight[rows], class_weight=class_weight, bias=bias)


def without_raw_embeddings(inputs: LossInputs, output: ForwardOutput) -> LossInputs:
    """The inputs with unit rows instead of the gathered embeddings, so that only one of them stays in memory."""
    return replace(inputs, embeddings=output.normalized_embeddings)


def combine_outputs(inputs: LossInputs, gathered: GatheredSamples, output: ForwardOutput) -> ForwardOutput:
    """The output for the samples of this rank over the classes of all ranks.

    Args:
        output: of all samples over the classes of this rank.
    """
    shard, local = gathered.shard, gathered.inputs
    assert inputs.embeddings is not None and local.labels is not None
    samples = len(inputs.embeddings)
    largest, relative = output.largest_logit, output.relative_logsumexp
    names = [
        "target_cosine",
        *(n for n in ("uniform_cosine", "target_bias", "target_length") if getattr(output, n).numel()),
    ]
    summed = {name: getattr(output, name) for name in names}
    if shard.world_size > 1:
        own_largest = torch.where(relative == -math.inf, -math.inf, largest)
        largest = shard.all_reduce_max(own_largest.clone())
        sums = torch.where(own_largest == -math.inf, 0.0, (own_largest - largest + relative).exp_())
        total, *summed_values = shard.all_reduce_sum(torch.stack([sums, *summed.values()]))
        relative = torch.where(total == 0, -math.inf, total.log())
        largest = torch.where(total == 0, 0.0, largest)
        summed = dict(zip(names, summed_values, strict=True))
    begin = shard.rank * gathered.max_samples

    def own(value: Tensor) -> Tensor:
        return value[begin : begin + samples].clone()

    return output._replace(
        largest_logit=own(largest),
        relative_logsumexp=own(relative),
        **{name: own(value) for name, value in summed.items()},
        drawn_rows=output.drawn_rows if gathered.drawn_rows is None else gathered.drawn_rows,
        gathered_labels=local.labels,
        gathered_scale=output.gathered_scale if local.sample_scale is None else local.sample_scale,
        gathered_threshold=output.gathered_threshold if local.hard_threshold is None else local.hard_threshold,
        gathered_largest=largest,
        gathered_logsumexp=relative,
    )


def gather_upstream(
    inputs: LossInputs, upstream: OutputGradients, saved: ForwardOutput
) -> tuple[LossInputs, OutputGradients, ForwardOutput]:
    """The inputs, upstream gradients and results of the samples of all ranks, in the order of `gather_samples`."""
    assert inputs.embeddings is not None
    shard = named_shard(inputs.group, inputs.num_classes)
    max_samples = len(saved.gathered_labels) // shard.world_size
    # A gradient may be None on some ranks only, so the ranks decide by the options which gradients to exchange.
    per_sample = upstream._replace(nearest_cosine=None)
    needed = {
        "logsumexp": True,
        "target_cosine": True,
        "uniform_cosine": saved.uniform_cosine.numel() > 0 or saved.uniform_weight.numel() > 0,
        "target_bias": inputs.bias is not None,
        "target_length": inputs.need_length,
    }
    zeros = saved.largest_logit.new_zeros(len(inputs.embeddings))
    own = {name: getattr(per_sample, name) for name, is_needed in needed.items() if is_needed}
    sent = torch.stack([padded(zeros if g is None else g, max_samples) for g in own.values()])
    values = [t.flatten().contiguous() for t in shard.all_gather(sent).unbind(dim=1)]
    gathered = upstream._replace(**dict(zip(own, values, strict=True)))
    local = inputs
    if saved.drawn_rows.numel():
        local = _of_rows(inputs, saved.drawn_rows)
    local = replace(
        local,
        embeddings=saved.normalized_embeddings,
        labels=saved.gathered_labels,
        sample_scale=None if inputs.sample_scale is None else saved.gathered_scale,
        hard_threshold=None if inputs.hard_threshold is None else saved.gathered_threshold,
    )
    all_samples = saved._replace(largest_logit=saved.gathered_largest, relative_logsumexp=saved.gathered_logsumexp)
    return local, gathered, all_samples


def scatter_gradients(
    inputs: LossInputs,
    saved: ForwardOutput,
    gradients: Gradients,
    need_embeddings: bool,
    need_weight: bool,
    need_bias: bool,
) -> Gradients:
    """Gradients of the samples of this rank, summed over ranks, and of its classes, with 0 for classes not drawn."""
    shard = named_shard(inputs.group, inputs.num_classes)
    d_embeddings, d_weight, d_bias, d_scale = gradients
    samples = inputs.shape[0]
    if need_embeddings and inputs.embeddings is not None:
        d_embeddings = shard.reduce_scatter(d_embeddings.unflatten(0, (shard.world_size, -1)))
        d_embeddings = d_embeddings[:samples].to(inputs.embeddings.dtype, copy=True)
    if inputs.sample_scale is not None:
        d_scale = shard.reduce_scatter(d_scale.unflatten(0, (shard.world_size, -1)))[:samples].clone()
    rows = saved.drawn_rows
    if rows.numel() and need_weight and not inputs.sparse_gradient:
        d_weight = torch.zeros_like(inputs.weight).index_copy_(0, rows, d_weight)
    if rows.numel() and need_bias and inputs.bias is not None:
        d_bias = torch.zeros_like(inputs.bias).index_copy_(0, rows, d_bias)
    return Gradients(d_embeddings, d_weight, d_bias, d_scale)


def divided_target_cosines(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    sub_centers: int,
    ignore_index: int,
    group: str,
    num_classes: int,
) -> Tensor:
    """Cosines (N,) float64 of the samples of this rank to their classes, on any rank; 0 for an ignored label."""
    inputs = LossInputs(
        embeddings, weight, 0, "", labels.long(), sub_centers=sub_centers, group=group, num_classes=num_classes
    )
    gathered = gather_samples(inputs, ignore_index, needs_gradient=False)
    gathered.wait_for_embeddings()
    local, shard = gathered.inputs, gathered.shard
    assert local.embeddings is not None and local.labels is not None
    cosine = torch.zeros(len(local.labels), dtype=torch.float64, device=weight.device)
    if shard.size:
        known = (local.labels >= 0) & (local.labels < shard.size)
        cosine = torch.where(known, target_cosines(local.embeddings, weight, local.labels, sub_centers), 0.0)
    return shard.reduce_scatter(cosine.unflatten(0, (shard.world_size, -1)))[: len(embeddings)].clone()
