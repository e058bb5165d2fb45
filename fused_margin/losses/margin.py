"""The margin losses as modules that own their class weights."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fused_margin import _checks
from fused_margin._ops.normalization import unit_rows
from fused_margin.distributed import DenseGradient, Shard, Shared, Total
from fused_margin.functional import NearestClass, margin_cross_entropy
from fused_margin.losses import settings
from fused_margin.losses.exclusive import ExclusiveRegularizer, checked_refresh
from fused_margin.losses.running_state import RunningState, once_per_step
from fused_margin.margins import HardNegatives, Margin, is_number, minimum_scale, warn

PROBABILITY = 0.9  # a sample should be able to reach for its class

ARGUMENTS = """
    Args:
        num_classes: C.
        embedding_size: D.
{own}
        exclusive_weight: lambda of RegularFace's exclusive term, added to the loss; 0 switches it off.
        exclusive_refresh: when the nearest classes of that term are looked for, see
            :class:`fused_margin.ExclusiveRegularizer`.
        class_weight: (C,) factors, as ``weight`` in ``torch.nn.CrossEntropyLoss``. A buffer.
        reduction, ignore_index, label_smoothing: as in ``torch.nn.CrossEntropyLoss``.
        beyond_pi, easy, gradient: see :class:`fused_margin.Margin`.
        sub_centers: rows of ``weight`` for every class, of which the nearest counts (see SubCenterArcFaceLoss).
        process_group: divides the classes among the ranks of a torch.distributed group; ``weight`` is then this rank's,
            a contiguous slice (the first C % world ranks have one class more). Every rank calls the loss with its own
            samples, and gets the loss of all ranks' samples (its own with ``reduction="none"``) and the gradients of
            that. DistributedDataParallel divides the backbone's gradients by the number of ranks: multiply the
            embeddings' by it, ``embeddings.register_hook(lambda g: g * world_size)``.
        sample_rate: share of the classes that take part in a step of training: those of the samples and others drawn by
            torch's generator (PartialFC, arXiv:2203.15565).
        sparse: with a sample_rate below 1, the gradient of ``weight`` is sparse, as that of ``torch.nn.Embedding``. False:
            it is dense, and any optimizer, ``clip_grad_norm_`` and DistributedDataParallel take it; weight decay and
            momentum move all classes. :class:`fused_margin.optim.ProjectedSGD` takes sparse gradients (with
            ``project=False`` it steps as ``torch.optim.SGD``), and leaves rows and momentum of the others alone.
        workspace_mb: bound on scratch memory in MiB, whatever C is.
        device, dtype: of ``weight``.

    Arguments are attributes that can be set between steps: a margin schedule is ``loss_fn.margin = 0.3``. A new value is
    checked as here, and nothing changes where the check raises. num_classes, embedding_size, sub_centers, process_group,
    device and dtype are fixed. A number set as ``scale`` fills a scale that is a tensor. All ranks of a group must set the
    same values. Under torch.compile the second value of a number, such as the margin or the scale, compiles once more, and
    further values do not; nor does a label smoothing or an exclusive weight of 0, after one more compilation.
    ``workspace_mb``, ``sample_rate``, ``ignore_index``, MagFace's ``norms`` and arguments that are not numbers compile
    for every value, so set those before.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Attributes:
        weight: (C, D) parameter, initialised N(0, 0.01); need not be normalised. Of this rank's classes, if divided.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
