"""Comparisons of the tensor-core kernels and half-precision steps with cuBLAS and with peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import fused_margin as fm
from fused_margin._ops.backends import select
from fused_margin._ops.backends.select import has_cuda_kernels
from fused_margin.benchmark.contestants import Contestant
from fused_margin.benchmark.problems import MARGIN, Inputs, Shape
from fused_margin.benchmark.timing import Step

from ..common import steps as shared
from ..common.steps import LossStep
from . import half, names
from .names import CUBLAS, ours
from .steps import (
    Copy,
    ExponentSum,
    ForwardCall,
    Nearest,
    NearestCall,
    Operands,
    Probabilities,
    Product,
    SquareMatrices,
    SquareProduct,
)

COPIED_BYTES = 2**30


@dataclass(frozen=True)
class Comparison:
    """One section of the report."""

    suite: str
    shape: Shape
    contestants: list[Contestant]


def missing(device: str) -> str | None:
    """The reason why this suite cannot run; None if it can."""
    if device != "cuda":
        return "The kernels suite measures a GPU: it needs --device cuda."
    if not torch.cuda.is_available():
        return "The kernels suite needs a GPU, and torch finds none."
    return None if has_cuda_kernels() else "The kernels suite needs a build with CUDA: CUDA_HOME, or nvcc on PATH."


def available_families() -> list[str]:
    """Compiled families that run on the current device, in the order of select.py."""
    capability = torch.cuda.get_device_capability()
    return [f.name for f in select.FAMILIES if f.compiled and f.runs_on(capability)]


def peak_bytes(step: Step, device: str) -> int | None:
    """Peak memory of a step or of a public call, in this process; None for bare kernels, products and graphs."""
    if device != "cuda" or type(step) not in (LossStep, ForwardCall, NearestCall):
        return None
    return shared.peak_bytes(step, device)


def _machine(shape: Shape, copied: int) -> list[Contestant]:
    """Speeds of the machine. A copy both reads and writes."""
    operations = 2 * shape.rows * shape.dim * shape.classes
    return [
        Contestant(names.COPY, "products", {f"{copied:,} bytes": partial(Copy, copied)}, names.COPY, work=2 * copied),
        Contestant(names.SQUARE, "products", {str(shape): SquareMatrices}, names.SQUARE, work=operations),
    ]


def _calls(kind: Callable, variant: str, backends: Sequence[str], **tolerance: float) -> list[Contestant]:
    return [
        Contestant(ours(backend, names.CALL), "kernel", {variant: partial(kind, backend)}, CUBLAS, **tolerance)
        for backend in backends
    ]


def _kernel(kind: Callable, product: Callable, families: Sequence[str], tolerance: float) -> list[Contestant]:
    operands: list[Operands] = []  # created by the first contestant, shared by all

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
    """All comparisons, the small ones first."""
    step, classes, large, small = names.STEP, names.CLASSES, names.LARGE, names.SMALL
    square, copied = names.SQUARE_SHAPE, COPIED_BYTES
    if quick:
        square, copied = Shape(256, 256, 256), 2**20
        step, classes, large = Shape(200, 128, 3_000), Shape(8, 128, 3_000), (Shape(200, 128, 20_000),)
        small = Shape(32, 64, 2_000)
    backends = [*families, select.PORTABLE]
    yield Comparison(names.MACHINE, square, _machine(square, copied))

    sums = _kernel(ExponentSum, Product, families, tolerance=1e-6)
    calls = _calls(ForwardCall, "margin_cross_entropy()", backends, loss_tolerance=1e-4)
    yield Comparison(names.EXPONENT_SUM, step, sums + calls)
    yield Comparison(names.PROBABILITIES, step, _kernel(Probabilities, Product, families, tolerance=5e-4))

    calls = _calls(NearestCall, "nearest_class()", backends, tolerance=2e-4)
    yield Comparison(names.NEAREST, classes, _kernel(Nearest, SquareProduct, families, tolerance=1e-5) + calls)

    reference = ours(backends[0])
    exact = [f"{family} {select.SPLIT}" for family in families]
    steps = half.our_steps([*backends, *exact], normface=True) + half.products(reference) + half.eager(reference)
    steps += half.compilations(reference) + half.normface_peers(step, ours(backends[0], names.NORMFACE))
    yield Comparison(names.HALF_STEP, step, steps)

    arcface = fm.Margin(m2=MARGIN)
    graphs = [
        Contestant(
            ours(backend, names.GRAPH), "arcface", {"one graph": partial(half.GraphStep, half.our_loss(backend, arcface))},
            reference, loss_tolerance=1e-4,
        )
        for backend in backends
    ]  # fmt: skip
    plain = [each for each in half.our_steps(backends) if names.NOTHING_KEPT not in each.name]
    yield Comparison(
        names.LAUNCH_BOUND, small, plain + graphs + half.eager(reference) + half.compilations(reference)[:1]
    )

    for shape in large:
        yield Comparison(
            names.HALF_STEP, shape, half.our_steps(backends) + half.products(reference) + half.eager(reference)
        )
