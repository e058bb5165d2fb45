"""The version, and the properties of this build."""

from importlib.metadata import version
from typing import Any

import torch

from fused_margin import _C
from fused_margin._ops.backends import select

__all__ = ["__version__", "build_info"]

#: The version of the package, a str.
__version__ = version("fused_margin")


def build_info() -> dict[str, Any]:
    """The version, the CPU instruction set in use, the CUDA build, and the kernels that serve each device.

    Returns:
        dict with ``version``; ``cpu``: ``capability`` ("avx512", "avx2" or "plain") and ``best_capability``; ``cuda``:
        ``compiled``, ``architectures`` and ``toolkit`` of the build, and ``available``, whether torch can use a CUDA
        device; ``kernels``: a description of the matrix products and kernels of each device.

    Examples:
        >>> import fused_margin
        >>> info = fused_margin.build_info()
        >>> sorted(info)
        ['cpu', 'cuda', 'kernels', 'version']
        >>> info["cpu"]["capability"] in ("avx512", "avx2", "plain")
        True
    """
    architectures = [a for a in _C.cuda_architectures.split(",") if a]
    capability = _C.cpu.capability().name
    kernels: dict[str, str | list[str]] = {"cpu": f"{capability} kernels around torch.mm"}
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
