"""The compiled kernels of a tensor's device, with the device's current stream."""

from contextlib import nullcontext
from functools import partial

import torch  # before _C: both then share torch's OpenMP threads

from fused_margin import _C

REBUILD = "rebuild with nvcc on PATH or CUDA_HOME set: pip install --no-cache-dir --force-reinstall --no-deps ."


class Kernels:
    """Kernels of one backend by name; the stream is the first argument of each."""

    def __init__(self, module, stream: int):
        self._module, self._stream = module, stream

    def __getattr__(self, name: str):
        value = getattr(self._module, name)
        return partial(value, self._stream) if callable(value) else value

    def family(self, name: str) -> "Kernels":
        """The kernels of a submodule, on the same stream."""
        return Kernels(getattr(self._module, name), self._stream)


def has_cuda_kernels() -> bool:
    return hasattr(_C, "cuda")


def kernels(device: torch.device) -> Kernels:
    if device.type == "cuda":
        return Kernels(_C.cuda, torch.cuda.current_stream(device).cuda_stream)
    return Kernels(_C.cpu, 0)


def on_device(device: torch.device):
    """Makes a CUDA tensor's device the current one, which is the one kernels are launched on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def advise_huge_pages(tensor: torch.Tensor) -> None:
    """For fresh CPU memory that is about to be written whole: a fault for every 2 MB instead of every 4 KB."""
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type == "cpu" and size >= 4 << 20:
        _C.cpu.advise_huge_pages(tensor, size)
