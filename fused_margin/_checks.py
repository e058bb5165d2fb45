"""Every validation of user input. Errors name the argument, what was expected and what was given."""

from __future__ import annotations

import math
import operator
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from fused_margin._ops.backends.select import REBUILD, has_cuda_kernels, supports_exact_search
from fused_margin._ops.inputs import DTYPES
from fused_margin.distributed import Shard

REDUCTIONS = ("mean", "sum", "none")
NUMBERS = (int, float, np.integer, np.floating)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_bad_label_buffers: dict[torch.device, Tensor] = {}
_debug = False


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, NUMBERS) and not isinstance(value, bool)


def matrix(name: str, value: Tensor, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {shape}, got {type(value).__name__}")
    if value.dim() != 2:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if value.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name}: expected a CPU or CUDA tensor, got device {value.device}")
    if value.device.type == "cuda" and not has_cuda_kernels():
        raise RuntimeError(
            f"{name} is on {value.device}, but this build of fused_margin has no CUDA kernels; {REBUILD}"
        )


def class_weights(weight: Tensor, *, name: str = "weight", at_least: int = 1) -> None:
    """The (C, D) matrix of class weights."""
    matrix(name, weight, "(num_classes, embedding_size)")
    if weight.shape[0] < at_least:
        raise ValueError(f"{name}: expected at least {at_least} classes, got {weight.shape[0]}")
    if weight.shape[1] < 1:
        raise ValueError(f"{name}: expected an embedding_size of at least 1, got 0")


def several_classes(name: str, weight: Tensor, value: Shard | None) -> None:
    """Weights of at least two classes, over all ranks of a shard."""
    class_weights(weight, name=name, at_least=2 if value is None else 0)
    if value is not None and shard(value, weight, 1, 0.0, name=name) < 2:
        raise ValueError(f"{name}: expected at least 2 classes on all ranks, got {value.num_classes}")


def batch(embeddings: Tensor, weight: Tensor, labels: Tensor, *, at_least: int = 1) -> None:
    embeddings_for(embeddings, weight, at_least=at_least)
    per_sample_index("labels", labels, embeddings)


def embeddings_for(embeddings: Tensor, weight: Tensor, *, at_least: int = 1) -> None:
    class_weights(weight, at_least=at_least)
    matrix("embeddings", embeddings, "(N, embedding_size)")
    if embeddings.shape[1] != weight.shape[1]:
        raise ValueError(f"embeddings: expected embedding_size {weight.shape[1]}, got shape {tuple(embeddings.shape)}")
    same_device("embeddings", embeddings, weight)


def same_device(name: str, value: Tensor, reference: Tensor) -> None:
    if value.device != reference.device:
        raise ValueError(f"{name}: expected a tensor on {reference.device}, got one on {value.device}")


