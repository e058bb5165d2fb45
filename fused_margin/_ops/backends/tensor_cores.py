"""The tensor-core backend: our kernels compute logits from fp16 operands, and reduce their exponentials in registers.

The operand of a chunk is its normalized classes. The forward writes nothing of size N x chunk. The backward recomputes
the exponentials relative to the sum of their row, so that they fit fp16, and multiplies them by torch.mm.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fused_margin._ops.backends.portable import LN2, fixed_exponent
from fused_margin._ops.backends.select import MAX_LOGIT, SPLIT, Kernels
from fused_margin._ops.inputs import CHUNK_BYTES, ChunkPlan, ForwardOutput, LossInputs, whole_chunk

WIDTH_MULTIPLE = 64  # kWidthMultiple of csrc/kernels/tensor.h: the row of an operand consists of lines of 128 bytes
# dX has few output tiles and a long inner dimension. The classes are divided to use every multiprocessor.
MAX_DIVISIONS = 8
MAX_CLASSES_PER_PRODUCT = 2048  # classes per product of split operands, see add_divided


def parts_of(inputs: LossInputs) -> int:
    return 2 if inputs.backend.endswith(SPLIT) else 1


def width_of(inputs: LossInputs) -> int:
    return -(-inputs.weight.shape[1] // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def plan_chunks(inputs: LossInputs, save_for_backward: bool) -> ChunkPlan:
    """The plan of a call, which saves operands. Exponentials do not fit fp16 before their sum is known."""
    (samples, classes, size), workspace = inputs.shape, inputs.workspace_bytes
    parts, elements = parts_of(inputs), parts_of(inputs) * width_of(inputs)
    operand_bytes = 2 * elements
    # the operand of the chunk, another operand to compare it with, exponentials, and a copy of the gradient
    per_class = operand_bytes * (2 if inputs.uses_tiled_nearest else 1) + 2 * parts * samples
    per_class += 0 if inputs.gradient_in_place else 4 * size
    device = "cuda" if inputs.weight.device.type == "cuda" else "cpu"
    chunk = whole_chunk(classes, min(CHUNK_BYTES[device], workspace) // per_class)
    chunks = -(-classes // chunk)
    saved = max(workspace - chunk * per_class, 0) // (chunk * operand_bytes) if save_for_backward and samples else 0
    saved = min(saved, chunks)
    return ChunkPlan(classes, chunk, chunks, saved, min(saved * chunk, classes) * elements, torch.float16, 1)


class ChunkBackend:
    """Operands of chunks are in saved_chunks, or in a buffer that all other chunks share."""

    def __init__(
        self, run: Kernels, inputs: LossInputs, plan: ChunkPlan, output: ForwardOutput, norms_known: bool = False
    ):
        self.run, self.inputs, self.plan, self.output = run, inputs, plan, output
        self.samples, self.size = output.normalized_embeddings.shape
        self.family = getattr(run, inputs.backend.removesuffix(SPLIT).strip())
        self.parts, self.width = parts_of(inputs), width_of(inputs)
        self.fixed = fixed_exponent(inputs)
        self.buffer = self.operands(plan.chunk if plan.saved < plan.chunks else 0)
        self.second_buffer = self.operands(
            plan.chunk if inputs.uses_tiled_nearest and plan.saved < plan.chunks - 1 else 0
        )
        if self.samples and inputs.embeddings is not None:
            self.embedding_operand = self.operands(self.samples)
            self.pack(inputs.embeddings, self.embedding_operand, None)
            self.prepared_rows = output.target_cosine.new_empty(2 * self.samples)  # 16 bytes each
            self.slots = self.family.slots()
            self.partial = inputs.weight.new_zeros(self.slots, self.samples, 2, dtype=torch.float32)
            run.prepare_rows(
                labels=inputs.labels, scale=inputs.scale, exponent=None, prepared=self.prepared_rows,
                samples=self.samples,
            )  # fmt: skip
        if inputs.uses_tiled_nearest:
            self.packed_nearest = torch.zeros(inputs.weight.shape[0], dtype=torch.int64, device=inputs.weight.device)

    def operands(self, rows: int) -> Tensor:
        """Memory for the operands of some rows."""
        return self.inputs.weight.new_empty(rows, self.parts * self.width, dtype=torch.float16)

    def pack(self, rows: Tensor, packed: Tensor, inverse_norm: Tensor | None) -> None:
        """Writes the operands of rows, and their inverse norms."""
        self.run.pack_operand(
            rows=rows, packed=packed, inverse_norm=inverse_norm, count=len(rows), size=self.size,
            width=self.width, parts=self.parts,
        )  # fmt: skip

    def operand(self, k: int, buffer: Tensor, inverse_norm: Tensor | None = None, *, fresh: bool) -> Tensor:
        """The operand of a chunk. Unless `fresh`, a saved operand is not packed again."""
        begin, end = self.plan.bounds(k)
        if k < self.plan.saved:
            packed = self.output.saved_chunks.view(-1, self.parts * self.width)[begin:end]
            if not fresh:
                return packed
        else:
            packed = buffer[: end - begin]
        self.pack(self.inputs.weight[begin:end], packed, inverse_norm)
        return packed

    def product(self, left: Tensor, right: Tensor) -> dict[str, Any]:
        """The arguments of a kernel that multiplies two operands."""
        return {
            "left": left, "right": right, "rows": len(left), "columns": len(right), "width": self.width,
            "parts": self.parts,
        }  # fmt: skip

    def forward_chunk(self, k: int) -> None:
        """Computes the norms of the classes of a chunk, and their part of the sum of every row."""
        begin, end = self.plan.bounds(k)
        operand = self.operand(k, self.buffer, self.output.weight_inverse_norm[begin:end], fresh=True)
        if self.samples:
            self.family.exponent_sum(
                **self.product(self.embedding_operand, operand), prepared=self.prepared_rows,
                scale_value=self.inputs.scale_value, fixed_exponent=self.fixed, class_begin=begin, partial=self.partial,
            )  # fmt: skip
        if self.inputs.uses_tiled_nearest:
            for j in range(k + 1):
                rows = operand if j == k else self.operand(j, self.second_buffer, fresh=False)
                self.family.nearest(
                    **self.product(rows, operand), row_begin=self.plan.bounds(j)[0], column_begin=begin,
                    best=self.packed_nearest,
                )  # fmt: skip

    def finish_forward(self) -> None:
        """Combines the results of the chunks."""
        output, weight = self.output, self.inputs.weight
        if self.samples:
            self.run.combine_partials(
                partial=self.partial, negative_logsumexp=output.relative_logsumexp, exponent=output.exponent,
                slots=self.slots, samples=self.samples,
            )  # fmt: skip
            torch.mul(output.exponent[0], LN2, out=output.largest_logit)
            if self.inputs.sample_scale is not None:  # select_backend checks a scale that is a number
                too_large = output.largest_logit.abs() > MAX_LOGIT
                output.relative_logsumexp.masked_fill_(too_large, math.nan)
            output.relative_logsumexp.sub_(output.largest_logit)
        if self.inputs.uses_tiled_nearest:
            self.run.unpack_nearest(
                best=self.packed_nearest, index=output.nearest_index, count=self.inputs.weight.shape[0]
            )
            cosine = torch.empty_like(output.nearest_cosine, dtype=torch.float64)
            self.run.target_cosine(  # recomputes the cosines from the unrounded weights
                compute_like=output.nearest_cosine, embeddings=weight, weight=weight, labels=output.nearest_index,
                cosine=cosine, row=None, bad_label=0, samples=len(weight), classes=len(weight), size=self.size,
                ignore_index=-1, sub_centers=1, inner_product=False,
            )  # fmt: skip
            output.nearest_cosine.copy_(cosine.clamp_(-1.0, 1.0))

    def prepare_backward(self, row_scale: Tensor, need_embeddings: bool, need_weight: bool) -> None:
        """Prepares the backward of the chunks.

        Args:
            row_scale: (1, N), the factors from exponentials to dL / d logit.
        """
        inputs, x_hat = self.inputs, self.output.normalized_embeddings
        operand_scale, probability_scale = self.run.operand_scale, self.run.probability_scale
        self.run.prepare_rows(
            labels=inputs.labels, scale=inputs.scale, exponent=self.output.exponent, prepared=self.prepared_rows,
            samples=self.samples,
        )  # fmt: skip
        self.probabilities = x_hat.new_empty(
            self.parts, self.samples, -(-self.plan.chunk // 8) * 8, dtype=torch.float16
        )
        self.embedding_scale = self.dense_scale = None
        self.need_embeddings = need_embeddings
        if need_embeddings:
            tiles = -(-self.samples // 128) * -(-self.size // 128)
            divisions = min(MAX_DIVISIONS, max(1, 264 // tiles))
            self.d_embeddings = x_hat.new_zeros(divisions, self.samples, self.size)
            self.embedding_scale = row_scale[0] / (operand_scale * probability_scale)
        if need_weight:
            factors = row_scale[0] * inputs.scale
            largest = factors.abs().max().clamp_(min=torch.finfo(torch.float32).tiny)
            exact = x_hat * (factors / largest * operand_scale).to(x_hat.dtype).unsqueeze(1)
            high = exact.half()
            self.scaled_embedding_parts = [high, (exact - high.float()).half()][: self.parts]
            self.dense_scale = largest / (operand_scale * probability_scale)

    def prepare_chunk(self, k: int) -> None:
        """Prepares `backward_rows` for classes of chunk k."""
        begin, _ = self.plan.bounds(k)
        self.chunk_begin, self.chunk_operand = begin, self.operand(k, self.buffer, fresh=False)
        self.family.probabilities(
            **self.product(self.embedding_operand, self.chunk_operand), prepared=self.prepared_rows, class_begin=begin,
            probabilities=self.probabilities, stride=self.probabilities.shape[2], low=self.probabilities[0].numel(),
        )  # fmt: skip

    def backward_rows(self, begin: int, end: int, gradient: Tensor | None, _bias_gradient: None) -> None:
        """Adds to d_embeddings, and writes the dense part of the weight gradient of some classes of a chunk."""
        first, last = begin - self.chunk_begin, end - self.chunk_begin
        probabilities = [part[:, first:last] for part in self.probabilities]
        if self.need_embeddings:
            operand = self.chunk_operand[first:last].view(end - begin, self.parts, -1)
            add_divided(self.d_embeddings, probabilities, [part[:, : self.size] for part in operand.unbind(1)])
        if gradient is not None:
            multiply(gradient, [part.t() for part in probabilities], self.scaled_embedding_parts)

    def embedding_gradient(self) -> Tensor:
        return self.d_embeddings.sum(0)


def pairs_of(left: list[Tensor], right: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of parts whose products add up to the product of two split operands; low * low is negligible in float32."""
    return [(left[0], right[0])] if len(left) == 1 else [(left[0], right[0]), (left[0], right[1]), (left[1], right[0])]


def multiply(out: Tensor, left: list[Tensor], right: list[Tensor]) -> None:
    """out = left @ right in float32, from fp16 operands of one or two parts."""
    for i, (a, b) in enumerate(pairs_of(left, right)):
        half_product(out, a, b, accumulate=i > 0)


def add_divided(out: Tensor, left: list[Tensor], right: list[Tensor]) -> None:
    """out (divisions, N, D) += left (N, classes) @ right (classes, D), each division over its share of the classes.

    Tensor cores round sums towards zero, by up to the last bit every 8 or 16 classes. For the accuracy of float32, split
    operands are multiplied in blocks of classes, and the results of the blocks are added with correct rounding.
    """
    divisions, classes = out.shape[0], right[0].shape[0]
    block = divisions * MAX_CLASSES_PER_PRODUCT if len(left) == 2 else classes
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
    if not out.is_cuda:  # torch has fp16 products with float32 results on CUDA only
        product = left.float() @ right.float()
        out.add_(product) if accumulate else out.copy_(product)
    elif not accumulate:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        add_product = torch.addmm if out.dim() == 2 else torch.baddbmm
        add_product(out, left, right, out_dtype=torch.float32, out=out)
