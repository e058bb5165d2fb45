"""Products by torch.mm in the compute type, on any device, with the kernels of csrc/kernels.h around them."""

import math

import torch
from torch import Tensor

from fused_margin._ops.inputs import Problem, Sweep
from fused_margin._ops.kernels import Kernels, advise_huge_pages
from fused_margin._ops.plan import Plan, nearest_in_chunks, portable_plan

LN2 = math.log(2.0)


def plan_of(problem: Problem, keep: bool) -> Plan:
    return portable_plan(problem, keep)


def kept_elements(problem: Problem, plan: Plan) -> tuple[int, torch.dtype]:
    return problem.samples * plan.kept_classes, problem.compute


def has_shared_exponent(problem: Problem) -> bool:
    return fixed_exponent(problem) is not None


def fixed_exponent(problem: Problem) -> float | None:
    """The power of two that all exponentials can share, or None where every (row, chunk) needs its own.

    With |cos| <= 1, exp(scale * cos - shift) stays within [1e-36, e^58] and its sum over the classes
    below float32's largest; e^58 leaves room for the division by the norm of a very short class weight.
    """
    if problem.inner_product or problem.hard_strength is not None:
        return None  # not within [-1, 1]
    scale = problem.scale_value
    shift = max(math.log(max(problem.classes, 1)) / 2, scale - 58.0)
    return math.ceil(shift / LN2) if problem.scale is None and scale + shift <= 82.0 else None


def find_norms(run: Kernels, problem: Problem, sweep: Sweep) -> None:
    """Of all class weights; what a sweep otherwise finds chunk by chunk."""
    run.row_normalize(
        rows=problem.weight, normalized=None, inverse_norm=sweep.weight_inverse_norm, count=problem.classes,
        size=problem.size,
    )  # fmt: skip


