"""Times of the kernels that were predicted before the first run on a device; tables show them beside the measured ones.

They follow from the compiled machine code of sm90 and the sizes of the operands, for an H100 SXM with 132
multiprocessors. The exponent sum computes 2,084 tiles in 31.6 of 32 rounds, with 6,144 cycles per tile; its epilogue
overlaps with the products. The forward call adds the norms and the packing of the weights: 307 MB of memory traffic, at
least 102 µs. The step adds the backward and the projection of the weight gradient, at least 205 µs. The nearest class
computes only the upper triangle of C×C, 5.1 TFLOP instead of 10.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from fused_margin.benchmark.problems import Shape
from fused_margin.benchmark.timing import duration

from . import names
from .names import ours

FAMILY = "sm90"


@dataclass(frozen=True)
class Prediction:
    suite: str
    shape: Shape
    contestant: str
    seconds: tuple[float, float]  # lower and upper end
    reference: str | None = None
    ratio: float | None = None  # time of the reference over ours

    @property
    def text(self) -> str:
        low, high = self.seconds
        time = duration(high) if low == high else f"{duration(low).split()[0]} to {duration(high)}"
        return time if self.ratio is None else f"{time}, {self.ratio:g}×"


PREDICTIONS = (
    Prediction(names.EXPONENT_SUM, names.STEP, ours(FAMILY), (135e-6, 150e-6), names.CUBLAS, 1.0),
    Prediction(names.EXPONENT_SUM, names.STEP, ours(FAMILY, names.CALL), (280e-6, 310e-6)),
    Prediction(names.HALF_STEP, names.STEP, ours(FAMILY), (1.2e-3, 1.2e-3), names.FOUR, 0.55),
    Prediction(names.NEAREST, names.CLASSES, ours(FAMILY), (6.5e-3, 7.5e-3), names.CUBLAS, 2.0),
)


def made_for(gpu: str | None) -> bool:
    """Whether the predictions apply to a GPU. An H100 PCIe or NVL has other clocks or fewer multiprocessors."""
    return "H100" in (gpu or "") and not any(form in gpu for form in ("PCIe", "NVL"))


def predicted(gpu: str | None, suite: str, shape: Shape, contestant: str) -> Prediction | None:
    """The prediction for a contestant on a device and problem; None if there is none."""
    if not made_for(gpu):
        return None
    wanted = (suite, shape, contestant)
    return next((each for each in PREDICTIONS if (each.suite, each.shape, each.contestant) == wanted), None)
