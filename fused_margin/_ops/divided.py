"""Samples and classes of several ranks: gathers the samples, draws classes, and combines what the ranks computed.

The messages are O(N D): the embeddings, and their gradients; all else is a few numbers a sample. The norms of class
weights are computed while the embeddings are on their way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_margin import _checks
from fused_margin._ops.inputs import DTYPES, ForwardOutput, Gradients, LossInputs, OutputGradients
from fused_margin._ops.normalization import target_cosines
from fused_margin.distributed import Shard, named_shard, padded

# Label of a sample whose class is another rank's, and of rows of padding: below every label that can be sent, and small
# enough for kernels to multiply by a number of sub-centers.
OTHER_CLASS = -(2**53)


@dataclass
class GatheredSamples:
    """The samples of all ranks, M = world_size * most of them, as inputs of this rank's classes."""

    shard: Shard
    inputs: LossInputs  # labels count from the first row that takes part; embeddings may still be on their way
    wait_for_embeddings: Callable[[], None]
    most: int  # maximum number of samples of a rank
    drawn_rows: Tensor | None  # rows of weight that take part, or None where all do


def gather_counts(shard: Shard, embeddings: Tensor, needs_gradient: bool) -> list[int]:
    """Number of samples of every rank.

    Raises:
        ValueError: on every rank, if the embeddings of one differ from those of rank 0, so that no rank waits forever.
    """
    own = [embeddings.shape[0], embeddings.shape[1], DTYPES.index(embeddings.dtype), needs_gradient]
    gathered = shard.all_gather(torch.tensor(own, device=embeddings.device)).tolist()
    for rank, (_, *other) in enumerate(gathered):
        if other != gathered[0][1:]:
            found = [
                f"embedding_size {size}, {DTYPES[dtype]}, {'' if needs else 'no '}gradient wanted"
                for _, size, dtype, needs in (gathered[0], gathered[rank])
            ]
            raise ValueError(f"embeddings: rank 0 has {found[0]}, rank {rank} {found[1]}")
    return [samples for samples, *_ in gathered]


def gather_samples(inputs: LossInputs, ignore_index: int, needs_gradient: bool) -> GatheredSamples:
    """Raises ValueError on every rank if a label of any rank is no class."""
    shard = named_shard(inputs.group, inputs.num_classes)
    samples = gather_counts(shard, inputs.embeddings, needs_gradient)
    most, device = max(samples), inputs.weight.device
    per_sample = [t for t in (inputs.labels, inputs.scale, inputs.hard_threshold) if t is not None]
    numbers = torch.stack([t.double() for t in per_sample], dim=1)  # labels below 2^53 are exact
    sent, wait = shard.start_all_gather(padded(inputs.embeddings, most))
    embeddings = torch.empty_like(sent, dtype=inputs.compute).flatten(0, 1)

    def wait_for_embeddings() -> None:
        wait()
        embeddings.copy_(sent.flatten(0, 1))

    labels, *others = shard.all_gather(padded(numbers, most)).unbind(dim=2)
    labels = labels.long()
    counts = torch.arange(most, device=device) < torch.tensor(samples, device=device).unsqueeze(1)
    counts &= labels != ignore_index
    wrong = counts & ((labels < 0) | (labels >= shard.num_classes))
    if device.type == "cpu" and bool(wrong.any()):
        rank = int(wrong.any(dim=1).nonzero()[0])
        where = f"on rank {rank} " if shard.world_size > 1 else ""
        raise _checks.bad_label_error(labels[wrong][0].item(), f"{where}for {shard.num_classes} classes")
    own = labels - shard.begin
    own = torch.where(counts & (own >= 0) & (own < shard.size), own, OTHER_CLASS)
    own = torch.where(wrong, labels, own).flatten()  # for the kernel to report, on CUDA
    gathered = iter(number.flatten().clone() for number in others)
    local = replace(
        inputs,
        embeddings=embeddings,
        labels=own,
        scale=None if inputs.scale is None else next(gathered),
        hard_threshold=None if inputs.hard_threshold is None else next(gathered),
    )
    classes = None
    if inputs.sample_rate < 1 and shard.size:
        classes, place = draw_classes(inputs, own, shard.size)
        local = replace(_of_rows(local, rows_of(classes, inputs.sub_centers)), labels=place)
    rows = None if classes is None else rows_of(classes, inputs.sub_centers)
    return GatheredSamples(shard, local, wait_for_embeddings, most, rows)