"""


class ClassificationLoss(settings.Settings):
    """What all losses share: the class weights, and the options of a cross-entropy over the classes."""

    SETTINGS: ClassVar = {
        "sample_rate": settings.number(0.0, 1.0, open_low=True),
        "sparse": settings.switch,
        "exclusive_weight": settings.number(0.0),
        "exclusive_refresh": checked_refresh,
        "reduction": settings.REDUCTION,
        "ignore_index": settings.index,
        "label_smoothing": settings.LABEL_SMOOTHING,
        "workspace_mb": settings.WORKSPACE_MB,
    }
    FIXED = ("num_classes", "embedding_size", "sub_centers", "process_group", "device", "dtype")

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        sub_centers: int = 1,
        process_group: dist.ProcessGroup | None = None,
        sample_rate: float = 1.0,
        sparse: bool = False,
        exclusive_weight: float = 0.0,
        exclusive_refresh: str | int = "every_step",
        class_weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        workspace_mb: float = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_classes = _checks.positive_index("num_classes", num_classes)
        self.embedding_size = _checks.positive_index("embedding_size", embedding_size)
        self.sub_centers = _checks.positive_index("sub_centers", sub_centers)
        self.exclusive = None
        self.shard = None if process_group is None else Shard(self.num_classes, process_group)
        self.sample_rate, self.sparse = sample_rate, sparse
        self.reduction, self.ignore_index = reduction, ignore_index
        self.label_smoothing, self.workspace_mb = label_smoothing, workspace_mb
        rows = (self.num_classes if self.shard is None else self.shard.size) * self.sub_centers
        weight = torch.empty(rows, self.embedding_size, device=device, dtype=dtype)
        _checks.class_weights(weight, at_least=1 if self.shard is None else 0)
        self.weight = nn.Parameter(weight)
        self.exclusive_weight = exclusive_weight
        self.exclusive_refresh = exclusive_refresh
        self.register_buffer("class_weight", None)
        self.class_weight = class_weight

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        return None if self.shard is None else self.shard.group

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "class_weight" and value is not None:
            value = torch.as_tensor(value, device=self.weight.device).detach()
            _checks.per_class(name, value, self.weight, self.num_classes)
        super().__setattr__(name, value)

    def check_together(self, values: dict[str, Any]) -> None:
        exclusive_weight = values.get("exclusive_weight", 0.0)
        _checks.reduction(values.get("reduction", "mean"), exclusive_weight)
        if exclusive_weight > 0 and self.num_classes < 2:
            raise ValueError(
                f"num_classes: expected at least 2 classes, got {self.num_classes}, for the exclusive term"
            )
        if self.sub_centers > 1:
            _checks.absent(
                "sub_centers above 1",
                exclusive_weight=exclusive_weight,
                label_smoothing=values.get("label_smoothing", 0.0),
            )
        if values.get("sample_rate", 1.0) < 1:
            _checks.absent("a sample_rate below 1", label_smoothing=values.get("label_smoothing", 0.0))
        refresh = values.get("exclusive_refresh", "every_step")
        if exclusive_weight > 0 and refresh != "every_step" and getattr(self.exclusive, "refresh", None) != refresh:
            _checks.searched_device("weight", self.weight)

    def setting_changed(self, name: str) -> None:
        # torch.compile would make constants of these numbers, for good, where their values decide what is computed
        if name == "label_smoothing":
            self.has_label_smoothing = self.label_smoothing > 0
        elif name == "exclusive_weight":
            self.has_exclusive_term = self.exclusive_weight > 0
        if name == "sample_rate":
            group = None if self.shard is None else self.shard.group
            divided = group is not None or self.sample_rate < 1
            self.shard = Shard(self.num_classes, group, self.sample_rate) if divided else None
        elif name == "workspace_mb" and self.exclusive is not None:
            self.exclusive.workspace_mb = self.workspace_mb
        elif name == "exclusive_refresh" or (name == "exclusive_weight" and "exclusive_refresh" in self.__dict__):
            self.start_exclusive()

    def start_exclusive(self) -> None:
        """Makes what keeps nearest classes from step to step, if it is needed and not there yet."""
        refresh = self.exclusive_refresh
        if self.exclusive is not None and self.exclusive.refresh != refresh:
            self.exclusive = None
        if self.exclusive is None and self.exclusive_weight > 0 and refresh != "every_step":
            group = None if self.shard is None else self.shard.group
            shard = None if group is None else Shard(self.num_classes, group)
            self.exclusive = ExclusiveRegularizer(refresh=refresh, shard=shard, workspace_mb=self.workspace_mb)
            self.exclusive.train(self.training).start(self.weight)

    def cross_entropy_options(self) -> dict:
        """What the functional forms of all losses take."""
        return {
            "class_weight": self.class_weight,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing if self.has_label_smoothing else 0.0,
            "workspace_mb": self.workspace_mb,
        }

    def current_shard(self) -> Shard | None:
        """In evaluation mode every class takes part, and on meta too, where nothing can be drawn."""
        if self.shard is None or (self.weight.is_meta and self.shard.group is None):
            return None
        return self.shard if self.training else replace(self.shard, sample_rate=1.0)

    def weight_of_step(self) -> Tensor:
        """`weight`, whose gradient is dense unless a sparse one is asked for."""
        shard = self.current_shard()
        drawn = shard is not None and shard.sample_rate < 1
        return DenseGradient.apply(self.weight) if drawn and not self.sparse else self.weight

    def sharded_state_dict(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
        """The state of all ranks, for ``torch.distributed.checkpoint``: saved by any number of ranks, loaded by any other.

        ``dcp.save(loss_fn.sharded_state_dict(), checkpoint_id=folder)`` on every rank, and ``dcp.load`` with what the
        same call gives there, which fills parameters and buffers in place. What ``exclusive_refresh`` keeps is not in
        it: after a load it is made anew where weights have turned too far from it, or an integer's next turn has come.

        Args:
            optimizer: what it keeps of the parameters and is as large (their momentum) goes with it; before loading it
                must have been through a step, or :func:`fused_margin.optim.start_momentum` of each.
        """
        state = {name: value for name, value in self.state_dict().items() if not name.startswith("exclusive.")}
        divided = self.class_parameters()
        for name, parameter in self.named_parameters():
            kept = {} if optimizer is None else optimizer.state.get(parameter, {})
            found = {
                f"{name}.{key}": v for key, v in kept.items() if isinstance(v, Tensor) and v.shape == parameter.shape
            }
            found[name], of_all = state[name], self.shard is not None and name in divided
            state |= {key: self.shard.of_all(value) if of_all else value for key, value in found.items()}
        return state

    def class_parameters(self) -> dict[str, nn.Parameter]:
        """Those that have a row for every class, or several: this rank's, where classes are divided."""
        return {"weight": self.weight}

    def total(self, value: Tensor) -> Tensor:
        """The sum over ranks, each of which has its own samples."""
        return value if self.shard is None else Total.apply(self.shard, value)

    def shared(self, value: float | Tensor | None) -> float | Tensor | None:
        """A number that every rank has; one that is learned gets the gradient of all ranks' samples on each of them."""
        learned = self.shard is not None and isinstance(value, Tensor) and value.requires_grad
        return Shared.apply(self.shard, value) if learned else value

    def nearest(self) -> NearestClass | None:
        """Every class's nearest other, if `exclusive_refresh` keeps them; None: to be found."""
        wanted = self.exclusive is not None and self.has_exclusive_term
        return self.exclusive.find(self.weight) if wanted else None

    def own_repr(self) -> list[str]:
        """What tells one loss from another, as name=value."""
        return []

    def extra_repr(self) -> str:
        parts = [f"num_classes={self.num_classes}", f"embedding_size={self.embedding_size}", *self.own_repr()]
        if self.sub_centers > 1:
            parts.append(f"sub_centers={self.sub_centers}")
        if self.exclusive_weight:
            parts.append(f"exclusive_weight={self.exclusive_weight}")
        return ", ".join(parts)


