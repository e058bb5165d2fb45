"""The version, and the properties of this build."""

from importlib.metadata import version

import torch

from fused_margin import _C
from fused_margin._ops.backends import select

__version__ = version("fused_margin")


def build_info() -> dict:
    """Version, CPU instruction set in use, CUDA build, and the kernels that serve each device.

    Returns:
        dict with ``version``; ``cpu``: ``capability`` ("avx512", "avx2" or "plain") and ``best_capability``; ``cuda``:
        ``compiled``, ``architectures`` and ``toolkit`` (of the build), ``available`` (a device torch can use now);
        ``kernels``: by device, what its matrix products and the kernels around them are.
    """
    architectures = [a for a in _C.cuda_architectures.split(",") if a]
    capability = _C.cpu.capability().name
    kernels = {"cpu": f"{capability} kernels around torch.mm"}
    if architectures:
        kernels["cuda"] = select.describe()
    return {
        "version": __version__,
        "cpu": {"capability": capability, "best_capability": _C.cpu.best_capability().name},
        "cuda": {
            "compiled": bool(architectures),
            "architectures": architectures,
            "toolkit": _C.cuda_toolkit or None,
            "available": bool(architectures) and torch.cuda.is_available(),
        },
        "kernels": kernels,
    }
