"""The oracle against torch's own losses and the papers' formulas."""

import math

import pytest
import torch
from loss_inputs import problem
from torch.nn import functional as F

from fused_margin import reference
from fused_margin.margins import BEYOND_PI, GRADIENT, Margin, psi


def test_no_margin_is_cross_entropy_of_cosines():
    x, w, y = problem(20, 50, 8)
    logits = 30 * F.linear(F.normalize(x), F.normalize(w))
    torch.testing.assert_close(reference.margin_cross_entropy(x, w, y, scale=30.0), F.cross_entropy(logits, y))


@pytest.mark.parametrize("degrees", [5, 40, 50, 85, 95, 130, 140, 175])
def test_sphereface_psi_matches_the_papers_polynomial(degrees):
    """cos(4 theta) = 8 cos^4 - 8 cos^2 + 1, with (-1)^k and -2k in each quarter of [0, pi]."""
    theta = math.radians(degrees)
    k = int(4 * theta / math.pi)
    c = math.cos(theta)
    expected = (-1) ** k * (8 * c**4 - 8 * c**2 + 1) - 2 * k
    measured = reference.psi(torch.tensor([c], dtype=torch.float64), m1=4.0)
    assert measured.item() == pytest.approx(expected, abs=1e-12)


def test_arcface_and_cosface_psi():
    c = torch.linspace(-0.99, 0.99, 41, dtype=torch.float64)
    inside = torch.acos(c) + 0.5 <= math.pi
    addition = c * math.cos(0.5) - torch.sqrt(1 - c**2) * math.sin(0.5)  # cos(a + b)
    torch.testing.assert_close(reference.psi(c, m2=0.5)[inside], addition[inside])
    fallback = reference.psi(c, m2=0.5, beyond_pi="linear")
    torch.testing.assert_close(fallback[~inside], c[~inside] - 0.5 * math.sin(0.5))
    torch.testing.assert_close(reference.psi(c, m3=0.35), c - 0.35)


def test_monotone_extension_decreases_with_the_angle():
    c = torch.linspace(1, -1, 1001, dtype=torch.float64)
    for margin in ({"m1": 4.0}, {"m2": 0.5}, {"m1": 1.7, "m2": 0.9}):
        assert (reference.psi(c, **margin).diff() < 1e-12).all()


def test_nearest_class_of_a_known_arrangement():
    angles = torch.tensor([0.0, 0.1, 0.5, 3.0], dtype=torch.float64)
    cosine, index = reference.nearest_class(torch.stack([angles.cos(), angles.sin()], 1) * 3)
    assert index.tolist() == [1, 0, 1, 2]
    torch.testing.assert_close(cosine, torch.cos(torch.tensor([0.1, 0.1, 0.4, 2.5], dtype=torch.float64)))


@pytest.mark.parametrize("beyond_pi", BEYOND_PI)
@pytest.mark.parametrize("easy", [False, True])
@pytest.mark.parametrize("gradient", GRADIENT)
def test_psi_of_the_package_is_that_of_the_oracle(beyond_pi, easy, gradient):
    """`margins.psi` is written apart from `reference.psi`: values and gradients agree."""
    for numbers in ({"m1": 4.0}, {"m2": 0.5}, {"m3": 0.35}, {"m1": 0.9, "m2": 0.4, "m3": 0.15}):
        results = []
        for function in (
            lambda c: psi(c, Margin(**numbers, beyond_pi=beyond_pi, easy=easy, gradient=gradient)),  # noqa: B023
            lambda c: reference.psi(c, **numbers, beyond_pi=beyond_pi, easy=easy, gradient=gradient),  # noqa: B023
        ):
            cosine = torch.linspace(-0.99, 0.99, 41, dtype=torch.float64, requires_grad=True)
            value = function(cosine)
            value.sum().backward()
            results.append((value.detach(), cosine.grad))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-14)
