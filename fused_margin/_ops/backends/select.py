"""The kernels of a tensor's device, and the backend that serves a call: portable, or a family of tensor-core kernels."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch  # before _C: both then share torch's OpenMP threads

from fused_margin import _C
from fused_margin._ops.inputs import PORTABLE, compute_dtype

REBUILD = "rebuild with nvcc on PATH or CUDA_HOME set: pip install --no-cache-dir --force-reinstall --no-deps ."
SPLIT = "split"  # ending of a family's name: operands in two halves, accurate to float32
SIZES = range(32, 4097)  # embedding sizes the families take
LARGEST_LOGIT = 2.0**21  # the families compute larger ones, as powers of two, with too few digits after the point
Capability = tuple[int, int]  # compute capability of a device, such as (9, 0)


class Kernels:
    """The kernels of one device as attributes, each on one stream; families of tensor-core kernels are attributes too."""

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
    """The kernels of a device on its current stream. They are launched on the current device: this makes it the device.

    Autocast is off within.
    """
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
    """A family is on by default only on a compute capability on which a committed result shows that it passed."""

    name: str
    capability: Capability  # the lowest it runs on
    only: bool  # no other capability
    results: Mapping[Capability, str]  # file in benchmarks/results that shows that the family passed there

    @property
    def compiled(self) -> bool:
        return hasattr(_C, "cuda") and hasattr(_C.cuda, self.name)

    def runs_on(self, capability: Capability) -> bool:
        return capability == self.capability if self.only else capability >= self.capability


# The first that is compiled and on for the device serves float32, float16 and bfloat16.
# The tests refuse a file that is missing or does not show enough (benchmarks/gpu/evidence.py).
FAMILIES = (
    Family("sm90", (9, 0), only=True, results={(9, 0): "nvidia-h200.json"}),
    Family("sm80", (8, 0), only=False, results={(9, 0): "nvidia-h200.json"}),
)
# The same for the CUDA kernels of the exact search.
SEARCH_RESULTS: Mapping[Capability, str] = {(9, 0): "nvidia-h200.json"}
_wanted: str | None = None  # by `use`
_search_wanted = False  # by `search_on_cuda`
# Before 2.10 torch's products of halves cannot be added to a float32 matrix in place.
_TORCH_ADDS_TO_FLOAT32 = torch.torch_version.TorchVersion(torch.__version__) >= (2, 10)


@contextmanager
def use(name: str) -> Iterator[None]:
    """Serve all calls by the family of that name, or by PORTABLE: for tests and benchmarks."""
    global _wanted
    known = [PORTABLE, *(family.name for family in FAMILIES)]
    if name not in known:
        raise ValueError(f"expected one of {known}, got {name!r}")
    before, _wanted = _wanted, name
    try:
        yield
    finally:
        _wanted = before


@contextmanager
def search_on_cuda() -> Iterator[None]:
    """Lets the exact search run on CUDA devices without a committed result: for tests and benchmarks."""
    global _search_wanted
    before, _search_wanted = _search_wanted, True
    try:
        yield
    finally:
        _search_wanted = before


def constant_while_compiled(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, without its import of the whole compiler, which takes seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_while_compiled
def _capability(device: torch.device) -> Capability:
    return torch.cuda.get_device_capability(device)


@constant_while_compiled
def rounds_float32(device: torch.device) -> bool:
    """Whether the user lets torch round the operands of float32 products on a device, to TF32 or bfloat16."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    # torch.get_float32_matmul_precision raises an error once fp32_precision was set; older versions have only the former.
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:
        return torch.get_float32_matmul_precision() != "highest"
    return precision not in ("none", "ieee")


def searches(device: torch.device) -> bool:
    """Whether the exact search serves a device."""
    if device.type != "cuda":
        return device.type == "cpu"
    return _search_wanted or (bool(SEARCH_RESULTS) and _capability(device) in SEARCH_RESULTS)


def select_backend(embeddings: torch.Tensor | None, weight: torch.Tensor, scale: float = 0.0) -> str:
    """PORTABLE, or a family's name, followed by SPLIT where float32 inputs must be multiplied as such.

    They are not where either input is half, under autocast, and where `rounds_float32` says so.
    """
    if weight.device.type != "cuda" and _wanted is None:
        return PORTABLE
    candidates = [f for f in FAMILIES if (f.results if _wanted is None else f.name == _wanted)]
    empty = weight.shape[0] == 0 or (embeddings is not None and embeddings.shape[0] == 0)
    if not candidates or empty or weight.shape[1] not in SIZES or compute_dtype(embeddings, weight) == torch.float64:
        return PORTABLE
    if scale > LARGEST_LOGIT:
        return PORTABLE
    if weight.device.type == "cuda":
        if not _TORCH_ADDS_TO_FLOAT32:
            return PORTABLE
        capability = _capability(weight.device)
        candidates = [f for f in candidates if f.compiled and f.runs_on(capability)]
        if _wanted is None:
            candidates = [f for f in candidates if capability in f.results]
        if not candidates:
            return PORTABLE
    halves = any(t is not None and t.dtype != torch.float32 for t in (embeddings, weight))
    if halves or torch.is_autocast_enabled(weight.device.type) or rounds_float32(weight.device):
        return candidates[0].name
    return f"{candidates[0].name} {SPLIT}"


def describe() -> list[str]:
    """One line for each backend, those that serve by default first."""
    lines = [
        f"{family.name} tensor cores: {_state(family.results) if family.compiled else 'not compiled'}"
        for family in FAMILIES
    ]
    lines = sorted(lines, key=lambda line: ": on" not in line) + ["portable kernels around torch.mm: serve all else"]
    return [*lines, f"exact search for nearest classes: {_state(SEARCH_RESULTS)}"]


def _state(results: Mapping[Capability, str]) -> str:
    if not results:
        return "off: no committed device result yet"
    shown = [f"{major}.{minor} ({file})" for (major, minor), file in sorted(results.items())]
    return f"on for compute capability {', '.join(shown)}"
