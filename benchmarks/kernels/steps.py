"""Steps that are timed on a GPU: copy and products of the machine, each tensor-core kernel alone, and public calls."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

import fused_margin as fm
from fused_margin._ops.backends import portable, select
from fused_margin._ops.backends.select import kernels
from fused_margin._ops.backends.tensor_cores import WIDTH_MULTIPLE
from fused_margin._ops.inputs import LossInputs
from fused_margin.benchmark.problems import MARGIN, SCALE, Inputs, relative_error, truth

from . import half

CUBLAS_ROWS = 16_384  # rows of C×C at a time: all of it takes 20 GB at 100,000 classes
EXACT_ROWS = 4_096  # the same in float64


class Operands:
    """Packed fp16 rows of samples and classes. The copies of the class operand are together at least four times as
    large as the L2 cache."""

    def __init__(self, inputs: Inputs):
        weight = inputs.weight.detach()
        self.run = kernels(weight.device.type)
        self.labels = inputs.labels
        self.inputs = LossInputs(inputs.embeddings[0], weight, 0, "", inputs.labels[0], scale_value=SCALE)
        self.left = [self._pack(batch.detach()) for batch in inputs.embeddings]
        packed = self._pack(weight)
        cached = torch.cuda.get_device_properties(weight.device).L2_cache_size if weight.is_cuda else 0
        copies = max(2, -(-4 * cached // (2 * packed.numel())))
        self.right = [packed.roll(i, 0) for i in range(copies)]

    def _pack(self, rows: Tensor) -> Tensor:
        count, size = rows.shape
        width = -(-size // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        packed = rows.new_empty(count, width, dtype=torch.float16)
        self.run.pack_operand(rows=rows, packed=packed, inverse_norm=None, count=count, size=size, width=width, parts=1)
        return packed

    def of(self, turn: int) -> tuple[Tensor, Tensor]:
        return self.left[turn % len(self.left)], self.right[turn % len(self.right)]

    def product(self, left: Tensor, right: Tensor) -> dict:
        return {
            "left": left, "right": right, "rows": len(left), "columns": len(right), "width": left.shape[1], "parts": 1,
        }  # fmt: skip

    def exact_logits(self, batch: int) -> Tensor:
        """(N, C) in float64, from the rounded operands; logits of the labels are -inf."""
        logits = self.left[batch].double() @ self.right[0].double().t()
        logits *= SCALE / self.run.operand_scale**2
        return logits.scatter_(1, self.labels[batch][:, None], -math.inf)

    def rows(self, batch: int, exponent: Tensor | None) -> Tensor:
        samples = len(self.left[batch])
        prepared = self.left[batch].new_empty(2 * samples, dtype=torch.float64)  # 16 bytes each
        self.run.prepare_rows(
            labels=self.labels[batch], scale=SCALE, exponent=exponent, prepared=prepared, samples=samples
        )
        return prepared


class Copy:
    """Copy within device memory."""

    def __init__(self, count: int, inputs: Inputs):
        self.source, self.target = inputs.weight.new_ones(2, count // 4)

    def __call__(self, turn: int) -> None:
        self.target.copy_(self.source)


class SquareMatrices:
    """Product of two square fp16 matrices."""

    def __init__(self, inputs: Inputs):
        self.left, self.right = [batch.detach().half() for batch in inputs.embeddings], inputs.weight.detach().half()
        self.out = self.right.new_empty(len(self.left[0]), len(self.right))

    def __call__(self, turn: int) -> None:
        torch.mm(self.left[turn % len(self.left)], self.right.t(), out=self.out)


class Product:
    """X·Wᵀ by cuBLAS."""

    def __init__(self, operands: Operands):
        left, right = operands.of(0)
        self.operands, self.out = operands, [left.new_empty(len(left), len(right)) for _ in range(2)]

    def __call__(self, turn: int) -> None:
        left, right = self.operands.of(turn)
        torch.mm(left, right.t(), out=self.out[turn % 2])


class ExponentSum:
    """The exponent-sum kernel, one launch over all classes."""

    def __init__(self, family: str, operands: Operands):
        self.operands, self.family = operands, getattr(operands.run, family)
        self.rows = [operands.rows(batch, None) for batch in range(len(operands.left))]
        self.fixed = portable.fixed_exponent(operands.inputs)
        samples = len(operands.left[0])
        self.partial = torch.zeros(self.family.slots(), samples, 2, device=operands.left[0].device)

    def __call__(self, turn: int) -> None:
        left, right = self.operands.of(turn)
        self.family.exponent_sum(
            **self.operands.product(left, right), prepared=self.rows[turn % len(self.rows)], scale_value=SCALE,
            fixed_exponent=self.fixed, class_begin=0, partial=self.partial,
        )  # fmt: skip

    def errors(self) -> dict[str, float]:
        self.partial.zero_()
        self(0)
        slots, samples = self.partial.shape[:2]
        measured, exponent = self.partial.new_empty(2, samples, dtype=torch.float64)
        self.operands.run.combine_partials(
            partial=self.partial, negative_logsumexp=measured, exponent=exponent, slots=slots, samples=samples
        )
        return {"logsumexp": relative_error(measured, self.operands.exact_logits(0).logsumexp(1))}


class Probabilities:
    """The probability kernel, one launch over all classes, output in fp16."""

    def __init__(self, family: str, operands: Operands):
        self.operands, self.family = operands, getattr(operands.run, family)
        batches = range(len(operands.left))
        self.exponents = [(operands.exact_logits(b).logsumexp(1) / math.log(2.0)).round() for b in batches]
        self.rows = [operands.rows(b, self.exponents[b]) for b in batches]
        left, right = operands.of(0)
        self.out = [left.new_empty(len(left), -(-len(right) // 8) * 8) for _ in range(2)]

    def __call__(self, turn: int) -> None:
        left, right = self.operands.of(turn)
        out = self.out[turn % 2]
        self.family.probabilities(
            **self.operands.product(left, right), prepared=self.rows[turn % len(self.rows)], class_begin=0,
            probabilities=out, stride=out.shape[1], low=out.numel(),
        )  # fmt: skip

    def errors(self) -> dict[str, float]:
        measured = self.out[0].fill_(math.nan)
        self(0)
        exact = self.operands.exact_logits(0).div_(math.log(2.0)).sub_(self.exponents[0][:, None]).exp2_()
        exact = F.pad(exact.mul_(self.operands.run.probability_scale), (0, measured.shape[1] - exact.shape[1]))
        return {"probabilities": relative_error(measured, exact)}


class SquareProduct:
    """W·Wᵀ by cuBLAS, block by block into one buffer."""

    def __init__(self, operands: Operands):
        self.operands, (_, right) = operands, operands.of(0)
        self.out = right.new_empty(min(CUBLAS_ROWS, len(right)), len(right))

    def __call__(self, turn: int) -> None:
        _, right = self.operands.of(turn)
        for rows in right.split(CUBLAS_ROWS):
            torch.mm(rows, right.t(), out=self.out[: len(rows)])


def shortfall(rows: Tensor, index: Tensor) -> float:
    """Largest difference between the cosine to the nearest class and to the class that was found. rows: unit, float64."""
    worst = []
    for begin in range(0, len(rows), EXACT_ROWS):
        cosine = rows[begin : begin + EXACT_ROWS] @ rows.t()
        cosine.diagonal(begin).fill_(-math.inf)
        found = cosine.gather(1, index[begin : begin + EXACT_ROWS, None])
        worst.append((cosine.max(dim=1).values - found[:, 0]).max())
    return float(torch.stack(worst).max())


class Nearest:
    """The nearest-class kernel, one launch over the upper triangle of all classes."""

    def __init__(self, family: str, operands: Operands):
        self.operands, self.family = operands, getattr(operands.run, family)
        self.best = torch.zeros(len(operands.right[0]), dtype=torch.int64, device=operands.right[0].device)

    def __call__(self, turn: int) -> None:
        _, right = self.operands.of(turn)
        self.best.zero_()
        self.family.nearest(**self.operands.product(right, right), row_begin=0, column_begin=0, best=self.best)

    def errors(self) -> dict[str, float]:
        self(0)
        index = torch.empty_like(self.best)
        self.operands.run.unpack_nearest(best=self.best, index=index, count=len(index))
        return {"cosine": shortfall(self.operands.right[0].double() / self.operands.run.operand_scale, index)}


class NearestCall:
    """The public function from fp32 weights. The time includes norms, packing, chunks and cosines."""

    def __init__(self, backend: str, inputs: Inputs):
        self.backend, self.weight = backend, inputs.weight.detach()

    def __call__(self, turn: int) -> fm.functional.NearestClass:
        with select.force_backend(self.backend):
            return fm.functional.nearest_class(self.weight)

    def errors(self) -> dict[str, float]:
        return {"cosine": shortfall(F.normalize(self.weight.double()), self(0).index)}


class ForwardCall:
    """The public loss without gradients from fp32 inputs. The time includes norms, packing, chunks, margin and mean."""

    def __init__(self, backend: str, inputs: Inputs):
        self.loss = half.our_loss(backend, fm.Margin(m2=MARGIN))
        self.inputs = inputs

    def __call__(self, turn: int) -> Tensor:
        batch = turn % len(self.inputs.embeddings)
        with torch.no_grad():
            return self.loss(self.inputs.embeddings[batch], self.inputs.weight, self.inputs.labels[batch])

    def errors(self) -> dict[str, float]:
        exact = truth("arcface", self.inputs.embeddings[0], self.inputs.weight, self.inputs.labels[0])
        return {"loss": relative_error(self(0), exact.loss)}
