"""Margins: the formula psi(theta) = cos(m1 * theta + m2) - m3, hard negatives, and the smallest useful scale."""

import math
import sys
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_margin import _checks
from fused_margin._checks import is_number

__all__ = ["CM1", "CM2", "FilteredNegatives", "HardNegatives", "Margin", "minimum_scale", "psi"]

BEYOND_PI = ("monotone", "linear", "none")
GRADIENT = ("exact", "straight_through")


def warn(message: str) -> None:
    """Warns at the line of the caller: the first frame outside this package and torch.nn."""
    level = 2
    frame = sys._getframe(1)
    while frame.f_back is not None and f"{frame.f_globals.get('__name__')}.".startswith(("fused_margin.", "torch.nn.")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def warn_of_degrees(name: str, value: float) -> None:
    """Warns of a margin above pi, which is probably in degrees."""
    if abs(value) > math.pi:
        warn(
            f"{name} {value:g} is larger than pi in magnitude: margins are in radians "
            f"({value:g} degrees are {math.radians(value):.4g} radians)"
        )


def minimum_scale(num_classes: int, probability: float) -> float:
    """Smallest scale at which a sample can reach a probability for its class.

    ``s >= (C - 1) / C * log((C - 1) * P / (1 - P))`` (CosFace, arXiv:1801.09414, eq. 6), with the C class weights as
    far apart as C vectors can be.

    Args:
        num_classes: C, 2 or more.
        probability: P, between 1 / C and 1.

    Returns:
        The scale.

    Raises:
        ValueError: for numbers out of range.

    Examples:
        >>> from fused_margin.margins import minimum_scale
        >>> round(minimum_scale(num_classes=100_000, probability=0.9), 2)
        13.71
    """
    if not num_classes >= 2:
        raise ValueError(f"num_classes: expected 2 or more, got {num_classes}")
    if not 1 / num_classes <= probability < 1:
        raise ValueError(f"probability: expected a number in [1 / num_classes, 1), got {probability}")
    others = num_classes - 1
    return others / num_classes * math.log(others * probability / (1 - probability))


#: The combined margin CM1 of the ArcFace paper, as arguments of :class:`fused_margin.CombinedMarginLoss`. It is the default
#: there (arXiv:1801.07698, table 2).
CM1 = {"m1": 1.0, "m2": 0.3, "m3": 0.2}
#: The combined margin CM2 of the same table.
CM2 = {"m1": 0.9, "m2": 0.4, "m3": 0.15}


@dataclass(frozen=True)
class HardNegatives:
    """Weights hard negatives, as CurricularFace does.

    A cosine above ``threshold`` to another class becomes ``cos * (strength + cos)`` (arXiv:2004.00288, eq. 6). No
    gradient flows to ``threshold`` or ``strength``.

    Args:
        threshold: (N,) tensor of cosines. In the paper it is the target's cosine after the margin.
        strength: t of the paper, a number or a tensor with one element.

    Examples:
        >>> import torch, fused_margin.functional as F
        >>> from fused_margin.margins import HardNegatives
        >>> embeddings, weight, labels = torch.ones(1, 2), torch.eye(2), torch.tensor([0])
        >>> hard = HardNegatives(threshold=torch.tensor([0.5]), strength=1.0)
        >>> loss = F.margin_cross_entropy(embeddings, weight, labels, scale=4.0, hard_negatives=hard)
        >>> round(loss.item(), 4)  # cosines 0.7071 and 0.7071 (1 + 0.7071): log(1 + exp(4 * 0.5))
        2.1269
    """

    threshold: Tensor
    strength: float | Tensor


@dataclass(frozen=True)
class FilteredNegatives:
    """Filters hard negatives, for noisy labels: a very similar class may be the same identity.

    A cosine above ``threshold`` to another class becomes 0, without a gradient. It is InsightFace's
    ``interclass_filtering_threshold``.

    Args:
        threshold: cosine, a number in (0, 1]. 1 filters nothing.

    Examples:
        >>> import torch, fused_margin.functional as F
        >>> from fused_margin.margins import FilteredNegatives
        >>> embeddings, weight, labels = torch.ones(1, 2), torch.eye(2), torch.tensor([0])
        >>> similar = FilteredNegatives(threshold=0.5)
        >>> loss = F.margin_cross_entropy(embeddings, weight, labels, scale=4.0, hard_negatives=similar)
        >>> round(loss.item(), 4)  # cosines 0.7071 and 0: log(1 + exp(-4 * 0.7071))
        0.0574
    """

    threshold: float


@dataclass(frozen=True)
class Margin:
    """The margin on the angle of a sample to its own class.

    ``psi(theta) = cos(m1 * theta + m2) - m3`` replaces the cosine of that angle (arXiv:1801.07698, eq. 4).
    Each of ``m1``, ``m2``, ``m3`` and ``annealing`` is a number or an ``(N,)`` tensor with one value per sample.
    Tensors are differentiable.

    Args:
        m1: factor on the angle (SphereFace, arXiv:1704.08063, eq. 7). Default 1.
        m2: angle added, in radians (ArcFace, arXiv:1801.07698, eq. 3). Default 0.
        m3: cosine subtracted (CosFace, arXiv:1801.09414, eq. 4). Default 0.
        beyond_pi: definition of psi where ``phi = m1 * theta + m2`` exceeds pi. ``"monotone"``: SphereFace's
            continuation, ``(-1)^k cos(phi) - 2k - m3`` with ``k = floor(phi / pi)``. ``"linear"``: ArcFace's published
            fallback, ``cos(theta) - m2 * sin(m2)``. ``"none"``: ``cos(phi) - m3``.
        easy: apply the margin only where ``cos(theta) > 0``.
        gradient: ``"exact"``: the derivative of psi, and its limit where theta is 0 or pi. Where the limit is infinite
            (``m2 > 0`` at theta = 0), sin(theta) is bounded below by the square root of the dtype's epsilon (float32:
            3.5e-4). ``"straight_through"``: dpsi/dcos = 1, as in InsightFace.
        annealing: lambda of SphereFace: the target cosine is ``(annealing * cos(theta) + psi) / (1 + annealing)``.

    Raises:
        ValueError: for a number that is NaN, infinite or out of range (``m1``, ``annealing``), or an unknown mode.
        TypeError: for a value that is neither a number nor a tensor.

    Examples:
        >>> import torch, fused_margin
        >>> fused_margin.Margin(m2=0.5)  # ArcFace
        Margin(m1=1.0, m2=0.5, m3=0.0, beyond_pi='monotone', easy=False, gradient='exact', annealing=0.0)
        >>> per_sample = fused_margin.Margin(m3=torch.tensor([0.2, 0.4]))  # CosFace, one margin per sample
        >>> fused_margin.margins.psi(torch.tensor([0.9, 0.9]), per_sample)
        tensor([0.7000, 0.5000])
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
            caller = sys._getframe(2).f_globals.get("__name__", "")  # frame 1 is the generated __init__
            if caller.partition(".")[0] != "fused_margin":  # a loss warns when its margin is set
                warn_of_degrees("m2", self.m2)


def psi(cosine: Tensor, margin: Margin) -> Tensor:
    """The target cosine after a margin, without annealing.

    It is computed by torch in the dtype of ``cosine``, and autograd differentiates it.

    Args:
        cosine: (N,) cosines to the targets.
        margin: a margin of numbers or (N,) tensors.

    Returns:
        (N,), in the dtype of ``cosine``.

    Examples:
        >>> import torch, fused_margin
        >>> from fused_margin.margins import psi
        >>> psi(torch.tensor([1.0, 0.0]), fused_margin.Margin(m2=0.5))  # cos(0.5), cos(pi / 2 + 0.5)
        tensor([ 0.8776, -0.4794])
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