class MarginLoss(ClassificationLoss):
    """What the margin losses share: the margin, the scale, and how they meet the embeddings.

    A scale given as a 0-d tensor becomes a buffer, as a ``torch.nn.Parameter`` a parameter that is learned.

    Attributes:
        NUMBERS: the settings that are numbers of :class:`fused_margin.Margin`, and which they are.
    """

    SETTINGS: ClassVar = {**settings.MARGIN_OPTIONS, "scale": settings.scale}
    NUMBERS: ClassVar[dict[str, str]] = {}
    scale_varies = False  # whether it has been changed

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        numbers: dict[str, float],  # Margin's m1, m2, m3, where they are not settings
        scale: float | Tensor | None,
        *,
        beyond_pi: str = "monotone",
        easy: bool = False,
        gradient: str = "exact",
        **options,
    ):
        _checks.scale(scale)
        super().__init__(num_classes, embedding_size, **options)
        Margin(**numbers)  # raises
        self.numbers = numbers
        self.beyond_pi, self.easy, self.gradient = beyond_pi, easy, gradient
        self.scale = scale
        self.reset_parameters()

    def keep_setting(self, name: str, value: Any) -> None:
        if name != "scale":
            super().keep_setting(name, value)
            return
        if is_number(value):
            self.warn_of_small(value)
        old = getattr(self, "scale", None)
        if isinstance(old, Tensor) and is_number(value):  # it stays a buffer, or a parameter
            with torch.no_grad():
                old.fill_(value)
            return
        self.scale_varies = self.scale_varies or "scale" in self.__dict__
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and "scale" not in self._buffers:
            self.__dict__.pop("scale", None)
            self._parameters.pop("scale", None)
            self.register_buffer("scale", value)
        else:
            super().keep_setting(name, value)

    def warn_of_small(self, scale: float) -> None:
        least = minimum_scale(self.num_classes, PROBABILITY) if self.num_classes > 1 else 0.0
        if scale < least:
            warn(
                f"scale {scale:g} is below {least:.2f}: with {self.num_classes} classes no sample can reach a "
                f"probability of {PROBABILITY} for its class (see fused_margin.margins.minimum_scale)"
            )

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        # before a margin is made of them; there may be more ranks than classes
        _checks.batch(embeddings, self.weight, labels, at_least=1 if self.shard is None else 0)
        return margin_cross_entropy(
            embeddings,
            self.weight_of_step(),
            labels,
            self.current_margin(embeddings, labels),
            self.current_scale(labels.device),
            exclusive_weight=self.exclusive_weight if self.has_exclusive_term else 0.0,
            sub_centers=self.sub_centers,
            hard_negatives=self.hard_negatives(embeddings, labels),
            nearest=self.nearest(),
            shard=self.current_shard(),
            **self.cross_entropy_options(),
        )

    @property
    def margin_options(self) -> dict[str, Any]:
        """Options of whatever margin."""
        return {"beyond_pi": self.beyond_pi, "easy": self.easy, "gradient": self.gradient}

    @property
    def margin_function(self) -> Margin:
        """The margin that all samples have in common. Setting it sets the attributes that it is made of."""
        numbers = {number: getattr(self, setting) for setting, number in self.NUMBERS.items()}
        return Margin(**{**self.numbers, **numbers}, **self.margin_options)

    @margin_function.setter
    def margin_function(self, value: Margin) -> None:
        _checks.margin(value)
        names = {number: setting for setting, number in self.NUMBERS.items()}
        for number, default in (("m1", 1.0), ("m2", 0.0), ("m3", 0.0), ("annealing", 0.0)):
            if number in names or number in self.numbers:
                continue
            if getattr(value, number) is not default and getattr(value, number) != default:
                raise ValueError(
                    f"margin_function: expected {number}={default:g} in {type(self).__name__}, got {getattr(value, number)}"
                )
        self.numbers = {number: getattr(value, number) for number in self.numbers}
        for number, setting in (*names.items(), *((name, name) for name in self.margin_options)):
            setattr(self, setting, getattr(value, number))

    def current_margin(self, embeddings: Tensor, labels: Tensor) -> Margin:
        """The margin of this step."""
        return self.margin_function

    def current_scale(self, device: torch.device) -> float | Tensor | None:
        """The scale of this step."""
        if torch.compiler.is_compiling() and self.scale_varies and is_number(self.scale):
            # a number would be a constant of the graph, and every value compiled for
            return torch.ones((), dtype=torch.float64, device=device) * self.scale
        return self.shared(self.scale)

    def hard_negatives(self, embeddings: Tensor, labels: Tensor) -> HardNegatives | None:
        """What becomes of near classes in this step."""
        return None

    def logits(self, embeddings: Tensor) -> Tensor:
        """Scaled cosines (N, C) of embeddings (N, D), without margin, for inference; of the nearest sub-centers.

        Of this rank's classes, where they are divided.
        """
        _checks.embeddings_for(embeddings, self.weight, at_least=0)
        dtype = torch.promote_types(embeddings.dtype, self.weight.dtype)
        # Embeddings in float64, because gradients by their norm are as large as their squares. Of weight, which can be much
        # larger, no float64 copy is made; in a half an inverse norm might be too small.
        unit = unit_rows(embeddings, torch.float64)[0].to(dtype)
        unit_weight = unit_rows(self.weight, torch.promote_types(self.weight.dtype, torch.float32))[0].to(dtype)
        cosine, scale = F.linear(unit, unit_weight), self.scale
        if self.sub_centers > 1:
            cosine = cosine.unflatten(1, (-1, self.sub_centers)).amax(dim=2)
        if scale is None:
            scale = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True, dtype=torch.float64).to(dtype)
        return cosine * scale

    def margin_repr(self) -> list[str]:
        return [f"{name}={getattr(self.margin_function, name)}" for name in ("m1", "m2", "m3")]

    def own_repr(self) -> list[str]:
        return [f"scale={self.scale}", *self.margin_repr()]


