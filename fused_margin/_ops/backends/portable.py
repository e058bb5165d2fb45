"""The portable backend: torch.mm in the compute dtype computes the logits, on any device, and kernels of csrc the rest."""

import math

import torch
from torch import Tensor

from fused_margin._ops.backends.select import Kernels, advise_huge_pages
from fused_margin._ops.inputs import CHUNK_BYTES, ChunkPlan, ForwardOutput, LossInputs, compute_dtype, whole_chunk

LN2 = math.log(2.0)
# Size of a square tile of W W^T. The tiles of the upper triangle cover little more than half of the square if they are
# small, and larger ones are not faster.
NEAREST_TILE_BYTES = {"cpu": 4 << 20, "cuda": 16 << 20}


def plan_chunks(inputs: LossInputs, save_for_backward: bool) -> ChunkPlan:
    """The plan of a call, which saves exponentials. Forward and backward make the same plan."""
    (samples, classes, size), workspace = inputs.shape, inputs.workspace_bytes
    compute = compute_dtype(inputs.embeddings, inputs.weight)
    item = 8 if compute == torch.float64 else 4
    device = "cuda" if inputs.weight.device.type == "cuda" else "cpu"
    tiled = inputs.uses_tiled_nearest
    available = workspace // 2 if tiled else workspace  # the other half is for the tile
    target = min(CHUNK_BYTES[device], available)
    # Memory per class of a chunk: its logits, and copies of its weights and their gradient unless the memory of the
    # caller can hold them in the compute dtype.
    copies = 0 if inputs.gradient_in_place else 2
    copies += 2 if tiled else 0  # unit rows of both sides of a tile
    per_class = item * (max(samples, 1) + copies * size)
    chunk = target // max(per_class, item * size)
    if tiled:  # a chunk is the side of a tile
        chunk = min(chunk, math.isqrt(min(NEAREST_TILE_BYTES[device], available) // item))
    chunk = whole_chunk(classes, chunk, inputs.sub_centers)
    chunks = -(-classes // chunk)
    saved = 0
    if save_for_backward and samples:
        temporaries = chunk * (per_class - item * samples) + (chunk * chunk * item if tiled else 0)
        if samples * classes * item <= workspace - temporaries:  # no chunk needs a separate buffer
            saved = chunks
        else:
            remaining = max(workspace - max(target, chunk * per_class + temporaries), 0)
            saved = min(remaining // (samples * chunk * item), chunks)
    exponents = chunks if fixed_exponent(inputs) is None else 1
    return ChunkPlan(classes, chunk, chunks, saved, samples * min(saved * chunk, classes), compute, exponents)


def fixed_exponent(inputs: LossInputs) -> float | None:
    """The power of two that all exponentials share, or None if every row of a chunk needs its own.

    With |cos| <= 1, exp(scale * cos - shift) is in [1e-36, e^58], and its sum over the classes is below the largest
    float32. e^58 allows for the division by the norm of a very short class weight.
    """
    if inputs.inner_product or inputs.hard_strength is not None:
        return None  # logits are not bounded by the scale
    scale = inputs.scale_value
    shift = max(math.log(max(inputs.weight.shape[0], 1)) / 2, scale - 58.0)
    return math.ceil(shift / LN2) if inputs.sample_scale is None and scale + shift <= 82.0 else None


def find_norms(run: Kernels, inputs: LossInputs, output: ForwardOutput) -> None:
    """Computes the norms of all class weights, instead of `forward_chunk` for each chunk."""
    run.row_normalize(
        rows=inputs.weight, normalized=None, inverse_norm=output.weight_inverse_norm, count=inputs.weight.shape[0],
        size=inputs.weight.shape[1],
    )  # fmt: skip


class ChunkBackend:
    """Exponentials overwrite the logits of a chunk, in saved_chunks or in a buffer that all other chunks share."""

    dense_scale = None  # the exponentials contain all factors

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
        """Memory for the exponentials (N, classes) of a chunk."""
        (begin, end), samples = self.plan.bounds(k), self.samples
        if k < self.plan.saved:
            flat = self.output.saved_chunks[samples * begin : samples * end]
        else:
            flat = self.buffer[: samples * (end - begin)]
        return flat.view(end - begin, samples).t() if self.run.class_major else flat.view(samples, end - begin)

    def exponentiate(self, k: int, operand: Tensor) -> Tensor:
        """Computes the exponentials (N, classes) of a chunk, and their sums per row."""
        (begin, end), logits_chunk, inputs = self.plan.bounds(k), self.exponentials(k), self.inputs
        torch.mm(self.output.normalized_embeddings, operand.t(), out=logits_chunk)
        self.run.exponent_sum(
            logits_chunk=logits_chunk, inverse_norm=self.output.weight_inverse_norm[begin:end],
            bias=None if inputs.bias is None else inputs.bias[begin:end].to(operand.dtype).contiguous(),
            labels=inputs.labels, hard_threshold=inputs.hard_threshold, hard_strength=inputs.hard_strength,
            scale=inputs.scale, fixed_exponent=self.fixed, exponent=self.exponents[k], sum=self.sums[k],
            samples=self.samples, chunk=end - begin, class_begin=begin, sub_centers=inputs.sub_centers,
        )  # fmt: skip
        return logits_chunk

    def forward_chunk(self, k: int) -> None:
        """Computes the norms of the classes of a chunk, and their part of the sum of every row."""
        begin, end = self.plan.bounds(k)
        operand = self.inputs.weight[begin:end].to(self.compute)  # a view, or a converted copy
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
        """The normalized class weights of a chunk. Products of unnormalized weights could be infinite."""
        begin, end = self.plan.bounds(k)
        return self.inputs.weight[begin:end].to(self.compute) * self.output.weight_inverse_norm[begin:end].unsqueeze(1)

    def compare_classes(self, column: int) -> None:
        """Compares a chunk with all classes up to its end, in ascending order, so that the lowest index wins a tie."""
        output, (column_begin, column_end) = self.output, self.plan.bounds(column)
        if column == 0:
            output.nearest_cosine.fill_(-4.0)  # below every cosine; it stays for a row of NaN
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
        """Combines the results of the chunks."""
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
            # A chunk that contains only the class of the label has no largest logit.
            torch.where(self.sums == 0, output.exponent.new_full((), -math.inf), self.exponents, out=output.exponent)
            logits = output.exponent * LN2
            torch.amax(logits, dim=0, out=output.largest_logit)
            output.largest_logit.masked_fill_(output.largest_logit == -math.inf, 0.0)
            parts = self.sums.log_().add_(logits.sub_(output.largest_logit))
            torch.logsumexp(parts, dim=0, out=output.relative_logsumexp)

    def prepare_backward(self, row_scale: Tensor, need_embeddings: bool, need_weight: bool) -> None:
        """Prepares the backward of the chunks.

        Args:
            row_scale: (chunks or 1, N), the factors from exponentials to dL / d logit.
        """
        x_hat = self.output.normalized_embeddings
        self.row_scale = row_scale
        self.one_row_scale = row_scale.shape[0] == 1  # for all chunks
        # backward_rows does not apply this factor.
        self.embedding_scale = row_scale[0] if self.one_row_scale else None
        self.need_embeddings, self.need_weight = need_embeddings, need_weight
        if need_embeddings:
            samples, size = x_hat.shape
            # the layout in which torch.mm is fastest
            self.d_embeddings = x_hat.new_zeros(size, samples).t() if self.run.class_major else torch.zeros_like(x_hat)
        self.class_scale = row_scale * self.inputs.scale
        if need_weight:
            self.scaled_embeddings = torch.empty_like(x_hat)
        if need_embeddings and not self.one_row_scale:
            self.partial = torch.empty_like(self.d_embeddings)

    def prepare_chunk(self, k: int) -> None:
        """Prepares `backward_rows` for classes of chunk k."""
        begin, end = self.plan.bounds(k)
        self.chunk_index, self.chunk_begin = k, begin
        if k < self.plan.saved:
            self.chunk_exponentials = self.exponentials(k)
        else:
            self.chunk_exponentials = self.exponentiate(k, self.inputs.weight[begin:end].to(self.compute))
        if self.need_weight and (k == 0 or not self.one_row_scale):
            factors = self.class_scale[0 if self.one_row_scale else k].to(self.compute)
            torch.mul(self.output.normalized_embeddings, factors.unsqueeze(1), out=self.scaled_embeddings)

    def backward_rows(self, begin: int, end: int, gradient: Tensor | None, bias_gradient: Tensor | None) -> None:
        """Adds to d_embeddings, and writes the dense parts of the gradients of weight and bias of some classes of a chunk."""
        k, operand = self.chunk_index, self.inputs.weight[begin:end].to(self.compute)  # a view, or a converted copy
        exponentials = self.chunk_exponentials[:, begin - self.chunk_begin : end - self.chunk_begin]
        if self.need_embeddings and self.one_row_scale:
            self.d_embeddings.addmm_(exponentials, operand)
        elif self.need_embeddings:
            torch.mm(exponentials, operand, out=self.partial)
            self.d_embeddings.addcmul_(self.partial, self.row_scale[k].to(operand.dtype).unsqueeze(1))
        if gradient is not None:
            torch.mm(exponentials.t(), self.scaled_embeddings, out=gradient)
        if bias_gradient is not None:
            torch.mv(exponentials.t(), self.class_scale[k].to(operand.dtype), out=bias_gradient)

    def embedding_gradient(self) -> Tensor:
        return self.d_embeddings.contiguous()
