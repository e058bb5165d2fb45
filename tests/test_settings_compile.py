"""Settings that change between steps under torch.compile: few graphs, and the results of eager mode."""

import copy

import pytest
import torch
from loss_inputs import leaf, problem
from torch._dynamo.testing import CompileCounterWithBackend

import fused_margin as fm
from fused_margin.compat import insightface
from fused_margin.compat.insightface import PartialFC_V2


def insightface_loss(classes, size):
    return PartialFC_V2(insightface.ArcFace(8.0, 0.3), size, classes)


def insightface_combined(classes, size):
    return PartialFC_V2(insightface.CombinedMarginLoss(8.0, 1.0, 0.0, 0.1, 0.5), size, classes)


VARIABLES = {
    "arcface": (fm.ArcFaceLoss, "margin", 0.2),
    "cosface": (fm.CosFaceLoss, "margin", 0.2),
    "sub-center": (fm.SubCenterArcFaceLoss, "margin", 0.2),
    "m1": (fm.CombinedMarginLoss, "m1", 0.8),
    "sphereface": (fm.SphereFaceLoss, "margin", 1.2),
    "l-softmax": (fm.LSoftmaxLoss, "margin", 1.2),
    "adaface": (fm.AdaFaceLoss, "margin", 0.2),
    "concentration": (fm.AdaFaceLoss, "concentration", 0.2),
    "momentum": (fm.AdaFaceLoss, "momentum", 0.2),
    "magface": (fm.MagFaceLoss, "margins", 0.2),
    "norm weight": (fm.MagFaceLoss, "norm_weight", 2.0),
    "elasticface": (fm.ElasticFaceLoss, "margin", 0.2),
    "curricularface": (fm.CurricularFaceLoss, "margin", 0.2),
    "scale": (fm.ArcFaceLoss, "scale", 20.0),
    "scale, curricularface": (fm.CurricularFaceLoss, "scale", 20.0),
    "exclusive weight": (fm.ArcFaceLoss, "exclusive_weight", 0.2),
    "label smoothing": (fm.ArcFaceLoss, "label_smoothing", 0.1),
    "label smoothing, softmax": (fm.SoftmaxLoss, "label_smoothing", 0.1),
    "alpha": (lambda *sizes: fm.L2SoftmaxLoss(*sizes, alpha=8.0), "alpha", 9.0),
    "insightface, margin": (insightface_loss, "margin_softmax.margin", 0.2),
    "insightface, m1": (insightface_combined, "margin_softmax.m1", 0.8),
    "insightface, m3": (insightface_combined, "margin_softmax.m3", 0.2),
    "insightface, s": (insightface_loss, "margin_softmax.s", 20.0),
    "insightface, filter": (insightface_combined, "margin_softmax.interclass_filtering_threshold", 0.2),
}

BACKENDS = pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])

# Values with the same code path as others: as "arcface", "adaface", "scale", or "m1" and "cosface".
ALIKE = (
    "sub-center", "concentration", "momentum", "scale, curricularface", "label smoothing, softmax", "insightface, m1",
    "insightface, m3", "insightface, s",
)  # fmt: skip


@BACKENDS
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in VARIABLES])
def test_compiled_once_for_all_values(name, backend):
    """Twelve values, more than the recompilation limit, give two graphs: for the first value and for the others."""
    module, attribute, value = VARIABLES[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    x, _, y = problem(12, 30, 8, spread=1.0)
    eager = module(30, 8).eval() if module is fm.ElasticFaceLoss else module(30, 8)
    changed = copy.deepcopy(eager)
    compiled = torch.compile(changed, backend=counter, fullgraph=True)
    for step in range(12):
        now = value * (1 + 0.01 * step)
        results = []
        for function, loss_fn in ((eager, eager), (compiled, changed)):
            owner, _, name = attribute.rpartition(".")
            setattr(loss_fn.get_submodule(owner), name, (now, 2 * now) if name == "margins" else now)
            loss_fn.weight.grad, a = None, leaf(x.float())
            loss = function(a, y)
            loss.backward()
            results.append((loss.detach(), a.grad, loss_fn.weight.grad))
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 2


ZEROS = {
    "arcface": (fm.ArcFaceLoss, ("margin",), 2),
    "cosface": (fm.CosFaceLoss, ("margin",), 2),
    "combined": (fm.CombinedMarginLoss, ("m2", "m3"), 2),
    "adaface": (fm.AdaFaceLoss, ("margin", "momentum"), 2),
    "norm weight": (fm.MagFaceLoss, ("norm_weight",), 2),
    "curricularface": (fm.CurricularFaceLoss, ("margin", "momentum"), 2),
    # another graph is compiled without label smoothing or without the exclusive term
    "label smoothing": (fm.SoftmaxLoss, ("label_smoothing",), 3),
    "exclusive weight": (fm.ArcFaceLoss, ("exclusive_weight",), 3),
    "all": (fm.ArcFaceLoss, ("margin", "label_smoothing", "exclusive_weight"), 3),
}


@BACKENDS
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "cosface")) for name in ZEROS],
)
def test_compiled_schedules_through_zero(name, backend):
    """The second value and a later one are 0: torch.compile makes constants of numbers that are compared with 0."""
    module, attributes, graphs = ZEROS[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    x, _, y = problem(12, 30, 8, spread=1.0)
    eager = module(30, 8)
    changed = copy.deepcopy(eager)
    compiled = torch.compile(changed, backend=counter, fullgraph=True)
    for value in (0.2, 0.0, *(0.01 * k for k in range(1, 9)), 0.0, 0.3):
        for loss_fn in (eager, changed):
            for attribute in attributes:
                setattr(loss_fn, attribute, value)
        torch.testing.assert_close(compiled(x.float(), y), eager(x.float(), y))
    assert counter.frame_count == graphs


@pytest.mark.parametrize("name", ["arcface", pytest.param("scale", marks=pytest.mark.slow)])
def test_inductor_compiles_once(name):
    module, attribute, value = VARIABLES[name]
    torch._dynamo.reset()
    x, _, y = problem(12, 30, 8, spread=1.0)
    loss_fn = module(30, 8)
    compiled = torch.compile(loss_fn, fullgraph=True)  # the ninth compilation would raise
    for step in range(10):
        setattr(loss_fn, attribute, value * (1 + 0.01 * step))
        torch.testing.assert_close(compiled(x.float(), y), loss_fn(x.float(), y))
