"""Products by our own tensor-core kernels: fp16 operands, exponentials made where the products arise.

A chunk's operand is its normalised classes; nothing of size N x chunk is written in the forward. The backward
makes the exponentials again, relative to each row's own sum, so that fp16 holds them, and leaves the two
products with them to torch.mm.
"""

import math

import torch
from torch import Tensor

from fused_margin._ops.backends import select
from fused_margin._ops.backends.portable import LN2, fixed_exponent
from fused_margin._ops.inputs import Problem, Sweep
from fused_margin._ops.kernels import Kernels
from fused_margin._ops.plan import Plan, nearest_in_chunks, tensor_plan

WIDTH_MULTIPLE = 64  # kWidthMultiple of csrc/cuda/tensor.h: an operand's row comes in lines of 128 bytes
# dX has few output tiles and a long inner dimension: the classes are divided, so that every multiprocessor works
MOST_DIVISIONS = 8
LONGEST_SUM = 2048  # classes, of a product of split operands: see add_divided


def parts_of(problem: Problem) -> int:
    return 2 if problem.products.endswith(select.SPLIT) else 1


def width_of(problem: Problem) -> int:
    return -(-problem.size // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def plan_of(problem: Problem, keep: bool) -> Plan:
    return tensor_plan(problem, keep, width_of(problem), parts_of(problem))


def kept_elements(problem: Problem, plan: Plan) -> tuple[int, torch.dtype]:
    return plan.kept_classes * parts_of(problem) * width_of(problem), torch.float16


def has_shared_exponent(problem: Problem) -> bool:
    return True  # every row has one: that of its whole sum


class Products:
    """Operands stay in `kept`, or go to a buffer that the next chunk overwrites."""

    def __init__(self, run: Kernels, problem: Problem, plan: Plan, sweep: Sweep):
        self.run, self.problem, self.plan, self.sweep = run, problem, plan, sweep
        self.family = run.family(problem.products.removesuffix(select.SPLIT).strip())
        self.parts, self.width = parts_of(problem), width_of(problem)
        self.fixed = fixed_exponent(problem)
        self.buffer = self.operands(plan.chunk if plan.kept < plan.chunks else 0)
        self.other = self.operands(plan.chunk if nearest_in_chunks(problem) and plan.kept < plan.chunks - 1 else 0)
        if problem.samples:
            self.left = self.operands(problem.samples)
            self.pack(problem.embeddings, self.left, None)
            self.rows = sweep.target_cosine.new_empty(2 * problem.samples)  # 16 bytes each
            self.slots = self.family.slots()
            self.partial = problem.weight.new_zeros(self.slots, problem.samples, 2, dtype=torch.float32)
            run.prepare_rows(
                labels=problem.labels, scale=problem.scales, exponent=None, prepared=self.rows, samples=problem.samples
            )
        if nearest_in_chunks(problem):
            self.best = torch.zeros(problem.classes, dtype=torch.int64, device=problem.weight.device)

    def operands(self, rows: int) -> Tensor:
        return self.problem.weight.new_empty(rows, self.parts * self.width, dtype=torch.float16)

    def pack(self, rows: Tensor, packed: Tensor, inverse_norm: Tensor | None) -> None:
        self.run.pack_operand(
            rows=rows, packed=packed, inverse_norm=inverse_norm, count=len(rows), size=self.problem.size,
            width=self.width, parts=self.parts,
        )  # fmt: skip

    def operand(self, k: int, buffer: Tensor, inverse_norm: Tensor | None = None, *, fresh: bool) -> Tensor:
        """A chunk's operand; unless fresh, a kept one is there already."""
        begin, end = self.plan.bounds(k)
        if k < self.plan.kept:
            packed = self.sweep.kept.view(-1, self.parts * self.width)[begin:end]
            if not fresh:
                return packed
        else:
            packed = buffer[: end - begin]
        self.pack(self.problem.weight[begin:end], packed, inverse_norm)
        return packed

    def product(self, left: Tensor, right: Tensor) -> dict:
        return {
            "left": left, "right": right, "rows": len(left), "columns": len(right), "width": self.width,
            "parts": self.parts,
        }  # fmt: skip

    def add(self, k: int) -> None:
        """Forward of a chunk: the norms of its classes, and their part of every row's sum."""
        begin, end = self.plan.bounds(k)
        operand = self.operand(k, self.buffer, self.sweep.weight_inverse_norm[begin:end], fresh=True)
        if self.problem.samples:
            self.family.exponent_sum(
                **self.product(self.left, operand), prepared=self.rows, scale_value=self.problem.scale_value,
                fixed_exponent=self.fixed, class_begin=begin, partial=self.partial,
            )  # fmt: skip
        if nearest_in_chunks(self.problem):
            for j in range(k + 1):
                rows = operand if j == k else self.operand(j, self.other, fresh=False)
                self.family.nearest(
                    **self.product(rows, operand), row_begin=self.plan.bounds(j)[0], column_begin=begin, best=self.best
                )

    def finish(self) -> None:
        """Results of the forward, from those of its chunks."""
        sweep, weight = self.sweep, self.problem.weight
        if self.problem.samples:
            self.run.combine_partials(
                partial=self.partial, negative_logsumexp=sweep.relative_logsumexp, exponent=sweep.exponent,
                slots=self.slots, samples=self.problem.samples,
            )  # fmt: skip
            torch.mul(sweep.exponent[0], LN2, out=sweep.largest_logit)
            if self.problem.scale is not None:  # else products_of has looked at it
                too_large = sweep.largest_logit.abs() > select.LARGEST_LOGIT
                sweep.relative_logsumexp.masked_fill_(too_large, math.nan)
            sweep.relative_logsumexp.sub_(sweep.largest_logit)
        if nearest_in_chunks(self.problem):
            self.run.unpack_nearest(best=self.best, index=sweep.nearest_index, count=self.problem.classes)
            cosine = torch.empty_like(sweep.nearest_cosine, dtype=torch.float64)
            self.run.target_cosine(  # what fp16 has found, computed anew from the unrounded weights
                compute_like=sweep.nearest_cosine, embeddings=weight, weight=weight, labels=sweep.nearest_index,
                cosine=cosine, row=None, bad_label=0, samples=self.problem.classes, classes=self.problem.classes,
                size=self.problem.size, ignore_index=-1, sub_centers=1, inner_product=False,
            )  # fmt: skip
            sweep.nearest_cosine.copy_(cosine.clamp_(-1.0, 1.0))

    def prepare(self, row_scale: Tensor, need_embeddings: bool, need_weight: bool) -> None:
        """Before the chunks of the backward. row_scale: (1, N), dL / d logit over exponential."""
        problem, x_hat = self.problem, self.sweep.normalized_embeddings
        operand_scale, probability_scale = self.run.operand_scale, self.run.probability_scale
        self.run.prepare_rows(
            labels=problem.labels, scale=problem.scales, exponent=self.sweep.exponent, prepared=self.rows,
            samples=problem.samples,
        )  # fmt: skip
        self.probabilities = x_hat.new_empty(
            self.parts, problem.samples, -(-self.plan.chunk // 8) * 8, dtype=torch.float16
        )
        self.d_embeddings = self.embedding_scale = self.dense_scale = None
        if need_embeddings:
            tiles = -(-problem.samples // 128) * -(-problem.size // 128)
            divisions = min(MOST_DIVISIONS, max(1, 264 // tiles))
            self.d_embeddings = x_hat.new_zeros(divisions, problem.samples, problem.size)
            self.embedding_scale = row_scale[0] / (operand_scale * probability_scale)
        if need_weight:
            factors = row_scale[0] * problem.scales
            largest = factors.abs().max().clamp_(min=torch.finfo(torch.float32).tiny)
            exact = x_hat * (factors / largest * operand_scale).to(x_hat.dtype).unsqueeze(1)
            high = exact.half()
            self.classes_left = [high, (exact - high.float()).half()][: self.parts]
            self.dense_scale = largest / (operand_scale * probability_scale)

    def accumulate(self, k: int, gradient: Tensor | None, _bias_gradient: None) -> None:
        """Backward of a chunk: adds to d_embeddings, writes the dense part of the weight gradient."""
        begin, end = self.plan.bounds(k)
        operand = self.operand(k, self.buffer, fresh=False)
        self.family.probabilities(
            **self.product(self.left, operand), prepared=self.rows, class_begin=begin,
            probabilities=self.probabilities, stride=self.probabilities.shape[2], low=self.probabilities[0].numel(),
        )  # fmt: skip
        probabilities = [part[:, : end - begin] for part in self.probabilities]
        if self.d_embeddings is not None:
            rows = [part[:, : self.problem.size] for part in operand.view(end - begin, self.parts, -1).unbind(1)]
            add_divided(self.d_embeddings, probabilities, rows)
        if gradient is not None:
            multiply(gradient, [part.t() for part in probabilities], self.classes_left)

    def embedding_gradient(self) -> Tensor:
        return self.d_embeddings.sum(0)


def pairs_of(left: list[Tensor], right: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Factors whose products add up to that of two split operands; low * low is below float32's rounding."""
    return [(left[0], right[0])] if len(left) == 1 else [(left[0], right[0]), (left[0], right[1]), (left[1], right[0])]


def multiply(out: Tensor, left: list[Tensor], right: list[Tensor]) -> None:
    """out = left @ right in float32, of fp16 operands in one or two parts."""
    for i, (a, b) in enumerate(pairs_of(left, right)):
        half_product(out, a, b, accumulate=i > 0)


def add_divided(out: Tensor, left: list[Tensor], right: list[Tensor]) -> None:
    """out (divisions, N, D) += left (N, classes) @ right (classes, D), each division over its share of the classes.

    Tensor cores round sums towards zero, by up to the last bit every 8 or 16 classes. Split operands are to be as
    accurate as float32: they are multiplied by blocks of classes, whose results are added with correct rounding.
    """
    divisions, classes = out.shape[0], right[0].shape[0]
    block = divisions * LONGEST_SUM if len(left) == 2 else classes
    for begin in range(0, classes, block):
        end = min(begin + block, classes)
        share = (end - begin) // divisions // 8 * 8  # 16-byte aligned
        rest = begin + share * divisions
        for a, b in pairs_of(left, right):
            if share:
                a_shares = a[:, begin:rest].unflatten(1, (divisions, share)).transpose(0, 1)
                half_product(out, a_shares, b[begin:rest].unflatten(0, (divisions, share)), accumulate=True)
            if rest < end:
                half_product(out[0], a[:, rest:end], b[rest:end], accumulate=True)


def half_product(out: Tensor, left: Tensor, right: Tensor, accumulate: bool) -> None:
    """out = left @ right, or out += left @ right: fp16 matrices, or batches of them, summed in float32."""
    if not out.is_cuda:  # torch multiplies fp16 into float32 on CUDA only
        product = left.float() @ right.float()
        out.add_(product) if accumulate else out.copy_(product)
    elif not accumulate:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        add_product = torch.addmm if out.dim() == 2 else torch.baddbmm
        add_product(out, left, right, out_dtype=torch.float32, out=out)
