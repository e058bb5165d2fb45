"""The loss modules."""

from fused_margin.losses.adaptive import AdaFaceLoss, CurricularFaceLoss, ElasticFaceLoss, MagFaceLoss
from fused_margin.losses.auxiliary import CenterLoss, InterLoss, IntraLoss, RingLoss, UniformLoss
from fused_margin.losses.base import ClassificationLoss, MarginLoss
from fused_margin.losses.center_invariant import CenterInvariantLoss
from fused_margin.losses.exclusive import ExclusiveRegularizer
from fused_margin.losses.groupface import GroupFace, GroupFaceOutput, SelfGroupingLoss
from fused_margin.losses.margin import (
    ArcFaceLoss,
    CombinedMarginLoss,
    CosFaceLoss,
    ModifiedSoftmaxLoss,
    NormFaceLoss,
    SphereFaceLoss,
    SubCenterArcFaceLoss,
)
from fused_margin.losses.pairs import ContrastiveLoss, DeepID2Loss
from fused_margin.losses.ranges import MarginalLoss, RangeLoss
from fused_margin.losses.siamese import SiameseL1Loss
from fused_margin.losses.softmax import L2SoftmaxLoss, LSoftmaxLoss, SoftmaxLoss
from fused_margin.losses.synonyms import AMSoftmaxLoss, CoCoLoss, VMFLoss
from fused_margin.losses.triplet import AngularTripletLoss, TripletLoss

__all__ = [
    "AMSoftmaxLoss",
    "AdaFaceLoss",
    "AngularTripletLoss",
    "ArcFaceLoss",
    "CenterInvariantLoss",
    "CenterLoss",
    "ClassificationLoss",
    "CoCoLoss",
    "CombinedMarginLoss",
    "ContrastiveLoss",
    "CosFaceLoss",
    "CurricularFaceLoss",
    "DeepID2Loss",
    "ElasticFaceLoss",
    "ExclusiveRegularizer",
    "GroupFace",
    "GroupFaceOutput",
    "InterLoss",
    "IntraLoss",
    "L2SoftmaxLoss",
    "LSoftmaxLoss",
    "MagFaceLoss",
    "MarginLoss",
    "MarginalLoss",
    "ModifiedSoftmaxLoss",
    "NormFaceLoss",
    "RangeLoss",
    "RingLoss",
    "SelfGroupingLoss",
    "SiameseL1Loss",
    "SoftmaxLoss",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
    "TripletLoss",
    "UniformLoss",
    "VMFLoss",
]
