"""The kernels of a tensor's device, and the backend that serves a call: portable, or a family of tensor-core kernels."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch  # before _C: both then share torch's OpenMP threads

from fused_margin import _C
from fused_margin._ops.inputs import PORTABLE, compute_dtype

REBUILD = "rebuild with nvcc on PATH or CUDA_HOME set: pip install --no-cache-dir --force-reinstall --no-deps ."
SPLIT = "split"  # suffix of a family's name: operands are sums of two fp16 parts, with the accuracy of float32
SIZES = range(32, 4097)  # embedding sizes of the families
MAX_LOGIT = 2.0**21  # a larger logit, as a power of two, has too few fractional bits in the families
Capability = tuple[int, int]  # compute capability of a device, such as (9, 0)


class Kernels:
    """The kernels of one device and stream as attributes; a family of tensor-core kernels is itself a `Kernels`."""

    def __init__(self, module: ModuleType, stream: int):
        for name, value in vars(module).items():
            if isinstance(value, ModuleType):
                value = Kernels(value, stream)
            elif callable(value):
                value = functools.partial(value, stream)
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this build has no kernel {name}")


@functools.lru_cache(maxsize=64)
def kernels(device_type: str, stream: int = 0) -> Kernels:
    """The kernels of the CPU, or of CUDA devices on a stream."""
    return Kernels(getattr(_C, device_type), stream)


@contextmanager
def kernels_on(device: torch.device) -> Iterator[Kernels]:
    """The kernels of a device on its current stream. Within the context, the device is current and autocast is off."""
    current: AbstractContextManager
    current, stream = nullcontext(), 0
    if device.type == "cuda":
        current, stream = torch.cuda.device(device), torch.cuda.current_stream(device).cuda_stream
    with current, torch.autocast(device.type, enabled=False):
        yield kernels(device.type, stream)


def has_cuda_kernels() -> bool:
    return hasattr(_C, "cuda")


def advise_huge_pages(tensor: torch.Tensor) -> None:
    """For new CPU memory that is about to be written: one page fault every 2 MB instead of every 4 KB."""
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type == "cpu" and size >= 4 << 20:
        _C.cpu.advise_huge_pages(tensor, size)


@dataclass(frozen=True)
class Family:
    """A family of tensor-core kernels. By default it serves only compute capabilities on which it was validated."""

    name: str
    capability: Capability  # the lowest that the family runs on
    exact_capability: bool  # whether the family runs on `capability` alone
    results: Mapping[Capability, str]  # file in benchmarks/results in which the family passes on that capability

    @property
    def compiled(self) -> bool:
        return hasattr(_C, "cuda") and hasattr(_C.cuda, self.name)

    def runs_on(self, capability: Capability) -> bool:
        return capability == self.capability if self.exact_capability else capability >= self.capability


# The first family that is compiled and enabled for the device serves float32, float16 and bfloat16.
# Tests fail if a file of results is missing or incomplete (benchmarks/gpu/evidence.py).
FAMILIES = (
    Family("sm90", (9, 0), exact_capability=True, results={(9, 0): "nvidia-h200-checks.json"}),
    Family("sm80", (8, 0), exact_capability=False, results={(9, 0): "nvidia-h200-checks.json"}),
)
# Results of the CUDA kernels of the exact search.
SEARCH_RESULTS: Mapping[Capability, str] = {(9, 0): "nvidia-h200-checks.json"}
_forced: str | None = None  # set by `force_backend`
_search_forced = False  # set by `force_exact_search`
# Before 2.10 torch cannot add fp16 matrix products to a float32 matrix in place.
_TORCH_ADDS_TO_FLOAT32 = torch.torch_version.TorchVersion(torch.__version__) >= "2.10"


@contextmanager
def force_backend(name: str) -> Iterator[None]:
    """Serves all calls with the named family, or with PORTABLE. For tests and benchmarks."""
    global _forced
    names = [PORTABLE, *(family.name for family in FAMILIES)]
    if name not in names:
        raise ValueError(f"name: expected one of {', '.join(map(repr, names))}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@contextmanager
def force_exact_search() -> Iterator[None]:
    """Enables the exact search on CUDA devices on which it was not validated. For tests and benchmarks."""
    global _search_forced
    before, _search_forced = _search_forced, True
    try:
        yield
    finally:
        _search_forced = before


def constant_while_compiled(function: Callable) -> Callable:
    """As torch.compiler.assume_constant_result, which would import the whole compiler and take seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # read by torch._dynamo
    return function


@constant_while_compiled
def _capability(device: torch.device) -> Capability:
    return torch.cuda.get_device_capability(device)


@constant_while_compiled
def rounds_float32(device: torch.device) -> bool:
    """Whether the user allows torch to round the operands of float32 products on a device to TF32 or bfloat16."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    # torch.get_float32_matmul_precision raises after fp32_precision was set. Older versions have no fp32_precision.
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:
        return torch.get_float32_matmul_precision() != "highest"
    return precision not in ("none", "ieee")


def supports_exact_search(device: torch.device) -> bool:
    """Whether the exact search is enabled for a device."""
    if device.type != "cuda":
        return device.type == "cpu"
    return _search_forced or (bool(SEARCH_RESULTS) and _capability(device) in SEARCH_RESULTS)


def select_backend(embeddings: torch.Tensor | None, weight: torch.Tensor, scale: float = 0.0) -> str:
    """PORTABLE, or the name of a family. The suffix SPLIT selects products with the accuracy of float32.

    The suffix is absent if an input has half precision, under autocast, and if `rounds_float32`.
    """
    if weight.device.type != "cuda" and _forced is None:
        return PORTABLE
    candidates = [f for f in FAMILIES if (f.results if _forced is None else f.name == _forced)]
    empty = weight.shape[0] == 0 or (embeddings is not None and embeddings.shape[0] == 0)
    if not candidates or empty or weight.shape[1] not in SIZES or compute_dtype(embeddings, weight) == torch.float64:
        return PORTABLE
    if scale > MAX_LOGIT:
        return PORTABLE
    if weight.device.type == "cuda":
        if not _TORCH_ADDS_TO_FLOAT32:
            return PORTABLE
        capability = _capability(weight.device)
        candidates = [f for f in candidates if f.compiled and f.runs_on(capability)]
        if _forced is None:
            candidates = [f for f in candidates if capability in f.results]
        if not candidates:
            return PORTABLE
    halves = any(t is not None and t.dtype != torch.float32 for t in (embeddings, weight))
    if halves or torch.is_autocast_enabled(weight.device.type) or rounds_float32(weight.device):
        return candidates[0].name
    return f"{candidates[0].name} {SPLIT}"


def describe() -> list[str]:
    """One line per backend, first those that are enabled by default."""
    lines = [
        f"{family.name} tensor cores: {_state(family.results) if family.compiled else 'not compiled'}"
        for family in FAMILIES
    ]
    lines = sorted(lines, key=lambda line: ": on" not in line) + [
        "portable kernels around torch.mm: serve all other calls"
    ]
    return [*lines, f"exact search for nearest classes: {_state(SEARCH_RESULTS)}"]


def _state(results: Mapping[Capability, str]) -> str:
    if not results:
        return "off: not validated on a device yet"
    shown = [f"{major}.{minor} ({file})" for (major, minor), file in sorted(results.items())]
    return f"on for compute capability {', '.join(shown)}"