class ArcFaceLoss(MarginLoss):
    __doc__ = (
        "ArcFace: an additive angular margin, ``psi = cos(theta + margin)`` (arXiv:1801.07698, eq. 3)."
        + ARGUMENTS.format(own="        margin: angle in radians.\n        scale: s of the logits.")
    )

    SETTINGS: ClassVar = {"margin": settings.angle(-math.inf)}
    NUMBERS: ClassVar = {"margin": "m2"}

    def __init__(self, num_classes: int, embedding_size: int, margin: float = 0.5, scale: float = 64.0, **options):
        super().__init__(num_classes, embedding_size, {}, scale, **options)
        self.margin = margin


class SubCenterArcFaceLoss(MarginLoss):
    __doc__ = (
        "Sub-center ArcFace: ArcFace to the nearest of several centers a class (ECCV 2020, eq. 3), for noisy labels."
        + ARGUMENTS.format(
            own="        margin: angle in radians.\n"
            "        scale: s of the logits.\n"
            "        sub_centers: rows of ``weight`` for every class, class by class: it is (C * sub_centers, D)."
        )
    )

    SETTINGS: ClassVar = {"margin": settings.angle(-math.inf)}
    NUMBERS: ClassVar = {"margin": "m2"}

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.5,
        scale: float = 64.0,
        sub_centers: int = 3,
        **options,
    ):
        super().__init__(num_classes, embedding_size, {}, scale, sub_centers=sub_centers, **options)
        self.margin = margin