def draw_classes(inputs: LossInputs, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The samples' own classes and as many others as the rate asks for (PartialFC, arXiv:2203.15565), and each label's place."""
    priority = torch.rand(classes, dtype=torch.float32, device=labels.device)  # by torch.manual_seed
    known = (labels >= 0) & (labels < classes)
    is_own = torch.zeros(classes, dtype=torch.bool, device=labels.device)
    is_own[labels[known]] = True
    number = max(int(inputs.sample_rate * classes), int(is_own.sum()), 1)
    drawn = priority.masked_fill_(is_own, 2.0).topk(number).indices.sort().values
    place = torch.searchsorted(drawn, labels.clamp(0, classes - 1))
    return drawn, torch.where(known, place, labels)


def rows_of(classes: Tensor, sub_centers: int) -> Tensor:
    return (classes.unsqueeze(1) * sub_centers + torch.arange(sub_centers, device=classes.device)).flatten()


def _of_rows(inputs: LossInputs, rows: Tensor) -> LossInputs:
    """The inputs of some rows of weight, whole classes."""
    classes = rows[:: inputs.sub_centers] // inputs.sub_centers
    per_class = {"class_weight": inputs.class_weight, "bias": inputs.bias}
    return replace(
        inputs, weight=inputs.weight[rows], **{k: None if t is None else t[classes] for k, t in per_class.items()}
    )


def without_raw_embeddings(inputs: LossInputs, output: ForwardOutput) -> LossInputs:
    """The inputs with unit rows in place of the gathered embeddings, so that the backward need not keep both."""
    return replace(inputs, embeddings=output.normalized_embeddings)


def combine_outputs(inputs: LossInputs, gathered: GatheredSamples, output: ForwardOutput) -> ForwardOutput:
    """The output for this rank's samples over the classes of all ranks, from the outputs for all samples of each."""
    shard, most, samples, local = gathered.shard, gathered.most, len(inputs.embeddings), gathered.inputs
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
    begin = shard.rank * most

    def own(value: Tensor) -> Tensor:
        return value[begin : begin + samples].clone()

    return output._replace(
        largest_logit=own(largest),
        relative_logsumexp=own(relative),
        **{name: own(value) for name, value in summed.items()},
        drawn_rows=output.drawn_rows if gathered.drawn_rows is None else gathered.drawn_rows,
        gathered_labels=local.labels,
        gathered_scale=output.gathered_scale if local.scale is None else local.scale,
        gathered_threshold=output.gathered_threshold if local.hard_threshold is None else local.hard_threshold,
        gathered_largest=largest,
        gathered_logsumexp=relative,
    )


def gather_upstream(
    inputs: LossInputs, upstream: OutputGradients, saved: ForwardOutput
) -> tuple[LossInputs, OutputGradients, ForwardOutput]:
    """The inputs, upstream gradients and results of all ranks' samples, as `gather_samples` made the inputs."""
    shard = named_shard(inputs.group, inputs.num_classes)
    most = len(saved.gathered_labels) // shard.world_size
    # Whether a gradient is None may differ between ranks.
    per_sample = upstream._replace(nearest_cosine=None)
    wanted = {
        "logsumexp": True,
        "target_cosine": True,
        "uniform_cosine": saved.uniform_cosine.numel() > 0 or saved.uniform_weight.numel() > 0,
        "target_bias": inputs.bias is not None,
        "target_length": inputs.need_length,
    }
    zeros = saved.largest_logit.new_zeros(len(inputs.embeddings))
    asked = {name: getattr(per_sample, name) for name, is_wanted in wanted.items() if is_wanted}
    values = shard.all_gather(torch.stack([padded(zeros if g is None else g, most) for g in asked.values()]))
    values = [t.flatten().contiguous() for t in values.unbind(dim=1)]
    gathered = upstream._replace(**dict(zip(asked, values, strict=True)))
    local = inputs
    if saved.drawn_rows.numel():
        local = _of_rows(inputs, saved.drawn_rows)
    local = replace(
        local,
        embeddings=saved.normalized_embeddings,
        labels=saved.gathered_labels,
        scale=None if inputs.scale is None else saved.gathered_scale,
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
    """Gradients of this rank's samples, summed over ranks, and of its classes: 0 for those that were not drawn."""
    shard = named_shard(inputs.group, inputs.num_classes)
    d_embeddings, d_weight, d_bias, d_scale = gradients
    samples = 0 if inputs.embeddings is None else len(inputs.embeddings)
    if need_embeddings:
        d_embeddings = shard.reduce_scatter(d_embeddings.unflatten(0, (shard.world_size, -1)))
        d_embeddings = d_embeddings[:samples].to(inputs.embeddings.dtype, copy=True)
    if inputs.scale is not None:
        d_scale = shard.reduce_scatter(d_scale.unflatten(0, (shard.world_size, -1)))[:samples].clone()
    rows = saved.drawn_rows
    if rows.numel() and need_weight and not inputs.sparse_gradient:
        d_weight = torch.zeros_like(inputs.weight).index_copy_(0, rows, d_weight)
    if rows.numel() and need_bias:
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
    """Cosines (N,) float64 of the own samples with their classes, which may be any rank's; 0 for an ignored label."""
    inputs = LossInputs(
        embeddings, weight, 0, "", labels.long(), sub_centers=sub_centers, group=group, num_classes=num_classes
    )
    gathered = gather_samples(inputs, ignore_index, needs_gradient=False)
    gathered.wait_for_embeddings()
    local, shard = gathered.inputs, gathered.shard
    cosine = torch.zeros(len(local.labels), dtype=torch.float64, device=weight.device)
    if shard.size:
        known = (local.labels >= 0) & (local.labels < shard.size)
        found = target_cosines(local.embeddings, weight, local.labels, sub_centers)
        cosine = torch.where(known, found, 0.0)
    return shard.reduce_scatter(cosine.unflatten(0, (shard.world_size, -1)))[: len(embeddings)].clone()
