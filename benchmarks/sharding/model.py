"""The model of docs/results/scaling.md: the cost of a step with classes divided among ranks, from two speeds of a device."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass

from ..kernels import names
from ..kernels.device_result import DeviceResult, median
from ..kernels.names import ours

SAMPLES, SIZE = 128, 512  # b per rank, and D
CLASSES, RANKS = (10**6, 10**7, 10**8), (8, 64, 1024)
WORKSPACE_BYTES = 256 * 2**20
NEAR_RANKS, NEAR_LINK, FAR_LINK = 8, 450e9, 50e9  # bytes per second
WIDTH = 125  # of the lines of text


@dataclass(frozen=True)
class Speeds:
    products: float  # operations per second
    memory: float  # bytes per second
    source: str  # sentences that name the origin of both


ASSUMED_PRODUCTS, ASSUMED_MEMORY = 400e12, 4.8e12
ASSUMED = Speeds(
    ASSUMED_PRODUCTS,
    ASSUMED_MEMORY,
    "No result of a GPU is committed yet, so both speeds are assumptions: products at "
    "400 TFLOP/s (40 % of an H200's dense fp16 peak of 989, NVIDIA's data sheet), memory at its 4.8 TB/s.",
)


@dataclass(frozen=True)
class Step:
    """One step of `ranks` ranks. Times in seconds; docs/results/scaling.md explains every amount."""

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
        """Embeddings and their gradients, without the few numbers per sample."""
        return 6 * self.samples * SIZE / (NEAR_LINK if self.ranks <= NEAR_RANKS else FAR_LINK)

    @property
    def samples_per_second(self) -> float:
        return self.samples / (self.products + self.weights + self.messages)


def equal_ranks(classes: int, speeds: Speeds) -> float:
    """Number of ranks at which products and messages take the same time."""
    return 8 * classes * FAR_LINK / (6 * speeds.products)


def speeds_of(result: DeviceResult | None) -> Speeds:
    """Measured speeds if the result has them, else assumed ones.

    A result has no separate time of the products within our step, so their rate is that of the four bare products.
    """
    if result is None:
        return ASSUMED
    shape = names.STEP
    section = result.section(names.HALF_STEP, shape)
    operations = 8 * shape.rows * shape.dim * shape.classes
    four, step = median(section, names.FOUR), median(section, ours(result.backend))
    copy = result.section(names.MACHINE).find(names.COPY)
    products = operations / four if four else ASSUMED_PRODUCTS
    memory = copy.rate if copy and copy.rate else ASSUMED_MEMORY
    source = f"products at {products / 1e12:.0f} TFLOP/s, "
    if four:
        source += f"measured as the rate of the four bare products of a step by cuBLAS (fp16, {shape.label}"
        source += (
            f"; our step, with all other work included, runs at {operations / step / 1e12:.0f}), " if step else "), "
        )
    else:
        source += "assumed, "
    source += f"memory at {memory / 1e12:.1f} TB/s, "
    source += "measured as bytes read and written by a copy on the device." if copy and copy.rate else "assumed."
    return Speeds(products, memory, f"On {result.gpu} (`{result.file}`): {source}")


def two_digits(value: float) -> str:
    """Rounded to two digits; a million or more as 4.4M."""
    rounded = round(value, 1 - math.floor(math.log10(value)))
    if rounded < 1e6:
        return f"{rounded:,.0f}"
    return f"{rounded / 1e6:.1f}M" if rounded < 1e7 else f"{rounded / 1e6:.0f}M"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _millions(classes: int) -> str:
    return f"{classes // 10**6}M"


def times(speeds: Speeds) -> str:
    """The block `model times` of docs/results/scaling.md: a paragraph and a table."""
    text = (
        f"b = {SAMPLES}, D = {SIZE}. {speeds.source} Links, assumed: {NEAR_LINK / 1e9:.0f} GB/s within {NEAR_RANKS} GPUs "
        f"(NVLink, one direction) and {FAR_LINK / 1e9:.0f} GB/s beyond (one 400 Gb/s adapter per GPU). The time is the sum of "
        "all parts, without overlap and without the backbone."
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
    """The block `model limit` of docs/results/scaling.md: one sentence."""
    first, *rest = [(two_digits(equal_ranks(classes, speeds)), _millions(classes)) for classes in CLASSES]
    others = "".join(f", {ranks} for {classes}" for ranks, classes in rest)
    return f"**Limit.** Products and messages take the same time at W ≈ {first[0]} for {first[1]} classes{others}."