class CosFaceLoss(MarginLoss):
    __doc__ = (
        "CosFace: an additive cosine margin, ``psi = cos(theta) - margin`` (arXiv:1801.09414, eq. 4)."
        + ARGUMENTS.format(own="        margin: cosine.\n        scale: s of the logits.")
    )

    SETTINGS: ClassVar = {"margin": settings.number(-math.inf)}
    NUMBERS: ClassVar = {"margin": "m3"}

    def __init__(self, num_classes: int, embedding_size: int, margin: float = 0.35, scale: float = 64.0, **options):
        super().__init__(num_classes, embedding_size, {}, scale, **options)
        self.margin = margin


class NormFaceLoss(MarginLoss):
    __doc__ = "NormFace: normalised softmax, no margin (arXiv:1704.06369)." + ARGUMENTS.format(
        own="        scale: s of the logits."
    )

    def __init__(self, num_classes: int, embedding_size: int, scale: float = 64.0, **options):
        super().__init__(num_classes, embedding_size, {}, scale, **options)


class CombinedMarginLoss(MarginLoss):
    __doc__ = "All three margins, ``psi = cos(m1 * theta + m2) - m3`` (arXiv:1801.07698, eq. 4)." + ARGUMENTS.format(
        own="        m1: factor on the angle.\n        m2: angle in radians.\n        m3: cosine.\n        scale: s of the logits."
    )

    SETTINGS: ClassVar = dict.fromkeys(("m1", "m2", "m3"), settings.margin_number)
    NUMBERS: ClassVar = {"m1": "m1", "m2": "m2", "m3": "m3"}

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        m1: float = 1.0,
        m2: float = 0.3,
        m3: float = 0.2,
        scale: float = 64.0,
        **options,
    ):
        super().__init__(num_classes, embedding_size, {}, scale, **options)
        self.m1, self.m2, self.m3 = m1, m2, m3


