"""What we expected of the kernels before any of them had run on a device; the tables show it beside what was measured.

Source: the compiled machine code of sm90 and the sizes of the operands, for an H100 SXM with 132 multiprocessors. The
exponent sum takes 2,084 tiles in 31.6 of 32 rounds, 6,144 cycles a tile, its epilogue hidden behind the products. The
forward call adds the norms and the packing of the weights, 307 MB through memory, at least 102 µs. The step adds the
backward and the projection of the weight gradient, at least 205 µs. The nearest class multiplies the upper triangle of
C×C alone, 5.1 TFLOP where the whole square takes 10.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import half, kernels
from .half import ours
from .problems import Shape
from .timing import duration

FAMILY = "sm90"


@dataclass(frozen=True)
class Prediction:
    suite: str
    shape: Shape
    contestant: str
    seconds: tuple[float, float]  # from, to
    reference: str | None = None
    ratio: float | None = None  # time of the reference over ours

    @property
    def text(self) -> str:
        low, high = self.seconds
        time = duration(high) if low == high else f"{duration(low).split()[0]} to {duration(high)}"
        return time if self.ratio is None else f"{time}, {self.ratio:g}×"


PREDICTIONS = (
    Prediction(kernels.EXPONENT_SUM, kernels.STEP, ours(FAMILY), (135e-6, 150e-6), kernels.CUBLAS, 1.0),
    Prediction(kernels.EXPONENT_SUM, kernels.STEP, ours(FAMILY, kernels.CALL), (280e-6, 310e-6)),
    Prediction(kernels.HALF_STEP, kernels.STEP, ours(FAMILY), (1.2e-3, 1.2e-3), half.FOUR, 0.55),
    Prediction(kernels.NEAREST, kernels.CLASSES, ours(FAMILY), (6.5e-3, 7.5e-3), kernels.CUBLAS, 2.0),
)


def made_for(gpu: str | None) -> bool:
    """Whether the predictions are about a GPU of that name; an H100 PCIe or NVL has other clocks or multiprocessors."""
    return "H100" in (gpu or "") and not any(form in gpu for form in ("PCIe", "NVL"))


def predicted(gpu: str | None, suite: str, shape: Shape, contestant: str) -> Prediction | None:
    """The prediction for that contestant on that device and problem, if there is one."""
    if not made_for(gpu):
        return None
    wanted = (suite, shape, contestant)
    return next((each for each in PREDICTIONS if (each.suite, each.shape, each.contestant) == wanted), None)
