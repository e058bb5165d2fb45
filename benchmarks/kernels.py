"""The tensor-core kernels beside cuBLAS on a GPU: the machine's own speeds, each product alone, then whole steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import fused_margin as fm
from fused_margin._ops.backends import portable, select
from fused_margin._ops.backends.tensor_cores import WIDTH_MULTIPLE
from fused_margin._ops.inputs import Problem
from fused_margin._ops.kernels import has_cuda_kernels, kernels

from . import half
from .half import ours
from .peers import Contestant, LossStep
from .problems import MARGIN, SCALE, Inputs, Shape, relative_error, truth
from .timing import Step

MACHINE = "machine"
EXPONENT_SUM, PROBABILITIES, NEAREST = "exponent sum", "probabilities", "nearest class"
HALF_STEP, LAUNCH_BOUND = "half-precision step", "launch-bound step"
KERNELS = (EXPONENT_SUM, PROBABILITIES, NEAREST)
# Timed without the host's launches, which the launch-bound suite includes.
QUEUED = (MACHINE, *KERNELS, HALF_STEP)
SUITES = (*QUEUED, LAUNCH_BOUND)

STEP = Shape(1024, 512, 100_000)  # of the exponent sum and of the probabilities too
CLASSES = Shape(128, 512, 100_000)  # N plays no part in the nearest class
LARGE = (Shape(1024, 512, 1_000_000), Shape(1024, 512, 2_000_000))
SMALL = Shape(128, 512, 10_000)
SQUARE_SHAPE = Shape(8192, 8192, 8192)
COPIED_BYTES = 2**30

COPY, SQUARE = "device-to-device copy", "square product, fp16"
CUBLAS, CALL = "cuBLAS, fp16", "whole call"
CUBLAS_ROWS = 16_384  # of C×C at a time: 20 GB at 100,000 classes would not fit everywhere
EXACT_ROWS = 4_096  # the same in float64


@dataclass(frozen=True)
class Comparison:
    """One section of the report."""

    suite: str
    shape: Shape
    contestants: list[Contestant]


def missing(device: str) -> str | None:
    """Why this suite cannot run; None where it can."""
    if device != "cuda":
        return "The kernels suite measures a GPU: it needs --device cuda."
    if not torch.cuda.is_available():
        return "The kernels suite needs a GPU, and torch finds none."
    return None if has_cuda_kernels() else "The kernels suite needs a build with CUDA: CUDA_HOME, or nvcc on PATH."


def available_families() -> list[str]:
    """Those compiled that run on the current device, the one that serves it first."""
    capability = torch.cuda.get_device_capability()
    return [f.name for f in select.FAMILIES if f.compiled and f.runs_on(capability)]


class Operands:
    """Packed fp16 rows; of the classes several copies, together four times the second-level cache."""

    def __init__(self, inputs: Inputs):
        weight = inputs.weight.detach()
        self.run = kernels(weight.device)
        self.labels = inputs.labels
        self.problem = Problem(inputs.embeddings[0], weight, 0, "", inputs.labels[0], scale_value=SCALE)
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
        """(N, C) in float64, of the operands as they are rounded; the label's own is left out."""
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
    """From one place in device memory to another."""

    def __init__(self, count: int, inputs: Inputs):
        self.source, self.target = inputs.weight.new_ones(2, count // 4)

    def __call__(self, turn: int) -> None:
        self.target.copy_(self.source)

    def errors(self) -> dict[str, float]:
        return {}


class SquareMatrices:
    """The product of two square matrices of fp16."""

    def __init__(self, inputs: Inputs):
        self.left, self.right = [batch.detach().half() for batch in inputs.embeddings], inputs.weight.detach().half()
        self.out = self.right.new_empty(len(self.left[0]), len(self.right))

    def __call__(self, turn: int) -> None:
        torch.mm(self.left[turn % len(self.left)], self.right.t(), out=self.out)

    def errors(self) -> dict[str, float]:
        return {}


class Product:
    """X·Wᵀ and nothing else."""

    def __init__(self, operands: Operands):
        left, right = operands.of(0)
        self.operands, self.out = operands, [left.new_empty(len(left), len(right)) for _ in range(2)]

    def __call__(self, turn: int) -> None:
        left, right = self.operands.of(turn)
        torch.mm(left, right.t(), out=self.out[turn % 2])

    def errors(self) -> dict[str, float]:
        return {}


class ExponentSum:
    """E1, one launch over all classes."""

    def __init__(self, family: str, operands: Operands):
        self.operands, self.family = operands, operands.run.family(family)
        self.rows = [operands.rows(batch, None) for batch in range(len(operands.left))]
        self.fixed = portable.fixed_exponent(operands.problem)
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
    """E2, one launch over all classes, into fp16."""

    def __init__(self, family: str, operands: Operands):
        self.operands, self.family = operands, operands.run.family(family)
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
    """W·Wᵀ, whole, into memory that the next rows overwrite."""

    def __init__(self, operands: Operands):
        self.operands, (_, right) = operands, operands.of(0)
        self.out = right.new_empty(min(CUBLAS_ROWS, len(right)), len(right))

    def __call__(self, turn: int) -> None:
        _, right = self.operands.of(turn)
        for rows in right.split(CUBLAS_ROWS):
            torch.mm(rows, right.t(), out=self.out[: len(rows)])

    def errors(self) -> dict[str, float]:
        return {}


def shortfall(rows: Tensor, index: Tensor) -> float:
    """How far the cosine to the class that was found is below that to the nearest one, at worst. rows: unit, float64."""
    worst = []
    for begin in range(0, len(rows), EXACT_ROWS):
        cosine = rows[begin : begin + EXACT_ROWS] @ rows.t()
        cosine.diagonal(begin).fill_(-math.inf)
        found = cosine.gather(1, index[begin : begin + EXACT_ROWS, None])
        worst.append((cosine.max(dim=1).values - found[:, 0]).max())
    return float(torch.stack(worst).max())


class Nearest:
    """E3, one launch over the upper triangle of all classes."""

    def __init__(self, family: str, operands: Operands):
        self.operands, self.family = operands, operands.run.family(family)
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
    """The public function, from fp32 weights: norms, operands, chunks and cosines are in its time."""

    def __init__(self, way: str, inputs: Inputs):
        self.way, self.weight = way, inputs.weight.detach()

    def __call__(self, turn: int) -> fm.functional.NearestClass:
        with select.use(self.way):
            return fm.functional.nearest_class(self.weight)

    def errors(self) -> dict[str, float]:
        return {"cosine": shortfall(F.normalize(self.weight.double()), self(0).index)}


class ForwardCall:
    """The public loss without a gradient, from fp32 inputs: norms, operands, chunks, margin and mean are in its time."""

    def __init__(self, way: str, inputs: Inputs):
        self.loss = half.our_loss(way, fm.Margin(m2=MARGIN))
        self.inputs = inputs

    def __call__(self, turn: int) -> Tensor:
        batch = turn % len(self.inputs.embeddings)
        with torch.no_grad():
            return self.loss(self.inputs.embeddings[batch], self.inputs.weight, self.inputs.labels[batch])

    def errors(self) -> dict[str, float]:
        exact = truth("arcface", self.inputs.embeddings[0], self.inputs.weight, self.inputs.labels[0])
        return {"loss": relative_error(self(0), exact.loss)}


def peak_bytes(step: Step, device: str) -> int | None:
    """Peak memory of a step or call of ours or a peer's above inputs, weight and their gradients, as memory.py has it."""
    if device != "cuda" or type(step) not in (LossStep, ForwardCall, NearestCall):
        return None
    if isinstance(step, LossStep):
        step.touch_gradients()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for turn in range(2):
        step(turn)
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before)


