"""Margins: the formula psi(theta) = cos(m1 * theta + m2) - m3, hard negatives, and the smallest useful scale."""

import math
import sys
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_margin import _checks
from fused_margin._checks import is_number

BEYOND_PI = ("monotone", "linear", "none")
GRADIENT = ("exact", "straight_through")


def warn(message: str) -> None:
    """A warning that names the caller's line: the first one outside this package and torch.nn."""
    level = 2
    frame = sys._getframe(1)
    while frame.f_back is not None and f"{frame.f_globals.get('__name__')}.".startswith(("fused_margin.", "torch.nn.")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def warn_of_degrees(name: str, value: float) -> None:
    if abs(value) > math.pi:
        warn(
            f"{name} {value:g} is an angle above pi: margins are in radians "
            f"({value:g} degrees are {math.radians(value):.4g} radians)"
        )


def minimum_scale(num_classes: int, probability: float) -> float:
    """Smallest scale at which a sample can reach `probability` for its class (CosFace, arXiv:1801.09414, eq. 6).

    ``s >= (C - 1) / C * log((C - 1) * P / (1 - P))``, with the C class weights as far apart as C vectors can be.

    Args:
        num_classes: C, 2 or more.
        probability: P, between 1 / C and 1.

    Raises:
        ValueError: for numbers out of range.
    """
    if not num_classes >= 2:
        raise ValueError(f"num_classes: expected 2 or more, got {num_classes}")
    if not 1 / num_classes <= probability < 1:
        raise ValueError(f"probability: expected a number in [1 / num_classes, 1), got {probability}")
    others = num_classes - 1
    return others / num_classes * math.log(others * probability / (1 - probability))


# The combined margins of the ArcFace paper (arXiv:1801.07698, table 2), as CombinedMarginLoss takes them.
CM1 = {"m1": 1.0, "m2": 0.3, "m3": 0.2}
CM2 = {"m1": 0.9, "m2": 0.4, "m3": 0.15}


@dataclass(frozen=True)
class HardNegatives:
    """Other classes nearer than ``threshold`` weigh more: their cosine becomes ``cos * (strength + cos)``.

    (CurricularFace, arXiv:2004.00288, eq. 6.) No gradient flows to either number.

    Args:
        threshold: (N,) tensor, cosine: the target's own after its margin, in the paper.
        strength: t of the paper, a number or a tensor with one element.
    """

    threshold: Tensor
    strength: float | Tensor


@dataclass(frozen=True)
class FilteredNegatives:
    """Other classes whose cosine is above ``threshold`` count as if it were 0, and have no gradient.

    (InsightFace's ``interclass_filtering_threshold``, for noisy labels: a class so near may be the same person.)

    Args:
        threshold: a number in (0, 1]; no cosine is above 1.
    """

    threshold: float


@dataclass(frozen=True)
class Margin:
    """The margin applied to the target's angle: ``psi(theta) = cos(m1 * theta + m2) - m3``.

    Each of ``m1``, ``m2``, ``m3`` and ``annealing`` is a number or an ``(N,)`` tensor, one value per sample;
    tensors are differentiable.

    Args:
        m1: factor on the angle (SphereFace, arXiv:1704.08063, eq. 7). Default 1.
        m2: angle added, in radians (ArcFace, arXiv:1801.07698, eq. 3). Default 0.
        m3: cosine subtracted (CosFace, arXiv:1801.09414, eq. 4). Default 0.
        beyond_pi: what psi is where ``phi = m1 * theta + m2`` passes pi. ``"monotone"`` continues it as SphereFace
            does, ``(-1)^k cos(phi) - 2k - m3`` with ``k = floor(phi / pi)``; ``"linear"`` is ArcFace's published
            fallback ``cos(theta) - m2 * sin(m2)``; ``"none"`` stays with ``cos(phi) - m3``.
        easy: apply the margin only where ``cos(theta) > 0``.
        gradient: ``"exact"``, with the limit where theta is 0 or pi; where there is none (``m2 > 0`` at theta = 0)
            sin(theta) is held at the square root of the dtype's epsilon (float32: 3.5e-4). ``"straight_through"`` takes dpsi/dcos = 1, as InsightFace trains.
        annealing: SphereFace's lambda: the target cosine used is ``(annealing * cos(theta) + psi) / (1 + annealing)``.

    Raises:
        ValueError: for a number that is NaN, infinite or (m1, annealing) out of range, or an unknown mode.
        TypeError: for a margin that is neither a number nor a tensor.
    """

    m1: float | Tensor = 1.0
    m2: float | Tensor = 0.0
    m3: float | Tensor = 0.0
    beyond_pi: str = "monotone"
    easy: bool = False
    gradient: str = "exact"
    annealing: float | Tensor = 0.0

    def __post_init__(self) -> None:
        _checks.margin_numbers(self)
        _checks.one_of("beyond_pi", self.beyond_pi, BEYOND_PI)
        _checks.one_of("gradient", self.gradient, GRADIENT)
        if is_number(self.m2) and abs(self.m2) > math.pi and not torch.compiler.is_compiling():
            maker = sys._getframe(2).f_globals.get("__name__", "")  # frame 1 is the generated __init__
            if maker.partition(".")[0] != "fused_margin":  # a loss has warned when its margin was set
                warn_of_degrees("m2", self.m2)


def psi(cosine: Tensor, margin: Margin) -> Tensor:
    """The target cosine (N,) after a margin, without annealing; any dtype, gradients by autograd.

    Args:
        cosine: (N,) cosines to the targets.
        margin: with numbers, or (N,) tensors.
    """
    cosine = cosine.clamp(-1.0, 1.0)
    phi = margin.m1 * torch.acos(cosine) + margin.m2
    value = torch.cos(phi) - margin.m3
    if margin.beyond_pi == "monotone":
        half_turns = torch.floor(phi.detach() / math.pi)
        value = (1 - 2 * (half_turns % 2)) * torch.cos(phi) - 2 * half_turns - margin.m3
    elif margin.beyond_pi == "linear":
        m2 = torch.as_tensor(margin.m2, dtype=cosine.dtype)
        value = torch.where(phi > math.pi, cosine - m2 * torch.sin(m2), value)
    if margin.easy:
        value = torch.where(cosine > 0, value, cosine)
    if margin.gradient == "straight_through":
        value = value.detach() + cosine - cosine.detach()
    return value
