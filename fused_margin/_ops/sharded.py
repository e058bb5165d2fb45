"""One sweep over classes that are divided among ranks: samples are gathered, every rank sweeps its classes, sums meet again.

What is sent is O(N * D): the embeddings out, their gradients back; everything else is a few numbers a sample. While the
embeddings are on their way, every rank goes over its own class weights for their norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fused_margin._ops import bad_labels, forward_backward
from fused_margin._ops.backends.select import PORTABLE
from fused_margin._ops.inputs import DTYPES, Gradients, Problem, SweepGradients
from fused_margin._ops.normalization import target_cosines
from fused_margin._ops.registration import FirstOrderFunction, refuse_batched_gradients
from fused_margin._ops.sharded_targets import add_target_gradients, target_values
from fused_margin.distributed import Shard

# Label of a sample whose class is another rank's, and of rows that only fill up: below every label that can be sent,
# and small enough for kernels to multiply by a number of sub-centers.
NO_CLASS = -(2**53)


class Gathered(NamedTuple):
    """The samples of all ranks, (world * most) rows of them, as a problem of this rank's classes."""

    problem: Problem  # labels count from the rank's first class; embeddings may still be on their way
    arrive: Callable[[], None]  # waits for them
    most: int  # samples of the rank that has most
    rows: Tensor | None  # of the rank's weight that take part, or None where all do


def tell_samples(shard: Shard, embeddings: Tensor, needs_gradient: bool) -> list[int]:
    """Samples of every rank.

    Raises:
        ValueError: on every rank, if one comes with other embeddings than the first: nobody waits for what never comes.
    """
    own = [embeddings.shape[0], embeddings.shape[1], DTYPES.index(embeddings.dtype), needs_gradient]
    told = shard.gather(torch.tensor(own, device=embeddings.device)).tolist()
    for rank, (_, *theirs) in enumerate(told):
        if theirs != told[0][1:]:
            said = [
                f"embedding_size {size}, {DTYPES[dtype]}, {'' if needs else 'no '}gradient wanted"
                for _, size, dtype, needs in (told[0], told[rank])
            ]
            raise ValueError(f"embeddings: rank 0 has {said[0]}, rank {rank} {said[1]}")
    return [samples for samples, *_ in told]


def padded(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])]) if len(rows) < count else rows


def gather(problem: Problem, shard: Shard, ignore_index: int, needs_gradient: bool) -> Gathered:
    """Raises ValueError on every rank if a label of any is no class."""
    samples = tell_samples(shard, problem.embeddings, needs_gradient)
    most, device = max(samples), problem.weight.device
    per_sample = [t for t in (problem.labels, problem.scale, problem.hard_threshold) if t is not None]
    numbers = torch.stack([t.double() for t in per_sample], dim=1)  # labels below 2^53 are exact
    sent, wait = shard.start_gather(padded(problem.embeddings, most))
    embeddings = torch.empty_like(sent, dtype=problem.compute).flatten(0, 1)

    def arrive() -> None:
        wait()
        embeddings.copy_(sent.flatten(0, 1))

    labels, *others = shard.gather(padded(numbers, most)).unbind(dim=2)
    labels = labels.long()
    counts = torch.arange(most, device=device) < torch.tensor(samples, device=device).unsqueeze(1)
    counts &= labels != ignore_index
    wrong = counts & ((labels < 0) | (labels >= shard.num_classes))
    if device.type == "cpu" and bool(wrong.any()):
        rank = int(wrong.any(dim=1).nonzero()[0])
        raise bad_labels.error(labels[wrong][0].item(), f"on rank {rank} for {shard.num_classes} classes")
    own = labels - shard.begin
    own = torch.where(counts & (own >= 0) & (own < shard.size), own, NO_CLASS)
    own = torch.where(wrong, labels, own).flatten()  # for the kernel to report, on CUDA
    others = iter(number.flatten().contiguous() for number in others)
    problem = replace(
        problem,
        embeddings=embeddings,
        labels=own,
        scale=None if problem.scale is None else next(others),
        hard_threshold=None if problem.hard_threshold is None else next(others),
    )
    rows = None
    if shard.sample_rate < 1 and shard.size:
        problem, rows = sampled(problem, shard)
    return Gathered(problem, arrive, most, rows)


