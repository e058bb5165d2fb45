"""Shares torch's OpenMP runtime with the compiled extension, so that both use one pool of threads."""

import ctypes
import sys
from pathlib import Path

import torch


def share_runtime() -> None:
    """Let the extension find the OpenMP symbols that it leaves undefined (`openmp_runtime` in setup.py says why).

    Most builds of torch have made theirs visible already: libtorch_global_deps, which is loaded for the whole process,
    names their runtime. The others have it in one of two folders, or use the system's.

    Raises:
        OSError: torch bundles no runtime, and the system has none.
    """
    if sys.platform != "linux" or hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return
    package = Path(torch.__file__).parent
    bundled = [*package.parent.glob("torch.libs/libgomp*"), *package.glob("lib/libgomp*")]
    ctypes.CDLL(str(bundled[0]) if bundled else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
