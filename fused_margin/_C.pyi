"""Types of the compiled extension, which csrc/bindings defines. Its functions check their keywords themselves."""

from types import ModuleType
from typing import Any

SMALLEST_NORM: float
cuda_architectures: str
cuda_toolkit: str
cpu: Any
cuda: ModuleType  # in builds with CUDA kernels only
