"""Margin-softmax losses and RegularFace's exclusive term: fused, exact and bounded in memory."""

import importlib as _importlib
import sys as _sys
from types import ModuleType as _ModuleType

from fused_margin._openmp import share_runtime as _share_runtime

try:
    _share_runtime()
    _importlib.import_module("fused_margin._C")  # its error, unlike that of `from`, says that there is no such file
except (ImportError, OSError) as error:
    from pathlib import Path as _Path

    _folder = _Path(__file__).resolve().parents[1]
    if (_folder / "setup.py").exists() and (_folder / "csrc").exists():
        raise ImportError(
            f"fused_margin was imported from its source folder {_folder}, and its compiled kernels could not be loaded: "
            f"{error}. To use an installed package, run Python in another folder. To use the source, run `pip install -e .` "
            "in it."
        ) from error
    raise ImportError(
        f"fused_margin's compiled kernels could not be loaded from {_folder / 'fused_margin'}: {error}. Install it again."
    ) from error

from fused_margin import functional, optim
from fused_margin._checks import set_debug
from fused_margin.info import __version__, build_info
from fused_margin.losses import (
    AdaFaceLoss,
    AMSoftmaxLoss,
    AngularTripletLoss,
    ArcFaceLoss,
    CenterInvariantLoss,
    CenterLoss,
    CoCoLoss,
    CombinedMarginLoss,
    ContrastiveLoss,
    CosFaceLoss,
    CurricularFaceLoss,
    DeepID2Loss,
    ElasticFaceLoss,
    ExclusiveRegularizer,
    GroupFace,
    GroupFaceOutput,
    InterLoss,
    IntraLoss,
    L2SoftmaxLoss,
    LSoftmaxLoss,
    MagFaceLoss,
    MarginalLoss,
    MarginLoss,
    ModifiedSoftmaxLoss,
    NormFaceLoss,
    RangeLoss,
    RingLoss,
    SelfGroupingLoss,
    SiameseL1Loss,
    SoftmaxLoss,
    SphereFaceLoss,
    SubCenterArcFaceLoss,
    TripletLoss,
    UniformLoss,
    VMFLoss,
)
from fused_margin.margins import Margin

# The names that version 0.1 had for modules: its pickles of whole losses, and programs, may import them.
for _old, _new in {
    "adaptive": "losses.adaptive",
    "companions": "losses.auxiliary",
    "exclusive": "losses.exclusive",
    "linear": "losses.softmax",
    "sharding": "distributed",
}.items():
    _sys.modules[f"{__name__}.{_old}"] = _sys.modules[f"{__name__}.{_new}"]

__all__ = [
    "AMSoftmaxLoss",
    "AdaFaceLoss",
    "AngularTripletLoss",
    "ArcFaceLoss",
    "CenterInvariantLoss",
    "CenterLoss",
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
    "Margin",
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
    "__version__",
    "build_info",
    "functional",
    "optim",
    "reference",
    "set_debug",
]


def __getattr__(name: str) -> _ModuleType:
    # The oracle is loaded when it is asked for: nothing in the package uses it.
    if name == "reference":
        return _importlib.import_module("fused_margin.reference")
    raise AttributeError(f"module 'fused_margin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
