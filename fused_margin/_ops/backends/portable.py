"""The portable backend: logits by torch.mm in the compute type, on any device, with the kernels of csrc around it."""

import math

import torch
from torch import Tensor

from fused_margin._ops.backends.select import Kernels, advise_huge_pages
from fused_margin._ops.inputs import CHUNK_BYTES, ChunkPlan, ForwardOutput, LossInputs, whole_chunk

LN2 = math.log(2.0)
# A tile of W W^T is square. With small tiles the upper triangle is close to half the square; tiles of this size are as
# fast as larger ones.
TILE_BYTES = {"cpu": 4 << 20, "cuda": 16 << 20}


def plan_chunks(inputs: LossInputs, keep: bool) -> ChunkPlan:
    """Saves exponentials. Forward and backward of one call make the same plan."""
    (samples, classes, size), workspace, compute = inputs.shape, inputs.workspace_bytes, inputs.compute
    item = 8 if compute == torch.float64 else 4
    device = "cuda" if inputs.weight.device.type == "cuda" else "cpu"
    tiled = inputs.uses_tiled_nearest
    room = workspace // 2 if tiled else workspace  # the other half is the tile's
    target = min(CHUNK_BYTES[device], room)
    # Per class of a chunk: its logits, and a copy of its weights and of their gradient where the caller's own memory
    # cannot hold them in the compute type.
    copies = 0 if inputs.gradient_in_place else 2
    copies += 2 if tiled else 0  # unit rows of the two sides of a tile
    per_class = item * (max(samples, 1) + copies * size)
    chunk = target // max(per_class, item * size)
    if tiled:  # chunks are then the sides of tiles
        chunk = min(chunk, math.isqrt(min(TILE_BYTES[device], room) // item))
    chunk = whole_chunk(classes, chunk, inputs.sub_centers)
    chunks = -(-classes // chunk)
    saved = 0
    if keep and samples:
        beside = chunk * (per_class - item * samples) + (chunk * chunk * item if tiled else 0)
        if samples * classes * item <= workspace - beside:  # then no chunk needs a separate buffer
            saved = chunks
        else:
            saved = min(max(workspace - max(target, chunk * per_class + beside), 0) // (samples * chunk * item), chunks)
    exponents = chunks if fixed_exponent(inputs) is None else 1
    return ChunkPlan(classes, chunk, chunks, saved, samples * min(saved * chunk, classes), compute, exponents)


def fixed_exponent(inputs: LossInputs) -> float | None:
    """The power of two that all exponentials can share, or None where every row of a chunk needs its own.

    With |cos| <= 1, exp(scale * cos - shift) stays within [1e-36, e^58] and its sum over the classes
    below float32's largest; e^58 leaves room for the division by the norm of a very short class weight.
    """
    if inputs.inner_product or inputs.hard_strength is not None:
        return None  # not within [-1, 1]
    scale = inputs.scale_value
    shift = max(math.log(max(inputs.weight.shape[0], 1)) / 2, scale - 58.0)
    return math.ceil(shift / LN2) if inputs.scale is None and scale + shift <= 82.0 else None


def find_norms(run: Kernels, inputs: LossInputs, output: ForwardOutput) -> None:
    """Norms of all class weights, which `forward_chunk` otherwise finds chunk by chunk."""
    run.row_normalize(
        rows=inputs.weight, normalized=None, inverse_norm=output.weight_inverse_norm, count=inputs.weight.shape[0],
        size=inputs.weight.shape[1],
    )  # fmt: skip


class ChunkBackend:
    """Exponentials overwrite the logits of a chunk: in saved_chunks, or in a buffer that the next chunk overwrites."""

    dense_scale = None  # exponentials are divided by |w_j|, and no other factor is left to apply

    def __init__(
        self, run: Kernels, inputs: LossInputs, plan: ChunkPlan, output: ForwardOutput, norms_known: bool = False
    ):
        self.run, self.inputs, self.plan, self.output, self.norms_known = run, inputs, plan, output, norms_known
        self.samples, self.compute = output.normalized_embeddings.shape[0], output.normalized_embeddings.dtype
        self.fixed = fixed_exponent(inputs)
        advise_huge_pages(output.saved_chunks)
        self.buffer = output.normalized_embeddings.new_empty(
            self.samples * plan.chunk if plan.saved < plan.chunks else 0
        )
        advise_huge_pages(self.buffer)
        self.sums = output.exponent.new_empty(plan.chunks, self.samples)
        self.exponents = torch.empty_like(self.sums)

    def exponentials(self, k: int) -> Tensor:
        """Where the exponentials (N, classes) of a chunk go."""
        (begin, end), samples = self.plan.bounds(k), self.samples
        if k < self.plan.saved:
            flat = self.output.saved_chunks[samples * begin : samples * end]
        else:
            flat = self.buffer[: samples * (end - begin)]
        return flat.view(end - begin, samples).t() if self.run.class_major else flat.view(samples, end - begin)

    def exponentiate(self, k: int, operand: Tensor) -> Tensor:
        (begin, end), logits_chunk, inputs = self.plan.bounds(k), self.exponentials(k), self.inputs
        torch.mm(self.output.normalized_embeddings, operand.t(), out=logits_chunk)
        self.run.exponent_sum(
            logits_chunk=logits_chunk, inverse_norm=self.output.weight_inverse_norm[begin:end],
            bias=None if inputs.bias is None else inputs.bias[begin:end].to(operand.dtype).contiguous(),
            labels=inputs.labels, hard_threshold=inputs.hard_threshold, hard_strength=inputs.hard_strength,
            scale=inputs.scales, fixed_exponent=self.fixed, exponent=self.exponents[k], sum=self.sums[k],
            samples=self.samples, chunk=end - begin, class_begin=begin, sub_centers=inputs.sub_centers,
        )  # fmt: skip
        return logits_chunk

    def forward_chunk(self, k: int) -> None:
        """The norms of a chunk's classes, and their part of every row's sum."""
        begin, end = self.plan.bounds(k)
        operand = self.inputs.weight[begin:end].to(self.compute)  # the caller's memory, or a converted copy
        inverse_norm = self.output.weight_inverse_norm[begin:end]
        if self.inputs.inner_product:
            inverse_norm.fill_(1.0)
        elif not self.norms_known:
            self.run.row_normalize(
                rows=operand, normalized=None, inverse_norm=inverse_norm, count=end - begin, size=operand.shape[1]
            )
        if self.samples:
            self.exponentiate(k, operand)
        if self.inputs.uses_tiled_nearest:
            self.compare_classes(k)

    def unit_rows(self, k: int) -> Tensor:
        """A chunk's class weights, normalised: products of longer ones can be infinite."""
        begin, end = self.plan.bounds(k)
        return self.inputs.weight[begin:end].to(self.compute) * self.output.weight_inverse_norm[begin:end].unsqueeze(1)

    def compare_classes(self, column: int) -> None:
        """Compares a chunk with all classes up to its end. Ascending order gives ties to the lowest index."""
        output, (column_begin, column_end) = self.output, self.plan.bounds(column)
        if column == 0:
            output.nearest_cosine.fill_(-4.0)  # below every cosine; a row of NaN finds no class
            output.nearest_index.zero_()
            output.nearest_index[:1] = 1
        columns = self.unit_rows(column)
        buffer = columns.new_empty(self.plan.chunk * len(columns))
        for k in range(column + 1):
            begin, end = self.plan.bounds(k)
            scores = buffer[: (end - begin) * len(columns)].view(end - begin, len(columns))
            torch.mm(columns if k == column else self.unit_rows(k), columns.t(), out=scores)
            self.run.nearest_tile(
                scores=scores, cosine=output.nearest_cosine, index=output.nearest_index, rows=end - begin,
                columns=column_end - column_begin, row_begin=begin, column_begin=column_begin,
            )  # fmt: skip

    def finish_forward(self) -> None:
        """Results of the forward, from those of its chunks."""
        output = self.output
        if self.inputs.uses_tiled_nearest:
            output.nearest_cosine.masked_fill_(output.nearest_cosine < -2.0, math.nan).clamp_(-1.0, 1.0)
        if self.fixed is not None:
            output.exponent.fill_(self.fixed)
            output.largest_logit.fill_(self.fixed * LN2)
            torch.sum(self.sums, dim=0, out=output.relative_logsumexp).log_()
        elif self.plan.chunks == 0:
            output.largest_logit.zero_()
            output.relative_logsumexp.fill_(-math.inf)
        else:
            # a chunk without another class than the label's has no largest logit
            torch.where(self.sums == 0, output.exponent.new_full((), -math.inf), self.exponents, out=output.exponent)
            logits = output.exponent * LN2
            torch.amax(logits, dim=0, out=output.largest_logit)
            output.largest_logit.masked_fill_(output.largest_logit == -math.inf, 0.0)
            parts = self.sums.log_().add_(logits.sub_(output.largest_logit))
            torch.logsumexp(parts, dim=0, out=output.relative_logsumexp)

    def prepare_backward(self, row_scale: Tensor, need_embeddings: bool, need_weight: bool) -> None:
        """Before the chunks of the backward. row_scale: (chunks or 1, N), dL / d logit over exponential."""
        x_hat = self.output.normalized_embeddings
        self.row_scale, self.shared = row_scale, row_scale.shape[0] == 1
        self.embedding_scale = row_scale[0] if self.shared else None  # the factor that backward_chunk leaves out
        self.d_embeddings = torch.zeros_like(x_hat) if need_embeddings else None
        self.class_scale = row_scale * self.inputs.scales
        self.left = torch.empty_like(x_hat) if need_weight else None
        self.partial = torch.empty_like(x_hat) if need_embeddings and not self.shared else None

    def backward_chunk(self, k: int, gradient: Tensor | None, bias_gradient: Tensor | None) -> None:
        """Adds to d_embeddings; writes the dense parts of a chunk's gradients of weight and bias."""
        begin, end = self.plan.bounds(k)
        operand = self.inputs.weight[begin:end].to(self.compute)  # the caller's memory, or a converted copy
        exponentials = self.exponentials(k) if k < self.plan.saved else self.exponentiate(k, operand)
        if self.d_embeddings is not None and self.shared:
            self.d_embeddings.addmm_(exponentials, operand)
        elif self.d_embeddings is not None:
            torch.mm(exponentials, operand, out=self.partial)
            self.d_embeddings.addcmul_(self.partial, self.row_scale[k].to(operand.dtype).unsqueeze(1))
        if gradient is not None:
            if k == 0 or not self.shared:
                factors = self.class_scale[0 if self.shared else k].to(operand.dtype)
                torch.mul(self.output.normalized_embeddings, factors.unsqueeze(1), out=self.left)
            torch.mm(exponentials.t(), self.left, out=gradient)
        if bias_gradient is not None:
            torch.mv(exponentials.t(), self.class_scale[k].to(operand.dtype), out=bias_gradient)

    def embedding_gradient(self) -> Tensor:
        return self.d_embeddings
