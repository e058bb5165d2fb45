"""RegularFace's exclusive term as a module, with its cache of nearest classes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_margin import _checks
from fused_margin._ops import library
from fused_margin._ops.inputs import MIB
from fused_margin._ops.nearest.cache import NearestCache, fits, new_cache
from fused_margin._ops.nearest.library import certified_nearest, periodic_nearest
from fused_margin.distributed import Shard
from fused_margin.losses import settings
from fused_margin.nearest import NearestClass, exclusive_regularization


def checked_refresh(name: str, value: str | int) -> str | int:
    """Checks ``refresh`` of :class:`ExclusiveRegularizer`."""
    if isinstance(value, str):
        return _checks.one_of(name, value, ("every_step", "certified"))
    return _checks.positive_index(name, value)


class ExclusiveRegularizer(settings.Settings):
    """RegularFace's exclusive term as a module: the mean cosine of the classes to their nearest other class.

    For use with a loss of another package. The losses of this package have ``exclusive_weight`` and
    ``exclusive_refresh``. See :func:`fused_margin.functional.exclusive_regularization`.

    Args:
        refresh: when to search the nearest classes. ``"every_step"``: at every step, in the time of half of W @ W.T.
            ``"certified"``: at every step, with the same result bit for bit, but only for the classes whose answer may
            have changed since they were last searched. A cache of each class proves the other answers: 80 candidates, and a
            code, which is int8 on CPUs with int8 instructions and otherwise of the weights' compute type. The number of
            searched classes depends on the training: it is small if classes are far apart and rotate slowly. An integer R:
            every R training steps. Between searches the indices of the nearest classes do not change, which is **not
            exact**; the cosines are exact.
        shard: the slice of the classes in ``weight``, if classes are divided among ranks. Each rank has the cache of its
            own classes. Every rank makes every call, and gets the mean over all classes.
        workspace_mb: bound on scratch memory in MiB, in addition to the cache.

    ``refresh`` and ``workspace_mb`` may be set between steps. The first call creates the cache. Weights may change
    arbitrarily between calls, because the rotation of each class since its last search is measured. The state dict
    includes the cache, except that of a shard: the cache of a rank depends on the codes of all ranks. After loading a
    shard, or after one rank loses its cache, all ranks start with a full search.

    Shape:
        weight (C, D), C >= 2 -> scalar.

    Attributes:
        swept: with ``"certified"``, a (3,) buffer of totals so far: classes of all ranks that were searched again,
            classes that were not, and full searches.

    Raises:
        ValueError, TypeError: for another ``refresh``.
        RuntimeError: for weights on a CUDA device on whose compute capability the exact search has not been validated
            (see :func:`fused_margin.build_info`), unless ``refresh`` is ``"every_step"``.

    Examples:
        >>> import torch, fused_margin
        >>> regularizer = fused_margin.ExclusiveRegularizer()
        >>> weight = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]], requires_grad=True)
        >>> term = regularizer(weight)  # (cos 45 + cos 45 + cos 135 degrees) / 3
        >>> round(term.item(), 4)
        0.2357
        >>> term.backward()
    """

    refresh: str | int
    workspace_mb: float
    index: Tensor | None
    age: Tensor
    swept: Tensor | None

    SETTINGS: ClassVar[dict[str, settings.Check]] = {"refresh": checked_refresh, "workspace_mb": settings.WORKSPACE_MB}

    def __init__(self, *, refresh: str | int = "every_step", shard: Shard | None = None, workspace_mb: float = 256):
        super().__init__()
        self.shard = shard
        self.refresh, self.workspace_mb = refresh, workspace_mb

    def setting_changed(self, name: str) -> None:
        if name == "refresh":
            for old in set(self._buffers) - set(self.cache_names()):
                delattr(self, old)
            for new in self.cache_names():
                if new not in self._buffers:
                    self.register_buffer(new, None, persistent=self.shard is None)

    def cache_names(self) -> tuple[str, ...]:
        """Names of the buffers of the cache, which are None before the first call."""
        if self.refresh == "certified":
            return NearestCache._fields
        return () if self.refresh == "every_step" else ("index", "age")

    def cache(self) -> NearestCache | None:
        """The cache of ``"certified"``, or None before the first call."""
        tensors = [getattr(self, name) for name in NearestCache._fields]
        return None if any(t is None for t in tensors) else NearestCache(*tensors)

    def create_cache(self, weight: Tensor) -> None:
        """Creates the cache for these weights, if there is none that fits."""
        if self.refresh == "certified":
            self._certified_cache(weight)
        elif self.refresh != "every_step":
            self._periodic_index(weight)

    def _certified_cache(self, weight: Tensor) -> NearestCache:
        _checks.exact_search_device("weight", weight)
        cache = self.cache()
        if cache is None or not fits(cache, weight):
            cache = new_cache(weight, len(weight) if self.shard is None else self.shard.num_classes)
            for name, value in zip(NearestCache._fields, cache, strict=True):
                setattr(self, name, value)
        return cache

    def _periodic_index(self, weight: Tensor) -> Tensor:
        _checks.exact_search_device("weight", weight)
        index = self.index
        if index is None or (index.shape[0], index.device) != (weight.shape[0], weight.device):
            self.index = index = torch.zeros(weight.shape[0], dtype=torch.int64, device=weight.device)
            self.age = torch.zeros(1, dtype=torch.int64, device=weight.device)
        return index

    def find(self, weight: Tensor) -> NearestClass | None:
        """The nearest other class of every class, and its cosine (float64). None if every step searches."""
        if self.refresh == "every_step":
            return None
        shard = self.shard
        _checks.several_classes("weight", weight, shard)
        if shard is not None and not torch.compiler.is_compiling():
            library.refuse_transforms(weight)
        weight, workspace_bytes = weight.detach(), int(self.workspace_mb * MIB)
        group = ("", len(weight)) if shard is None else (shard.name, shard.num_classes)
        if self.refresh == "certified":
            return NearestClass(*certified_nearest(weight, *self._certified_cache(weight), workspace_bytes, *group))
        index = self._periodic_index(weight)
        cosine = periodic_nearest(weight, index, self.age, self.refresh, self.training, workspace_bytes, *group)
        return NearestClass(cosine, index.clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The term of class weights (C, D): a differentiable scalar, float64 if ``weight`` is, else float32."""
        return exclusive_regularization(
            weight, nearest=self.find(weight), shard=self.shard, workspace_mb=self.workspace_mb
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # The buffers take the sizes in the file. A checkpoint without a cache leaves the module without one.
        for name in self.cache_names() if self.shard is not None else ():
            state_dict.pop(prefix + name, None)
        for name in self.cache_names():
            saved = state_dict.get(prefix + name)
            device = getattr(saved if getattr(self, name) is None else getattr(self, name), "device", None)
            setattr(self, name, None if saved is None else torch.empty_like(saved, device=device))
            if name in ("candidate", "index") and saved is not None and saved.numel():
                low, high = (int(t) for t in saved.aminmax())
                if low < (-1 if name == "candidate" else 0) or high >= len(saved):
                    errors: list[str] = rest[-1]
                    errors.append(f"{prefix}{name}: expected classes in [0, {len(saved)}), got {low} to {high}")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"refresh={self.refresh!r}"
