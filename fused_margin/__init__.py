"""fused_margin: margin-softmax losses and RegularFace's exclusive term, fused, exact and bounded in memory."""

import torch as _torch  # noqa: F401 - before the extension, so that both share torch's OpenMP threads

try:
    from fused_margin import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        "fused_margin's compiled kernels are not there: run `pip install .`, or `pip install -e .` to use the source tree"
    ) from error

from fused_margin import functional, optim, reference
from fused_margin.adaptive import AdaFaceLoss, ElasticFaceLoss, MagFaceLoss
from fused_margin.info import __version__, build_info
from fused_margin.losses import (
    ArcFaceLoss,
    CombinedMarginLoss,
    CosFaceLoss,
    ExclusiveRegularizer,
    MarginLoss,
    NormFaceLoss,
    SphereFaceLoss,
)
from fused_margin.margins import Margin
from fused_margin.ops.bad_labels import set_debug

__all__ = [
    "AdaFaceLoss",
    "ArcFaceLoss",
    "CombinedMarginLoss",
    "CosFaceLoss",
    "ElasticFaceLoss",
    "ExclusiveRegularizer",
    "MagFaceLoss",
    "Margin",
    "MarginLoss",
    "NormFaceLoss",
    "SphereFaceLoss",
    "__version__",
    "build_info",
    "functional",
    "optim",
    "reference",
    "set_debug",
]