class ModifiedSoftmaxLoss(MarginLoss):
    __doc__ = (
        "Modified softmax: A-Softmax without margin, logits ``|x_i| cos_ij`` (arXiv:1704.08063, eq. 5)."
        + ARGUMENTS.format(own="")
    )

    def __init__(self, num_classes: int, embedding_size: int, **options):
        super().__init__(num_classes, embedding_size, {}, None, **options)


class AnnealedMargin(RunningState):
    """SphereFace's annealing, for a loss with ``margin_function`` and ``weight``."""

    RUNNING = ("iteration",)
    SETTINGS: ClassVar = {"margin": settings.number(1.0), "annealing": settings.switch}

    def setting_changed(self, name: str) -> None:
        super().setting_changed(name)
        if name == "annealing" and self.annealing and "iteration" not in self._buffers:
            self.register_buffer("iteration", torch.zeros((), dtype=torch.int64, device=self.weight.device))

    def annealed_margin(self) -> Margin:
        if not self.annealing:
            return self.margin_function
        strength = torch.clamp(1000.0 / (1.0 + 0.12 * self.iteration.double()), min=5.0)
        return replace(self.margin_function, annealing=strength)

    def count_iteration(self) -> None:
        if self.training and self.annealing:
            self.update_state("iteration", self.iteration + 1)  # only after a loss: a call that raised was no iteration


class SphereFaceLoss(AnnealedMargin, MarginLoss):
    __doc__ = (
        "SphereFace / A-Softmax: a multiplicative angular margin (arXiv:1704.08063, eq. 7)."
        + ARGUMENTS.format(
            own="        margin: factor on the angle, any real number >= 1.\n"
            "        scale: s of the logits; None, the paper's choice, is every embedding's own norm.\n"
            "        annealing: start near plain softmax, as published: the target cosine used is\n"
            "            ``(lambda * cos(theta) + psi) / (1 + lambda)`` with lambda = max(5, 1000 / (1 + 0.12 * iteration));\n"
            "            every forward in training mode is an iteration."
        )
        + "        iteration: int64 buffer (only with annealing), saved in the state dict.\n"
    )

    NUMBERS: ClassVar = {"margin": "m1"}

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 4,
        scale: float | None = None,
        annealing: bool = True,
        **options,
    ):
        super().__init__(num_classes, embedding_size, {}, scale, **options)
        self.margin, self.annealing = margin, annealing

    def current_margin(self, embeddings: Tensor, labels: Tensor) -> Margin:
        return self.annealed_margin()

    @once_per_step
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        loss = super().forward(embeddings, labels)
        self.count_iteration()
        return loss
