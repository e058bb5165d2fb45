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
    """Raises ValueError or TypeError for what is no way to refresh."""
    if isinstance(value, str):
        return _checks.one_of(name, value, ("every_step", "certified"))
    return _checks.positive_index(name, value)


class ExclusiveRegularizer(settings.Settings):
    """RegularFace's exclusive term as a module: the mean cosine of the classes to their nearest other class.

    Use it beside a loss of your own; the losses of this package take ``exclusive_weight`` and ``exclusive_refresh``.
    See :func:`fused_margin.functional.exclusive_regularization`.

    Args:
        refresh: when nearest classes are searched. ``"every_step"``: at every step, in half of W @ W.T.
            ``"certified"``: at every step too, with the same result bit for bit, but only for the classes whose answer
            may have changed since they were last searched: a cache of each class (a code of a byte per dimension, and 80
            candidates) proves the other answers. The number of searched classes depends on the training: it is small where
            classes are apart and turn slowly. An integer R: every R training steps; in between, the indices of the
            nearest classes stay, which is **not exact** (their cosines are).
        shard: the slice of the classes that ``weight`` holds, if they are divided among ranks, each of which keeps the
            cache of its own classes; every rank makes every call, and gets the mean over all classes.
        workspace_mb: bound on scratch memory in MiB, beside the cache. It and ``refresh`` may be set between steps.

    Shape:
        weight (C, D), C >= 2 -> scalar.

    Attributes:
        swept: with ``"certified"``, a (3,) buffer: classes (of all ranks) that were searched again so far, those that
            were not, and full searches.

    The first call makes the cache. Weights may change in any way between calls: how far each has turned is measured, not
    assumed. The cache is in the state dict, but not that of a shard: the cache of one rank depends on the codes of all
    others, so that ranks begin anew after a load, with a full search, and so do all ranks where one has lost its cache.

    Raises:
        ValueError, TypeError: for a ``refresh`` that is none of these.
        RuntimeError: for weights on a CUDA device whose compute capability has no committed result of the exact search
            (see :func:`fused_margin.build_info`), unless ``refresh`` is ``"every_step"``.
    """

    SETTINGS: ClassVar = {"refresh": checked_refresh, "workspace_mb": settings.WORKSPACE_MB}

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
        """Buffers of the cache, None before the first call."""
        if self.refresh == "certified":
            return NearestCache._fields
        return () if self.refresh == "every_step" else ("index", "age")

    def cache(self) -> NearestCache | None:
        tensors = [getattr(self, name) for name in NearestCache._fields]
        return None if any(t is None for t in tensors) else NearestCache(*tensors)

    def start(self, weight: Tensor) -> None:
        """Makes the cache of such weights, if there is none."""
        _checks.searched_device("weight", weight)
        if self.refresh == "certified":
            cache = self.cache()
            if cache is None or not fits(cache, weight):
                cache = new_cache(weight, len(weight) if self.shard is None else self.shard.num_classes)
                for name, value in cache._asdict().items():
                    setattr(self, name, value)
        elif self.refresh != "every_step":
            index = self.index
            if index is None or (index.shape[0], index.device) != (weight.shape[0], weight.device):
                self.index = torch.zeros(weight.shape[0], dtype=torch.int64, device=weight.device)
                self.age = torch.zeros(1, dtype=torch.int64, device=weight.device)

    def find(self, weight: Tensor) -> NearestClass | None:
        """Every class's nearest other class and the cosine (float64) to it; None where every step searches."""
        if self.refresh == "every_step":
            return None
        divided = self.shard is not None
        _checks.class_weights(weight, at_least=0 if divided else 2)
        if divided and not torch.compiler.is_compiling():
            library.refuse_transforms(weight)
        if divided and _checks.shard(self.shard, weight, 1, 0.0) < 2:
            _checks.class_weights(weight, at_least=2)
        weight, room = weight.detach(), int(self.workspace_mb * MIB)
        group = (self.shard.name, self.shard.num_classes) if divided else ("", len(weight))
        self.start(weight)
        if self.refresh == "certified":
            return NearestClass(*certified_nearest(weight, *self.cache(), room, *group))
        cosine = periodic_nearest(weight, self.index, self.age, self.refresh, self.training, room, *group)
        return NearestClass(cosine, self.index.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return exclusive_regularization(
            weight, nearest=self.find(weight), shard=self.shard, workspace_mb=self.workspace_mb
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest) -> None:
        # Of any size that was saved; a checkpoint without a cache is one of weights that have not been searched.
        for name in self.cache_names() if self.shard is not None else ():
            state_dict.pop(prefix + name, None)
        for name in self.cache_names():
            saved = state_dict.get(prefix + name)
            device = getattr(saved if getattr(self, name) is None else getattr(self, name), "device", None)
            setattr(self, name, None if saved is None else torch.empty_like(saved, device=device))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"refresh={self.refresh!r}"