def sampled(problem: Problem, shard: Shard) -> tuple[Problem, Tensor]:
    """The problem of the samples' own classes and of as many others as the rate asks for (PartialFC, arXiv:2203.15565)."""
    labels, centers = problem.labels, problem.sub_centers
    priority = torch.rand(shard.size, dtype=torch.float32, device=labels.device)  # torch.manual_seed's
    known = (labels >= 0) & (labels < shard.size)
    is_own = torch.zeros(shard.size, dtype=torch.bool, device=labels.device)
    is_own[labels[known]] = True
    number = max(int(shard.sample_rate * shard.size), int(is_own.sum()), 1)
    classes = priority.masked_fill_(is_own, 2.0).topk(number).indices.sort().values
    rows = (classes.unsqueeze(1) * centers + torch.arange(centers, device=labels.device)).flatten()
    place = torch.searchsorted(classes, labels.clamp(0, shard.size - 1))
    problem = replace(problem, weight=problem.weight[rows], labels=torch.where(known, place, labels))
    if problem.class_weight is not None:
        problem = replace(problem, class_weight=problem.class_weight[classes])
    if problem.bias is not None:
        problem = replace(problem, bias=problem.bias[classes])
    return problem, rows


class Found(NamedTuple):
    """A sweep's results for the samples of this rank, over all ranks' classes; each (N,) float64, None where not asked for."""

    negative_logsumexp: Tensor
    target_cosine: Tensor
    uniform_cosine: Tensor | None
    target_bias: Tensor | None  # of the sample's class
    target_length: Tensor | None  # of its weight


