"""Every public loss, and the head of GroupFace, beside its naive form, called on the same inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fused_margin as fm
from fused_margin.benchmark.problems import Inputs, Shape, make_inputs

from . import naive

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A loss of the library, and how to make and call its naive form."""

    loss: type[nn.Module]
    naive: Callable[[Inputs], Loss]
    takes: str = "EWL"  # arguments of the naive form: embeddings, class weights, labels, other parameters
    settings: dict[str, Any] = field(default_factory=dict)
    identities: int | None = None  # labels modulo this number, so that a batch has samples of one class
    scalar: Callable[[Any], Tensor] = lambda value: value  # of what the module returns


@dataclass(frozen=True)
class Call:
    """One implementation on given inputs."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]

    def backward(self) -> tuple[Tensor | None, ...]:
        """Forward and backward. Returns the gradients of the leaves; None for one that the loss does not use."""
        return torch.autograd.grad(self.forward(), self.leaves, allow_unused=True)


def stateless(loss: Loss) -> Callable[[Inputs], Loss]:
    return lambda inputs: loss


# Without SphereFace's annealing, which only averages two values.
CASES = {
    "MarginLoss": Case(
        fm.MarginLoss, stateless(naive.general), settings={"numbers": {"m1": 0.9, "m2": 0.4, "m3": 0.15}, "scale": 64.0}
    ),
    "ArcFaceLoss": Case(fm.ArcFaceLoss, stateless(naive.arcface)),
    "AMSoftmaxLoss": Case(fm.AMSoftmaxLoss, stateless(naive.am_softmax)),
    "CoCoLoss": Case(fm.CoCoLoss, stateless(naive.coco), settings={"alpha": 16.0}),
    "VMFLoss": Case(fm.VMFLoss, stateless(naive.vmf)),
    "CosFaceLoss": Case(fm.CosFaceLoss, stateless(naive.cosface)),
    "NormFaceLoss": Case(fm.NormFaceLoss, stateless(naive.normface)),
    "CombinedMarginLoss": Case(fm.CombinedMarginLoss, stateless(naive.combined)),
    "ModifiedSoftmaxLoss": Case(fm.ModifiedSoftmaxLoss, stateless(naive.modified_softmax)),
    "SphereFaceLoss": Case(fm.SphereFaceLoss, stateless(naive.sphereface), settings={"annealing": False}),
    "SubCenterArcFaceLoss": Case(fm.SubCenterArcFaceLoss, stateless(naive.subcenter_arcface)),
    "AdaFaceLoss": Case(fm.AdaFaceLoss, lambda inputs: naive.AdaFace()),
    "MagFaceLoss": Case(fm.MagFaceLoss, stateless(naive.magface)),
    "ElasticFaceLoss": Case(fm.ElasticFaceLoss, stateless(naive.elasticface)),
    "CurricularFaceLoss": Case(fm.CurricularFaceLoss, lambda inputs: naive.CurricularFace()),
    "SoftmaxLoss": Case(fm.SoftmaxLoss, stateless(naive.softmax), "EWLP"),
    "L2SoftmaxLoss": Case(fm.L2SoftmaxLoss, stateless(naive.l2_softmax), "EWLP", {"alpha": 16.0}),
    "LSoftmaxLoss": Case(fm.LSoftmaxLoss, stateless(naive.l_softmax), settings={"annealing": False}),
    "CenterLoss": Case(fm.CenterLoss, lambda inputs: naive.Center(torch.zeros_like(inputs.weight)), "EL"),
    "RingLoss": Case(fm.RingLoss, stateless(naive.ring), "EP", {"radius": 20.0}),
    "IntraLoss": Case(fm.IntraLoss, stateless(naive.intra)),
    "InterLoss": Case(fm.InterLoss, stateless(naive.inter), "WL"),
    "UniformLoss": Case(fm.UniformLoss, stateless(naive.uniform), "W"),
    "RangeLoss": Case(fm.RangeLoss, stateless(naive.range_loss), "EL"),
    "MarginalLoss": Case(fm.MarginalLoss, stateless(naive.marginal), "EL"),
    "CenterInvariantLoss": Case(
        fm.CenterInvariantLoss,
        lambda inputs: naive.CenterInvariant(torch.zeros_like(inputs.weight)),
        "EL",
        {"center_weight": 0.1},
    ),
    "TripletLoss": Case(fm.TripletLoss, stateless(naive.triplet), "EL", identities=4),
    "AngularTripletLoss": Case(fm.AngularTripletLoss, stateless(naive.angular_triplet), "EL", identities=4),
    "ContrastiveLoss": Case(fm.ContrastiveLoss, stateless(naive.contrastive), "EL", identities=4),
    "DeepID2Loss": Case(fm.DeepID2Loss, stateless(naive.deepid2), "EL", {"margin": 20.0}, identities=4),
    "SelfGroupingLoss": Case(fm.SelfGroupingLoss, lambda inputs: naive.SelfGrouping(), "E"),
    "SiameseL1Loss": Case(fm.SiameseL1Loss, stateless(naive.siamese_l1), "ELP"),
    "GroupFace": Case(
        fm.GroupFace,
        stateless(naive.group_face),
        "EP",
        {"num_groups": 8},
        scalar=lambda output: output.embeddings.square().mean(),
    ),
    "ExclusiveRegularizer": Case(fm.ExclusiveRegularizer, stateless(naive.exclusive), "W"),
}


def make_calls(name: str, shape: Shape, device: str) -> dict[str, Call]:
    """Both implementations of a loss, in training mode and before their first step, with equal parameters."""
    case = CASES[name]
    inputs = make_inputs(shape, device, batches=1)
    torch.manual_seed(0)
    sizes = {
        "num_classes": shape.classes,
        "embedding_size": shape.dim,
        "in_features": shape.dim,
        "num_groups": shape.dim,
    }
    accepted = inspect.signature(case.loss).parameters
    module = case.loss(**{key: size for key, size in sizes.items() if key in accepted} | case.settings).to(device)
    parameters = dict(module.named_parameters())
    has_weight = "weight" in parameters
    labels = inputs.labels[0] % (case.identities or shape.classes)
    values = {"E": inputs.embeddings[0], "W": parameters.pop("weight", inputs.weight), "L": labels}

    def call(loss: Loss, takes: str, values: dict[str, Tensor], others: list[Tensor]) -> Call:
        arguments = [values[letter] for letter in takes if letter != "P"]
        if "P" in takes:
            arguments += others
        leaves = [each for each in (values["E"], values["W"], *others) if each.requires_grad]
        return Call(lambda: loss(*arguments), leaves)

    ours = case.takes.replace("P", "").replace("W", "" if has_weight else "W")  # the module has its parameters
    copies = [each.detach().clone().requires_grad_() for each in parameters.values()]
    theirs = values | {"W": values["W"].detach().clone().requires_grad_()}
    return {
        "ours": call(lambda *arguments: case.scalar(module(*arguments)), ours, values, list(parameters.values())),
        "naive": call(case.naive(inputs), case.takes, theirs, copies),
    }


def require_agreement(name: str, shape: Shape, device: str) -> None:
    """Check that both implementations have the same value, and the same gradients, in the first step.

    Raises:
        AssertionError: they differ.
    """
    calls = make_calls(name, shape, device)
    values = {}
    for implementation, call in calls.items():
        torch.manual_seed(1)  # ElasticFace draws its margins
        value = call.forward()
        values[implementation] = value.detach().double(), torch.autograd.grad(value, call.leaves, allow_unused=True)
    (ours, gradients), (theirs, naive_gradients) = values["ours"], values["naive"]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    for mine, other in zip(gradients, naive_gradients, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            assert (mine - other).norm() <= 1e-3 * other.norm()
