"""The model of docs/scaling.md: what a step costs where classes are divided among ranks, from two speeds of a device."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass

from . import half, kernels
from .device_result import DeviceResult, median
from .half import ours

SAMPLES, SIZE = 128, 512  # b of a rank, and D
CLASSES, RANKS = (10**6, 10**7, 10**8), (8, 64, 1024)
WORKSPACE_BYTES = 256 * 2**20
NEAR_RANKS, NEAR_LINK, FAR_LINK = 8, 450e9, 50e9  # bytes a second
WIDTH = 125  # of the lines of text


@dataclass(frozen=True)
class Speeds:
    products: float  # operations a second
    memory: float  # bytes a second
    source: str  # sentences that say where the two are from


ASSUMED_PRODUCTS, ASSUMED_MEMORY = 400e12, 4.8e12
ASSUMED = Speeds(
    ASSUMED_PRODUCTS,
    ASSUMED_MEMORY,
    "No device result is committed yet, so the two speeds are assumptions, to be replaced by measured ones: products at "
    "400 TFLOP/s (40 % of an H200's dense fp16 peak of 989, NVIDIA's data sheet), memory at its 4.8 TB/s.",
)


@dataclass(frozen=True)
class Step:
    """One step of `ranks` ranks; seconds but for the memory. The rows of docs/scaling.md say why each amount is what it is."""

    classes: int
    ranks: int
    speeds: Speeds

    @property
    def samples(self) -> int:
        return SAMPLES * self.ranks

    @property
    def memory_bytes(self) -> float:
        return 3 * 4 * self.classes * SIZE / self.ranks + WORKSPACE_BYTES + 14 * self.samples * SIZE

    @property
    def products(self) -> float:
        multiply_adds = 4 * self.samples * SIZE * self.classes / self.ranks
        return 2 * multiply_adds / self.speeds.products

    @property
    def weights(self) -> float:
        return 8 * 4 * self.classes * SIZE / self.ranks / self.speeds.memory

    @property
    def messages(self) -> float:
        """Embeddings and their gradients; the few numbers a sample beside them are left out."""
        return 6 * self.samples * SIZE / (NEAR_LINK if self.ranks <= NEAR_RANKS else FAR_LINK)

    @property
    def samples_per_second(self) -> float:
        return self.samples / (self.products + self.weights + self.messages)


def equal_ranks(classes: int, speeds: Speeds) -> float:
    """Ranks at which products and messages take equally long."""
    return 8 * classes * FAR_LINK / (6 * speeds.products)


def speeds_of(result: DeviceResult | None) -> Speeds:
    """Measured where the result has them, else assumed.

    A result does not tell the products of our step from the rest of it, so the rate is that of the four products alone.
    """
    if result is None:
        return ASSUMED
    shape = kernels.STEP
    section = result.section(kernels.HALF_STEP, shape)
    operations = 8 * shape.rows * shape.dim * shape.classes
    four, step = median(section, half.FOUR), median(section, ours(result.backend))
    copy = result.section(kernels.MACHINE).find(kernels.COPY)
    products = operations / four if four else ASSUMED_PRODUCTS
    memory = copy.rate if copy and copy.rate else ASSUMED_MEMORY
    said = f"products at {products / 1e12:.0f} TFLOP/s, "
    if four:
        said += f"measured as the rate of the four bare products of a step by cuBLAS (fp16, {shape.label}"
        said += f"; our whole step, everything included, runs at {operations / step / 1e12:.0f}), " if step else "), "
    else:
        said += "assumed, "
    said += f"memory at {memory / 1e12:.1f} TB/s, "
    said += "measured as bytes read and written by a copy on the device." if copy and copy.rate else "assumed."
    return Speeds(products, memory, f"On {result.gpu} (`{result.file}`): {said}")


def two_digits(value: float) -> str:
    """Rounded to two digits; from a million as 4.4M."""
    rounded = round(value, 1 - math.floor(math.log10(value)))
    if rounded < 1e6:
        return f"{rounded:,.0f}"
    return f"{rounded / 1e6:.1f}M" if rounded < 1e7 else f"{rounded / 1e6:.0f}M"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _millions(classes: int) -> str:
    return f"{classes // 10**6}M"


def times(speeds: Speeds) -> str:
    """Text and table between the markers of docs/scaling.md."""
    text = (
        f"b = {SAMPLES}, D = {SIZE}. {speeds.source} Links, assumed: {NEAR_LINK / 1e9:.0f} GB/s within {NEAR_RANKS} GPUs "
        f"(NVLink, one direction) and {FAR_LINK / 1e9:.0f} GB/s beyond (a 400 Gb/s adapter a GPU). Time is the sum of all, "
        "with nothing overlapped; the backbone is not in it."
    )
    lines = [
        textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False),
        "",
        "| C | W | memory, GB | products, ms | weights, ms | messages, ms | samples/s, loss alone |",
        "|---|---|---|---|---|---|---|",
    ]
    for classes in CLASSES:
        for ranks in RANKS:
            step = Step(classes, ranks, speeds)
            cells = [_millions(classes), f"{ranks:,}", _short(step.memory_bytes / 1e9)]
            cells += [_short(1e3 * part) for part in (step.products, step.weights, step.messages)]
            lines.append(f"| {' | '.join([*cells, two_digits(step.samples_per_second)])} |")
    return "\n".join(lines)


def limit(speeds: Speeds) -> str:
    """The sentence between the other markers."""
    first, *rest = [(two_digits(equal_ranks(classes, speeds)), _millions(classes)) for classes in CLASSES]
    others = "".join(f", {ranks} for {classes}" for ranks, classes in rest)
    return (
        f"**Where it stops.** Products and messages take equally long at W ≈ {first[0]} for {first[1]} classes{others}."
    )
