"""RegularFace's exclusive term as a module, with what it keeps of the nearest classes from step to step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_margin import checks
from fused_margin.nearest import NearestClass, exclusive_regularization
from fused_margin.ops import library
from fused_margin.ops.certified import NearestState, fits, new_state
from fused_margin.ops.problem import workspace_bytes


def checked_refresh(name: str, value: str | int) -> str | int:
    """Raises ValueError or TypeError for what is no way to refresh."""
    if isinstance(value, str):
        return checks.one_of(name, value, ("every_step", "certified"))
    return checks.positive_index(name, value)


class ExclusiveRegularizer(nn.Module):
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
        workspace_mb: bound on scratch memory in MiB; what is kept comes on top.

    Shape:
        weight (C, D), C >= 2 -> scalar.

    Attributes:
        swept: with ``"certified"``, a (3,) buffer: classes that were looked at again so far, those that were not, and
            whole sweeps.

    What is kept is made in the first call, and is in the state dict. Weights may change in any way between calls: how far
    each has turned is measured, not assumed.

    Raises:
        ValueError, TypeError: for a ``refresh`` that is none of these.
        RuntimeError: for weights on a CUDA device, unless ``refresh`` is ``"every_step"``: not there yet.
    """

    def __init__(self, *, refresh: str | int = "every_step", workspace_mb: float = 256):
        super().__init__()
        checks.number("workspace_mb", workspace_mb, 0.0, open_low=True)
        self.refresh, self.workspace_mb = checked_refresh("refresh", refresh), workspace_mb
        for name in self.kept_names():
            self.register_buffer(name, None)

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
        checks.searched_device("weight", weight)
        if self.refresh == "certified":
            state = self.state()
            if state is None or not fits(state, weight):
                for name, value in new_state(weight)._asdict().items():
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
        checks.class_weights(weight, at_least=2)
        weight, room = weight.detach(), workspace_bytes(self.workspace_mb)
        self.start(weight)
        if self.refresh == "certified":
            return NearestClass(*library.refresh_nearest(weight, *self.state(), room))
        cosine = library.frozen_nearest(weight, self.index, self.age, self.refresh, self.training, room)
        return NearestClass(cosine, self.index.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return exclusive_regularization(weight, nearest=self.find(weight), workspace_mb=self.workspace_mb)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest) -> None:
        # Whatever size was saved; a checkpoint without it is one of weights that have not been looked at.
        for name in self.kept_names():
            saved = state_dict.get(prefix + name)
            device = getattr(saved if getattr(self, name) is None else getattr(self, name), "device", None)
            setattr(self, name, None if saved is None else torch.empty_like(saved, device=device))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"refresh={self.refresh!r}"
