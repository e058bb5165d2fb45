"""Warnings about margins in degrees and about small scales."""

import warnings

import pytest
import torch
from loss_inputs import problem

import fused_margin as fm
from fused_margin.compat import insightface

DEGREES = {
    "arcface": lambda m: fm.ArcFaceLoss(30, 8, margin=m),
    "sub-center": lambda m: fm.SubCenterArcFaceLoss(30, 8, margin=m),
    "combined": lambda m: fm.CombinedMarginLoss(30, 8, m2=m),
    "adaface": lambda m: fm.AdaFaceLoss(30, 8, margin=m),
    "magface": lambda m: fm.MagFaceLoss(30, 8, margins=(0.1, m)),
    "elasticface": lambda m: fm.ElasticFaceLoss(30, 8, margin=m),
    "curricularface": lambda m: fm.CurricularFaceLoss(30, 8, margin=m),
    "insightface": lambda m: insightface.ArcFace(margin=m),
    "insightface combined": lambda m: insightface.CombinedMarginLoss(64.0, 1.0, m, 0.0),
}


@pytest.mark.parametrize("name", DEGREES)
def test_degrees_warn(name):
    """In the constructor and when set, the warning has the caller's line; radians do not warn."""
    with pytest.warns(
        UserWarning, match=r"28.6 is larger than pi in magnitude.*28\.6 degrees are 0\.4992 radians"
    ) as caught:
        DEGREES[name](28.6)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn = DEGREES[name](3.0)
    attribute = next(a for a in ("margin", "m2", "margins") if hasattr(loss_fn, a))
    with pytest.warns(UserWarning, match="28.6 is larger than pi in magnitude") as caught:
        setattr(loss_fn, attribute, (0.1, 28.6) if attribute == "margins" else 28.6)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_degrees_in_a_margin_warn():
    with pytest.warns(UserWarning, match="m2 28.6 is larger than pi in magnitude") as caught:
        margin = fm.Margin(m2=28.6)
    assert len(caught) == 1 and caught[0].filename == __file__
    x, _, y = problem(40, 30, 8, spread=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fm.functional.margin_cross_entropy(x, torch.randn(30, 8, dtype=torch.float64), y, margin)
        fm.Margin(m2=3.1, m3=4.0)


def test_degrees_in_a_margin_function_warn():
    """The warning has the line that set the value, although torch.nn.Module is called in between."""
    loss_fn = fm.ArcFaceLoss(30, 8)
    with pytest.warns(UserWarning):
        margin = fm.Margin(m2=28.6)
    with pytest.warns(UserWarning, match="margin 28.6 is larger than pi in magnitude") as caught:
        loss_fn.margin_function = margin
    assert len(caught) == 1 and caught[0].filename == __file__


def test_other_numbers_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fm.SphereFaceLoss(30, 8, margin=4)
        fm.CosFaceLoss(30, 8, margin=3.5)
        fm.ElasticFaceLoss(30, 8, margin=3.5, kind="cos")


def test_small_scale_warns_when_set():
    loss_fn = fm.ArcFaceLoss(1001, 8)
    with pytest.warns(UserWarning, match=r"scale 9 is below 9\.10") as caught:
        loss_fn.scale = 9
    assert caught[0].filename == __file__
