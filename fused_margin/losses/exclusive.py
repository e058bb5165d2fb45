"""RegularFace's exclusive term as a module, with what it keeps of the nearest classes from step to step."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_margin import _checks
from fused_margin._ops import library
from fused_margin._ops.inputs import workspace_bytes
from fused_margin._ops.kernels import kernels, on_device
from fused_margin._ops.nearest import sharded_certified
from fused_margin._ops.nearest.cache import NearestState, fits, new_state
from fused_margin._ops.registration import refuse_transforms
from fused_margin.distributed import Shard
from fused_margin.losses import settings
from fused_margin.losses.running_state import current_age
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
        refresh: when nearest classes are looked for. ``"every_step"``: each time, in half of W @ W.T.
            ``"certified"``: each time too, with the same result bit for bit, but only for the classes whose answer may
            have changed since they were last looked at: what is kept of every class (a code of a byte a dimension, and
            80 candidates) proves the others. How many those are depends on the training: few where classes are apart
            and turn slowly. An integer R: every R steps of training; in between neighbours stay as they are, which is
            **not exact** (their cosines are).
        shard: which of the classes ``weight`` holds, if they are divided among ranks, each of which keeps what belongs
            to its own; every rank makes every call, and gets the mean over all classes.
        workspace_mb: bound on scratch memory in MiB; what is kept comes on top. It and ``refresh`` may be set between steps.

    Shape:
        weight (C, D), C >= 2 -> scalar.

    Attributes:
        swept: with ``"certified"``, a (3,) buffer: classes (of all ranks) that were looked at again so far, those that
            were not, and whole sweeps.

    What is kept is made in the first call. Weights may change in any way between calls: how far each has turned is
    measured, not assumed. It is in the state dict, but not of a shard: what one rank keeps speaks of the codes of all
    others, so that ranks that were loaded begin anew, with a whole sweep, and so does everybody where one rank has lost
    its own.

    Raises:
        ValueError, TypeError: for a ``refresh`` that is none of these.
        RuntimeError: for weights on a CUDA device, unless ``refresh`` is ``"every_step"``: not there yet.
    """

    SETTINGS: ClassVar = {"refresh": checked_refresh, "workspace_mb": settings.WORKSPACE_MB}

    def __init__(self, *, refresh: str | int = "every_step", shard: Shard | None = None, workspace_mb: float = 256):
        super().__init__()
        self.shard = shard
        self.refresh, self.workspace_mb = refresh, workspace_mb

    def setting_changed(self, name: str) -> None:
        if name == "refresh":
            for old in set(self._buffers) - set(self.kept_names()):
                delattr(self, old)
            for new in self.kept_names():
                if new not in self._buffers:
                    self.register_buffer(new, None, persistent=self.shard is None)

    def kept_names(self) -> tuple[str, ...]:
        """Buffers, None before the first call."""
        if self.refresh == "certified":
            return NearestState._fields
        return () if self.refresh == "every_step" else ("index", "age")

    def state(self) -> NearestState | None:
        tensors = [getattr(self, name) for name in NearestState._fields]
        return None if any(t is None for t in tensors) else NearestState(*tensors)

    def start(self, weight: Tensor) -> None:
        """Makes what is kept of such weights, if it is not there."""
        _checks.searched_device("weight", weight)
        if self.refresh == "certified":
            state = self.state()
            if state is None or not fits(state, weight):
                state = new_state(weight) if self.shard is None else sharded_certified.new_state(self.shard, weight)
                for name, value in state._asdict().items():
                    setattr(self, name, value)
        elif self.refresh != "every_step":
            index = self.index
            if index is None or (index.shape[0], index.device) != (weight.shape[0], weight.device):
                self.index = torch.zeros(weight.shape[0], dtype=torch.int64, device=weight.device)
                self.age = torch.zeros(1, dtype=torch.int64, device=weight.device)

    def find(self, weight: Tensor) -> NearestClass | None:
        """Every class's nearest other and the cosine (float64) to it; None where they are to be found at every step."""
        if self.refresh == "every_step":
            return None
        _checks.class_weights(weight, at_least=2 if self.shard is None else 0)
        weight, room = weight.detach(), workspace_bytes(self.workspace_mb)
        self.start(weight)
        if self.shard is not None:
            return self.find_among_ranks(weight, room)
        if self.refresh == "certified":
            return NearestClass(*library.refresh_nearest(weight, *self.state(), room))
        cosine = library.frozen_nearest(weight, self.index, self.age, self.refresh, self.training, room)
        return NearestClass(cosine, self.index.clone())

    def find_among_ranks(self, weight: Tensor, room: int) -> NearestClass:
        refuse_transforms(weight)
        if _checks.shard(self.shard, weight, 1, 0.0) < 2:
            _checks.class_weights(weight, at_least=2)
        with torch.no_grad(), on_device(weight.device), torch.autocast(weight.device.type, enabled=False):
            run = kernels(weight.device)
            if self.refresh == "certified":
                return NearestClass(*sharded_certified.refresh(run, self.shard, weight, self.state(), room))
            cosine = sharded_certified.frozen(
                run, self.shard, weight, self.index, current_age(self.age), self.refresh, self.training, room
            )
        return NearestClass(cosine, self.index.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return exclusive_regularization(
            weight, nearest=self.find(weight), shard=self.shard, workspace_mb=self.workspace_mb
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest) -> None:
        # Whatever size was saved; a checkpoint without it is one of weights that have not been looked at.
        for name in self.kept_names() if self.shard is not None else ():
            state_dict.pop(prefix + name, None)
        for name in self.kept_names():
            saved = state_dict.get(prefix + name)
            device = getattr(saved if getattr(self, name) is None else getattr(self, name), "device", None)
            setattr(self, name, None if saved is None else torch.empty_like(saved, device=device))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"refresh={self.refresh!r}"