def per_sample_index(name: str, value: Tensor | None, embeddings: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an integer tensor of shape (N,), got {type(value).__name__}")
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected an integer tensor of shape (N,), got dtype {value.dtype}")
    if tuple(value.shape) != (embeddings.shape[0],):
        raise ValueError(f"{name}: expected shape ({embeddings.shape[0]},), got {tuple(value.shape)}")
    same_device(name, value, embeddings)


def labels(value: Tensor | None, weight: Tensor) -> Tensor:
    """Checks the labels (N,) of a call without embeddings, and returns them."""
    if not isinstance(value, Tensor):
        raise TypeError(f"labels: expected an integer tensor of shape (N,), got {type(value).__name__}")
    if value.dim() != 1:
        raise ValueError(f"labels: expected shape (N,), got {tuple(value.shape)}")
    per_sample_index("labels", value, value)
    same_device("labels", value, weight)
    return value


def label_values(value: Tensor, num_classes: int, ignore_index: int) -> None:
    """Range of the labels, on the CPU only. Reading a CUDA tensor would synchronize; there torch's indexing asserts."""
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (value != ignore_index) & ((value < 0) | (value >= num_classes))
        if bool(wrong.any()):
            raise bad_label_error(int(value[wrong][0]), f"for {num_classes} classes")


def per_sample(name: str, value: Tensor, embeddings: Tensor) -> Tensor:
    """Converts a per-sample argument to an (N,) float64 tensor."""
    samples = embeddings.shape[0]
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != samples):
        raise ValueError(f"{name}: expected a number or shape ({samples},), got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    same_device(name, value, embeddings)
    return value.to(torch.float64).expand(samples).contiguous()


def scale(value: float | Tensor | None) -> None:
    if value is None or isinstance(value, Tensor):
        return
    if not is_number(value):
        raise TypeError(f"scale: expected a number, a tensor of shape (N,) or None, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"scale: expected a positive finite number, got {value}")


def not_meta(weight: Tensor) -> None:
    if weight.is_meta:
        raise ValueError("weight: expected a CPU or CUDA tensor with a shard, got one on meta")


def instance(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a fused_margin.{kind.__name__}, got {type(value).__name__}")


def margin_numbers(margin: Any) -> None:
    """m1, m2, m3 and annealing of a fused_margin.Margin."""
    for name in ("m1", "m2", "m3", "annealing"):
        value = getattr(margin, name)
        if isinstance(value, Tensor):
            continue
        if not is_number(value):
            raise TypeError(f"{name}: expected a number or a tensor of shape (N,), got {type(value).__name__}")
        if not -math.inf < value < math.inf:  # also rejects NaN; torch.compile cannot trace math.isfinite
            raise ValueError(f"{name}: expected a finite number, got {value}")
        if (name == "m1" and value <= 0) or (name == "annealing" and value < 0):
            raise ValueError(f"{name}: expected a {'positive' if name == 'm1' else 'non-negative'} number, got {value}")


def margin_values(name: str, value: Tensor) -> None:
    """An (N,) m1, m2, m3 or annealing, on the CPU only: reading a CUDA tensor would synchronize."""
    if value.device.type == "cpu":
        in_range = value > 0 if name == "m1" else value >= 0 if name == "annealing" else value.isfinite()
        wrong = ~(in_range & value.isfinite())
        if bool(wrong.any()):
            expected = {"m1": "positive", "annealing": "non-negative"}.get(name, "finite")
            raise ValueError(f"margin.{name}: expected {expected} numbers, got {value[wrong][0].item()}")


def scale_values(value: Tensor | None) -> None:
    """An (N,) scale, on the CPU only: reading a CUDA tensor would synchronize."""
    if value is not None and value.device.type == "cpu" and not bool((value >= 0).all()):
        raise ValueError(f"scale: expected non-negative numbers, got {value[~(value >= 0)][0].item()}")


def per_class(name: str, value: Tensor | None, weight: Tensor, num_classes: int) -> None:
    """A (C,) tensor such as ``weight`` of F.cross_entropy, or None."""
    if value is None:
        return
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor of shape (num_classes,), got {kind(value)}")
    if tuple(value.shape) != (num_classes,):
        raise ValueError(f"{name}: expected shape ({num_classes},), got {tuple(value.shape)}")
    same_device(name, value, weight)


def sub_centers(value: int, weight: Tensor, exclusive_weight: float, label_smoothing: float) -> None:
    positive_index("sub_centers", value)
    if weight.shape[0] % value:
        raise ValueError(f"weight: expected {value} rows for every class, got {weight.shape[0]} rows")
    if value > 1:
        absent("sub_centers above 1", exclusive_weight=exclusive_weight, label_smoothing=label_smoothing)


def shard(
    value: Shard | None, weight: Tensor, sub_centers: int, label_smoothing: float, *, name: str = "weight"
) -> int:
    """Checks a shard against its weights, and returns the number of classes over all ranks."""
    if value is None:
        return weight.shape[0] // sub_centers
    if not isinstance(value, Shard):
        raise TypeError(f"shard: expected a fused_margin.distributed.Shard, got {type(value).__name__}")
    if weight.shape[0] != value.size * sub_centers:
        raise ValueError(
            f"{name}: expected the {value.size * sub_centers} rows that rank {value.rank} of {value.world_size} has of "
            f"{value.num_classes} classes, got {weight.shape[0]}"
        )
    if value.is_averaged(weight):
        raise ValueError(
            f"{name}: expected class weights outside of DistributedDataParallel, which has given every rank those of its "
            "first rank, although the ranks have different classes. Keep the loss outside, or name its class weights in "
            "module._ddp_params_and_buffers_to_ignore before wrapping the module"
        )
    if value.sample_rate < 1:
        absent("a sample_rate below 1", label_smoothing=label_smoothing)
    return value.num_classes


def nearest(value: tuple[Tensor, Tensor] | None, weight: Tensor, shard: Shard | None) -> None:
    """A NearestClass of the classes of weight, or None."""
    if value is None:
        return
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"nearest: expected a fused_margin.functional.NearestClass, got {type(value).__name__}")
    cosine, index = value
    classes = len(weight) if shard is None else shard.num_classes
    per_class("nearest.cosine", cosine, weight, len(weight))
    if not isinstance(index, Tensor):
        raise TypeError(f"nearest.index: expected ({len(weight)},) int64, got {type(index).__name__}")
    same_device("nearest.index", index, weight)
    if index.shape != weight.shape[:1] or index.dtype != torch.int64:
        raise ValueError(f"nearest.index: expected ({len(weight)},) int64, got {tuple(index.shape)} {index.dtype}")
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and len(index):
        low, high = (int(t) for t in index.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"nearest.index: expected classes in [0, {classes}), got {low if low < 0 else high}")


def exact_search_device(name: str, value: Tensor) -> None:
    """A tensor of a call that only the exact search serves."""
    if value.is_meta:
        raise RuntimeError(
            f"{name}: expected a CPU or CUDA tensor, whose values the exact search reads, got one on meta"
        )
    if not supports_exact_search(value.device):
        raise RuntimeError(
            f"{name}: expected a CPU tensor, because the exact search is off for this compute capability "
            f"(see fused_margin.build_info), got {value.device}"
        )


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def absent(other: str, **numbers: float) -> None:
    """Options that must be 0 in combination with the option `other`."""
    for name, value in numbers.items():
        if value > 0:
            raise ValueError(f"{name}: expected 0 with {other}, got {value}")


def kind(value: Any) -> str:
    """The dtype of a tensor, or the type of another value, for an error message."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def number(name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    if not is_number(value):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (low < value if open_low else low <= value) or not value <= high or abs(value) == math.inf:
        bounds = f"{'(' if open_low or low == -math.inf else '['}{low}, {high}{')' if high == math.inf else ']'}"
        raise ValueError(f"{name}: expected a number in {bounds}, got {value}")


def integer(name: str, value: int) -> int:
    """Converts an integer, which may be NumPy's, to an int."""
    try:
        integer = None if isinstance(value, bool) else operator.index(value)
    except TypeError:  # of a tensor too, if it is not an integer
        integer = None
    if integer is None:
        raise TypeError(f"{name}: expected an integer, got {kind(value)}")
    return integer


def positive_index(name: str, value: int) -> int:
    """Converts a positive integer, which may be NumPy's, to an int."""
    value = integer(name, value)
    if value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value}")
    return value


def interval(name: str, value: tuple[float, float], low: float, *, open_low: bool = False) -> tuple[float, float]:
    """Two numbers in ascending order."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: expected two numbers, got {value!r}")
    first, second = value
    number(f"{name}[0]", first, low, open_low=open_low)
    number(f"{name}[1]", second, first, open_low=open_low)
    return first, second


def cross_entropy_options(
    reduction_: str, exclusive_weight: float, ignore_index: int, label_smoothing: float, workspace_mb: float
) -> None:
    reduction(reduction_, exclusive_weight)
    integer("ignore_index", ignore_index)
    number("label_smoothing", label_smoothing, 0.0, 1.0)
    number("workspace_mb", workspace_mb, 0.0, open_low=True)


def reduction(value: str, exclusive_weight: float) -> None:
    if value not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(map(repr, REDUCTIONS))}, got {value!r}")
    if value == "none" and exclusive_weight > 0:
        raise ValueError(
            f"exclusive_weight: expected 0 with reduction='none', got {exclusive_weight}: the exclusive term is not a sum "
            "over samples. Add fused_margin.functional.exclusive_regularization(weight) to the reduced loss"
        )


def set_debug(enabled: bool) -> None:
    """Switches debug mode: a CUDA call then waits for its kernels and reports its own bad labels.

    Without debug mode the next call reports them. Debug mode costs a host synchronization per call. CPU calls always
    report their own bad labels.

    Args:
        enabled: True switches debug mode on, False off.

    Examples:
        >>> import fused_margin
        >>> fused_margin.set_debug(True)
        >>> fused_margin.set_debug(False)
    """
    global _debug
    _debug = bool(enabled)


def bad_label_buffer(device: torch.device) -> Tensor:
    """A (1,) int64 tensor shared by host and device: 0, until a kernel writes a label outside [0, num_classes) to it."""
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int64, device="cpu")
    if device not in _bad_label_buffers:  # setdefault, so that concurrent threads use the same buffer
        _bad_label_buffers.setdefault(device, torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=True))
    reported = _bad_label_buffers[device]
    where = "in an earlier call (fused_margin.set_debug(True) reports it in its own call)"
    bad_label(reported, device, where, earlier=True)
    return reported


def bad_label(reported: Tensor, device: torch.device, where: str, *, earlier: bool = False) -> None:
    """Raises for a label that a kernel reported: at once on the CPU; on CUDA one call later, without synchronizing."""
    if device.type == "cuda" and not earlier:
        if not _debug:
            return
        torch.cuda.synchronize(device)
    value = int(reported)
    if value:
        reported.zero_()
        raise bad_label_error(value if value < 0 else value - 1, where)


def bad_label_error(label: int, where: str) -> ValueError:
    return ValueError(f"labels: expected values in [0, num_classes) or ignore_index, got {label} {where}")