def _machine(shape: Shape, copied: int) -> list[Contestant]:
    """What the machine reaches; a copy reads and writes."""
    operations = 2 * shape.rows * shape.dim * shape.classes
    return [
        Contestant(COPY, "products", {f"{copied:,} bytes": partial(Copy, copied)}, COPY, work=2 * copied),
        Contestant(SQUARE, "products", {str(shape): SquareMatrices}, SQUARE, work=operations),
    ]


def _calls(kind: Callable, variant: str, ways: Sequence[str], **tolerance: float) -> list[Contestant]:
    return [Contestant(ours(way, CALL), "kernel", {variant: partial(kind, way)}, CUBLAS, **tolerance) for way in ways]


def _kernel(kind: Callable, product: Callable, families: Sequence[str], tolerance: float) -> list[Contestant]:
    operands: list[Operands] = []  # shared, made for the first

    def of(inputs: Inputs) -> Operands:
        if not operands:
            operands.append(Operands(inputs))
        return operands[0]

    contestants = [Contestant(CUBLAS, "products", {"torch.mm": lambda inputs: product(of(inputs))}, CUBLAS)]
    for family in families:
        variants = {"one launch": lambda inputs, family=family: kind(family, of(inputs))}
        contestants.append(Contestant(ours(family), "kernel", variants, CUBLAS, tolerance=tolerance))
    return contestants


def comparisons(families: Sequence[str], *, quick: bool = False) -> Iterator[Comparison]:
    """Everything there is to compare, small things first."""
    step, classes, large, small = STEP, CLASSES, LARGE, SMALL
    square, copied = SQUARE_SHAPE, COPIED_BYTES
    if quick:
        square, copied = Shape(256, 256, 256), 2**20
        step, classes, large = Shape(200, 128, 3_000), Shape(8, 128, 3_000), (Shape(200, 128, 20_000),)
        small = Shape(32, 64, 2_000)
    ways = [*families, select.PORTABLE]
    yield Comparison(MACHINE, square, _machine(square, copied))

    sums = _kernel(ExponentSum, Product, families, tolerance=1e-6)
    calls = _calls(ForwardCall, "margin_cross_entropy()", ways, loss_tolerance=1e-4)
    yield Comparison(EXPONENT_SUM, step, sums + calls)
    yield Comparison(PROBABILITIES, step, _kernel(Probabilities, Product, families, tolerance=5e-4))

    calls = _calls(NearestCall, "nearest_class()", ways, tolerance=2e-4)
    yield Comparison(NEAREST, classes, _kernel(Nearest, SquareProduct, families, tolerance=1e-5) + calls)

    reference = ours(ways[0])
    exact = [f"{family} {select.SPLIT}" for family in families]
    everyone = half.our_steps([*ways, *exact], normface=True) + half.products(reference) + half.eager(reference)
    everyone += half.compilations(reference) + half.normface_peers(step, ours(ways[0], half.NORMFACE))
    yield Comparison(HALF_STEP, step, everyone)

    arcface = fm.Margin(m2=MARGIN)
    graphs = [
        Contestant(
            ours(way, half.GRAPH), "arcface", {"one graph": partial(half.GraphStep, half.our_loss(way, arcface))},
            reference, loss_tolerance=1e-4,
        )
        for way in ways
    ]  # fmt: skip
    plain = [each for each in half.our_steps(ways) if half.NOTHING_KEPT not in each.name]
    yield Comparison(LAUNCH_BOUND, small, plain + graphs + half.eager(reference) + half.compilations(reference)[:1])

    for shape in large:
        yield Comparison(HALF_STEP, shape, half.our_steps(ways) + half.products(reference) + half.eager(reference))