class ShardedSweep(FirstOrderFunction):
    """The fields of `Found`."""

    @staticmethod
    def forward(
        ctx,
        shard: Shard,
        problem: Problem,
        uniform: bool,
        length: bool,
        ignore_index: int,
        embeddings,
        weight,
        scale,
        bias,
    ):
        needs = any(ctx.needs_input_grad)
        asked = (True, True, uniform, bias is not None, length)
        everyone = gather(problem, shard, ignore_index, needs)
        if shard.size:
            found = forward_backward.forward(everyone.problem, uniform, NO_CLASS, needs, everyone.arrive)
            own_largest = torch.where(found.relative_logsumexp == -math.inf, -math.inf, found.largest_logit)
            relative = found.relative_logsumexp
            parts = [found.target_cosine, *([found.uniform_cosine] if uniform else [])]
            parts += target_values(everyone.problem, length)
        else:  # more ranks than classes
            everyone.arrive()
            found = None
            relative = weight.new_zeros(len(everyone.problem.labels), dtype=torch.float64)
            own_largest = torch.full_like(relative, -math.inf)
            parts = [relative] * (sum(asked) - 1)
        largest = shard.largest(own_largest.clone())
        reach = torch.where(own_largest == -math.inf, 0.0, (own_largest - largest + relative).exp_())
        by_rank = [t.view(shard.world, everyone.most) for t in (reach, *parts)]
        total, *others = shard.scatter_sums(torch.stack(by_rank, dim=1))
        nlse = total.log() + largest.view(shard.world, everyone.most)[shard.rank]
        nlse = torch.where(total == 0, -math.inf, nlse)
        ctx.shard, ctx.everyone, ctx.found, ctx.count, ctx.asked = shard, everyone, found, len(embeddings), asked
        ctx.reach, ctx.total = reach, total  # of this rank's classes, for all samples; of all, for this rank's
        ctx.save_for_backward(embeddings, weight, scale, bias)
        results = (t[: len(embeddings)].clone() for t in (nlse, *others))
        return tuple(next(results) if wanted else None for wanted in asked)

    @staticmethod
    def backward(ctx, *upstream):
        refuse_batched_gradients(upstream)
        shard, (problem, _, most, rows), found = ctx.shard, ctx.everyone, ctx.found
        embeddings, weight, _, bias = ctx.saved_tensors  # an error if somebody has changed them
        need_embeddings, need_weight, need_scale, need_bias = ctx.needs_input_grad[5:]
        upstream = [g for g, wanted in zip(upstream, ctx.asked, strict=True) if wanted]
        told = shard.gather(torch.stack([ctx.total, *(padded(g.contiguous(), most) for g in upstream)]))
        total, *told = (t.flatten().contiguous() for t in told.unbind(dim=1))
        told = iter(told)
        d_nlse, d_target, d_uniform, d_target_bias, d_length = (next(told) if wanted else None for wanted in ctx.asked)
        if found is None:
            no_bias = None if bias is None else torch.zeros_like(bias)
            gradients = Gradients(
                torch.zeros_like(problem.embeddings), torch.zeros_like(weight), no_bias, torch.zeros_like(total)
            )
        else:
            d_nlse = torch.where(d_nlse == 0, 0.0, d_nlse * (ctx.reach / total))
            asked = SweepGradients(d_nlse, d_target, d_uniform, None)
            gradients = forward_backward.backward(problem, asked, found, need_embeddings, need_weight, need_bias)
            gradients = add_target_gradients(
                problem, gradients, d_target_bias if need_bias else None, d_length if need_weight else None
            )
        d_embeddings = d_weight = d_scale = d_bias = None
        if need_embeddings:
            d_embeddings = shard.scatter_sums(gradients.embeddings.view(shard.world, most, problem.size))
            d_embeddings = d_embeddings[: ctx.count].to(embeddings.dtype)
        if need_weight:
            d_weight = gradients.weight
            if rows is not None:
                d_weight = torch.sparse_coo_tensor(
                    rows.unsqueeze(0), d_weight, weight.shape, is_coalesced=True, check_invariants=False
                )
        if need_scale:
            d_scale = shard.scatter_sums(gradients.scale.view(shard.world, most))[: ctx.count]
        if need_bias:  # dense: it is small
            d_bias = gradients.bias if rows is None else torch.zeros_like(bias).index_copy_(0, rows, gradients.bias)
        return None, None, None, None, None, d_embeddings, d_weight, d_scale, d_bias


def run_sharded_sweep(problem: Problem, uniform: bool, ignore_index: int, shard: Shard, length: bool = False) -> Found:
    """Differentiable in the problem's embeddings, weight, scale and bias."""
    return Found(
        *ShardedSweep.apply(
            shard,
            problem,
            uniform,
            length,
            ignore_index,
            problem.embeddings,
            problem.weight,
            problem.scale,
            problem.bias,
        )
    )


@torch.no_grad()
def sharded_target_cosine(
    shard: Shard, embeddings: Tensor, weight: Tensor, labels: Tensor, sub_centers: int, ignore_index: int
) -> Tensor:
    """Cosines (N,) float64 of the own samples with their classes, which may be any rank's; of an ignored label, 0."""
    problem = Problem(embeddings, weight, 0, PORTABLE, labels.long(), sub_centers=sub_centers)
    problem, arrive, *_ = gather(problem, replace(shard, sample_rate=1.0), ignore_index, needs_gradient=False)
    arrive()
    cosine = torch.zeros(len(problem.labels), dtype=torch.float64, device=weight.device)
    if shard.size:
        known = (problem.labels >= 0) & (problem.labels < shard.size)
        found = target_cosines(problem.embeddings, weight, problem.labels, sub_centers)
        cosine = torch.where(known, found, 0.0)
    return shard.scatter_sums(cosine.view(shard.world, len(cosine) // shard.world))[: len(embeddings)]