class Products:
    """Exponentials overwrite the products: kept, or in a buffer that the next chunk overwrites."""

    dense_scale = None  # exponentials are divided by |w_j|, and nothing else is left to apply
    norms_known = False  # by `find_norms`

    def __init__(self, run: Kernels, problem: Problem, plan: Plan, sweep: Sweep):
        self.run, self.problem, self.plan, self.sweep = run, problem, plan, sweep
        self.fixed = fixed_exponent(problem)
        advise_huge_pages(sweep.kept)
        self.buffer = sweep.normalized_embeddings.new_empty(
            problem.samples * plan.chunk if plan.kept < plan.chunks else 0
        )
        advise_huge_pages(self.buffer)
        self.sums = sweep.target_cosine.new_empty(plan.chunks, problem.samples)
        self.exponents = torch.empty_like(self.sums)

    def rows(self, begin: int, end: int) -> Tensor:
        """Class weights as an operand: the caller's memory, or a converted copy."""
        return self.problem.weight[begin:end].to(self.problem.compute)

    def exponentials(self, k: int) -> Tensor:
        """Where a chunk's products (N, classes) go."""
        (begin, end), samples = self.plan.bounds(k), self.problem.samples
        if k < self.plan.kept:
            flat = self.sweep.kept[samples * begin : samples * end]
        else:
            flat = self.buffer[: samples * (end - begin)]
        return flat.view(end - begin, samples).t() if self.run.class_major else flat.view(samples, end - begin)

    def exponentiate(self, k: int, operand: Tensor) -> Tensor:
        (begin, end), products = self.plan.bounds(k), self.exponentials(k)
        torch.mm(self.sweep.normalized_embeddings, operand.t(), out=products)
        problem = self.problem
        self.run.exponent_sum(
            products=products, inverse_norm=self.sweep.weight_inverse_norm[begin:end],
            bias=None if problem.bias is None else problem.bias[begin:end].to(problem.compute).contiguous(),
            labels=problem.labels, hard_threshold=problem.hard_threshold, hard_strength=problem.hard_strength,
            scale=problem.scales, fixed_exponent=self.fixed, exponent=self.exponents[k], sum=self.sums[k],
            samples=problem.samples, chunk=end - begin, class_begin=begin, sub_centers=problem.sub_centers,
        )  # fmt: skip
        return products

    def add(self, k: int) -> None:
        """Forward of a chunk: the norms of its classes, and their part of every row's sum."""
        begin, end = self.plan.bounds(k)
        operand = self.rows(begin, end)
        inverse_norm = self.sweep.weight_inverse_norm[begin:end]
        if self.problem.inner_product:
            inverse_norm.fill_(1.0)
        elif not self.norms_known:
            self.run.row_normalize(
                rows=operand, normalized=None, inverse_norm=inverse_norm, count=end - begin, size=self.problem.size
            )
        if self.problem.samples:
            self.exponentiate(k, operand)
        if nearest_in_chunks(self.problem):
            self.offer(k)

    def unit_rows(self, k: int) -> Tensor:
        """A chunk's class weights, normalised: products of longer ones can be infinite."""
        begin, end = self.plan.bounds(k)
        return self.rows(begin, end) * self.sweep.weight_inverse_norm[begin:end].unsqueeze(1)

    def offer(self, column: int) -> None:
        """Compares a chunk with all classes up to its end. Ascending order gives ties to the lowest index."""
        sweep, (column_begin, column_end) = self.sweep, self.plan.bounds(column)
        if column == 0:
            sweep.nearest_cosine.fill_(-4.0)  # below every cosine; a row of NaN finds no class
            sweep.nearest_index.zero_()
            sweep.nearest_index[:1] = 1
        columns = self.unit_rows(column)
        buffer = columns.new_empty(self.plan.chunk * len(columns))
        for k in range(column + 1):
            begin, end = self.plan.bounds(k)
            products = buffer[: (end - begin) * len(columns)].view(end - begin, len(columns))
            torch.mm(columns if k == column else self.unit_rows(k), columns.t(), out=products)
            self.run.nearest_tile(
                products=products, cosine=sweep.nearest_cosine, index=sweep.nearest_index, rows=end - begin,
                columns=column_end - column_begin, row_begin=begin, column_begin=column_begin,
            )  # fmt: skip

    def finish(self) -> None:
        """Results of the forward, from those of its chunks."""
        sweep = self.sweep
        if self.problem.samples:
            self.add_up()
        if nearest_in_chunks(self.problem):
            sweep.nearest_cosine.masked_fill_(sweep.nearest_cosine < -2.0, math.nan).clamp_(-1.0, 1.0)

    def add_up(self) -> None:
        """The chunks' sums as one logsumexp of every row."""
        sweep = self.sweep
        if self.fixed is not None:
            sweep.exponent.fill_(self.fixed)
            sweep.largest_logit.fill_(self.fixed * LN2)
            torch.sum(self.sums, dim=0, out=sweep.relative_logsumexp).log_()
            return
        # a chunk without another class than the label's has no largest logit
        torch.where(self.sums == 0, sweep.exponent.new_full((), -math.inf), self.exponents, out=sweep.exponent)
        logits = sweep.exponent * LN2
        torch.amax(logits, dim=0, out=sweep.largest_logit)
        sweep.largest_logit.masked_fill_(sweep.largest_logit == -math.inf, 0.0)
        parts = self.sums.log_().add_(logits.sub_(sweep.largest_logit))
        torch.logsumexp(parts, dim=0, out=sweep.relative_logsumexp)

    def prepare(self, row_scale: Tensor, need_embeddings: bool, need_weight: bool) -> None:
        """Before the chunks of the backward. row_scale: (chunks or 1, N), dL / d logit over exponential."""
        x_hat = self.sweep.normalized_embeddings
        self.row_scale, self.shared = row_scale, row_scale.shape[0] == 1
        self.embedding_scale = row_scale[0] if self.shared else None  # what accumulate leaves to be applied
        self.d_embeddings = torch.zeros_like(x_hat) if need_embeddings else None
        self.to_classes = row_scale * self.problem.scales
        self.left = torch.empty_like(x_hat) if need_weight else None
        self.partial = torch.empty_like(x_hat) if need_embeddings and not self.shared else None

    def accumulate(self, k: int, gradient: Tensor | None, bias_gradient: Tensor | None) -> None:
        """Backward of a chunk: adds to d_embeddings, writes the dense parts of the gradients of weight and bias."""
        begin, end = self.plan.bounds(k)
        operand = self.rows(begin, end)
        exponentials = self.exponentials(k) if k < self.plan.kept else self.exponentiate(k, operand)
        if self.d_embeddings is not None and self.shared:
            self.d_embeddings.addmm_(exponentials, operand)
        elif self.d_embeddings is not None:
            torch.mm(exponentials, operand, out=self.partial)
            self.d_embeddings.addcmul_(self.partial, self.row_scale[k].to(operand.dtype).unsqueeze(1))
        if gradient is not None:
            if k == 0 or not self.shared:
                factors = self.to_classes[0 if self.shared else k].to(operand.dtype)
                torch.mul(self.sweep.normalized_embeddings, factors.unsqueeze(1), out=self.left)
            torch.mm(exponentials.t(), self.left, out=gradient)
        if bias_gradient is not None:
            torch.mv(exponentials.t(), self.to_classes[k].to(operand.dtype), out=bias_gradient)

    def embedding_gradient(self) -> Tensor:
        return self.d_embeddings
