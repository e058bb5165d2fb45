"""The base classes of the losses: class weights, the options of a cross-entropy over classes, margin and scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fused_margin import _checks
from fused_margin._ops import library
from fused_margin._ops.normalization import unit_rows
from fused_margin.distributed import Shard
from fused_margin.functional import NearestClass, unchecked_margin_cross_entropy
from fused_margin.losses import settings
from fused_margin.losses.exclusive import ExclusiveRegularizer, checked_refresh
from fused_margin.margins import HardNegatives, Margin, minimum_scale, warn

if TYPE_CHECKING:
    from typing_extensions import Unpack

PROBABILITY = 0.9  # a sample should be able to reach it for its class


class ClassificationOptions(TypedDict, total=False):
    """Keyword arguments of every loss with class weights; :class:`MarginLoss` describes them."""

    sub_centers: int
    process_group: dist.ProcessGroup | None
    sample_rate: float
    sparse: bool
    exclusive_weight: float
    exclusive_refresh: str | int
    class_weight: Tensor | None
    reduction: str
    ignore_index: int
    label_smoothing: float
    workspace_mb: float
    device: torch.device | str | None
    dtype: torch.dtype | None


class MarginOptions(ClassificationOptions, total=False):
    """Keyword arguments of every margin loss; :class:`MarginLoss` describes them."""

    beyond_pi: str
    easy: bool
    gradient: str


class ClassificationLoss(settings.Settings):
    """The class weights of a loss, and the options of a cross-entropy over the classes.

    See :class:`MarginLoss` for the arguments.
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {
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

    weight: nn.Parameter
    class_weight: Tensor | None
    num_classes: int
    embedding_size: int
    sub_centers: int

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
        self.exclusive: ExclusiveRegularizer | None = None
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
        if name == "workspace_mb" and self.exclusive is not None:
            self.exclusive.workspace_mb = self.workspace_mb
        elif name == "exclusive_refresh" or (name == "exclusive_weight" and "exclusive_refresh" in self.__dict__):
            self.start_exclusive()

    def start_exclusive(self) -> None:
        """Makes the cache of nearest classes, if ``exclusive_refresh`` needs one and there is none yet."""
        refresh = self.exclusive_refresh
        if self.exclusive is not None and self.exclusive.refresh != refresh:
            self.exclusive = None
        if self.exclusive is None and self.exclusive_weight > 0 and refresh != "every_step":
            self.exclusive = ExclusiveRegularizer(refresh=refresh, shard=self.shard, workspace_mb=self.workspace_mb)
            self.exclusive.train(self.training).start(self.weight)

    def cross_entropy_options(self) -> dict[str, Any]:
        """Options of this step that all losses take. In evaluation, and on meta, all classes take part."""
        return {
            "class_weight": self.class_weight,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing if self.has_label_smoothing else 0.0,
            "shard": self.shard,
            "sample_rate": self.sample_rate if self.training and not self.weight.is_meta else 1.0,
            "sparse": self.sparse,
            "workspace_mb": self.workspace_mb,
        }

    def sharded_state_dict(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
        """The state of all ranks, for ``torch.distributed.checkpoint``: saved by any number of ranks, loaded by any other.

        ``dcp.save(loss_fn.sharded_state_dict(), checkpoint_id=folder)`` on every rank; ``dcp.load`` with the result of the
        same call fills parameters and buffers in place. The cache of ``exclusive_refresh`` is not saved; it is rebuilt
        when needed.

        Args:
            optimizer: adds its state of each parameter that has the parameter's shape (momentum). Before loading, the
                optimizer must have made a step, or :func:`fused_margin.optim.start_momentum` of each parameter.
        """
        state = {name: value for name, value in self.state_dict().items() if not name.startswith("exclusive.")}
        divided = self.class_parameters()
        for name, parameter in self.named_parameters():
            kept = {} if optimizer is None else optimizer.state.get(parameter, {})
            found = {
                f"{name}.{key}": v for key, v in kept.items() if isinstance(v, Tensor) and v.shape == parameter.shape
            }
            found[name] = state[name]
            if self.shard is not None and name in divided:
                found = {key: self.shard.sharded_tensor(value) for key, value in found.items()}
            state |= found
        return state

    def class_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters with one or several rows per class: this rank's, where classes are divided."""
        return {"weight": self.weight}

    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum over ranks of a value of each rank's own samples."""
        return value if self.shard is None else library.all_reduce_forward(value, self.shard.name)

    def all_reduce_gradient(self, value: float | Tensor | None) -> float | Tensor | None:
        """A number that every rank has; a learned one gets the gradient of all ranks' samples on each of them."""
        learned = self.shard is not None and isinstance(value, Tensor) and value.requires_grad
        return library.all_reduce_backward(value, self.shard.name) if learned else value

    def nearest(self) -> NearestClass | None:
        """Every class's nearest other class from the cache of ``exclusive_refresh``; None: to be searched."""
        return self.exclusive.find(self.weight) if self.has_exclusive_term else None

    def own_repr(self) -> list[str]:
        """The arguments that tell one loss from another, as name=value."""
        return []

    def extra_repr(self) -> str:
        parts = [f"num_classes={self.num_classes}", f"embedding_size={self.embedding_size}", *self.own_repr()]
        if self.sub_centers > 1:
            parts.append(f"sub_centers={self.sub_centers}")
        if self.exclusive_weight:
            parts.append(f"exclusive_weight={self.exclusive_weight}")
        return ", ".join(parts)


class MarginLoss(ClassificationLoss):
    """The base class of the margin losses: cross-entropy over scaled cosines with a margin on the target.

    See :func:`fused_margin.functional.margin_cross_entropy` for the formula. Subclasses have arguments of their own
    before these.

    Args:
        num_classes: C.
        embedding_size: D.
        numbers: Margin's m1, m2 and m3, where they are no attributes of the subclass.
        scale: s of the logits, a positive number; None: each embedding's own norm. A 0-d tensor becomes a buffer, a
            ``torch.nn.Parameter`` a learned parameter.
        exclusive_weight: lambda of RegularFace's exclusive term, which is added to the loss; 0 switches it off.
        exclusive_refresh: when the nearest classes of that term are searched, see
            :class:`fused_margin.ExclusiveRegularizer`.
        class_weight: (C,) factors, as ``weight`` in ``torch.nn.CrossEntropyLoss``. A buffer.
        reduction, ignore_index, label_smoothing: as in ``torch.nn.CrossEntropyLoss``.
        beyond_pi, easy, gradient: see :class:`fused_margin.Margin`.
        sub_centers: rows of ``weight`` per class, of which the nearest counts (see SubCenterArcFaceLoss).
        process_group: divides the classes among the ranks of a torch.distributed group; ``weight`` then holds this
            rank's classes, a contiguous slice (the first C % world_size ranks have one class more). Every rank calls the
            loss with its own samples, and gets the loss of all ranks' samples (its own with ``reduction="none"``) and the
            gradients of that. DistributedDataParallel divides the backbone's gradients by the number of ranks: multiply
            the embeddings' by it, ``embeddings.register_hook(lambda g: g * world_size)``.
        sample_rate: share of the classes that take part in a training step: the classes of the samples and others drawn
            by torch's generator (PartialFC, arXiv:2203.15565).
        sparse: with a sample_rate below 1, the gradient of ``weight`` is sparse, as in ``torch.nn.Embedding``. False: the
            gradient is dense, and any optimizer, ``clip_grad_norm_`` and DistributedDataParallel take it; weight decay and
            momentum move all classes. :class:`fused_margin.optim.ProjectedSGD` takes sparse gradients (with
            ``project=False`` it steps as ``torch.optim.SGD``), and leaves rows and momentum of the other classes alone.
        workspace_mb: bound on scratch memory in MiB, for any C.
        device, dtype: of ``weight``.

    Arguments are attributes that can be set between steps: a margin schedule is ``loss_fn.margin = 0.3``. A new value is
    checked as in the constructor, and nothing changes if the check raises. num_classes, embedding_size, sub_centers,
    process_group, device and dtype are fixed. A number set as ``scale`` fills a scale that is a tensor. All ranks of a
    group must set the same values. Under torch.compile the second value of a number, such as the margin or the scale,
    compiles once more, and further values do not; nor does a label smoothing or an exclusive weight of 0, after one more
    compilation. ``workspace_mb``, ``sample_rate``, ``ignore_index``, MagFace's ``norms`` and arguments that are not numbers
    compile for every value, so set those before.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Attributes:
        weight: (C, D) parameter, initialised N(0, 0.01); need not be normalised. This rank's classes, if divided.
        NUMBERS: settings that are numbers of :class:`fused_margin.Margin`, and the names of those.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {**settings.MARGIN_OPTIONS, "scale": settings.scale}
    NUMBERS: ClassVar[dict[str, str]] = {}
    scale_varies = False  # whether it has been changed

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        numbers: dict[str, float],
        scale: float | Tensor | None,
        *,
        beyond_pi: str = "monotone",
        easy: bool = False,
        gradient: str = "exact",
        **options: Unpack[ClassificationOptions],
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
        if _checks.is_number(value):
            self.warn_of_small(value)
        old = getattr(self, "scale", None)
        if isinstance(old, Tensor) and _checks.is_number(value):  # it stays a buffer, or a parameter
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

    def setting_changed(self, name: str) -> None:
        super().setting_changed(name)
        self.__dict__["_margin"] = None  # to be made of the new numbers

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
        return unchecked_margin_cross_entropy(
            embeddings,
            self.weight,
            labels,
            self.current_margin(embeddings, labels),
            self.scale if self.shard is None and not self.scale_varies else self.current_scale(labels.device),
            exclusive_weight=self.exclusive_weight if self.has_exclusive_term else 0.0,
            sub_centers=self.sub_centers,
            hard_negatives=self.hard_negatives(embeddings, labels),
            nearest=None if self.exclusive is None else self.nearest(),
            **self.cross_entropy_options(),
        )

    @property
    def margin_options(self) -> dict[str, Any]:
        """Options of any margin."""
        return {"beyond_pi": self.beyond_pi, "easy": self.easy, "gradient": self.gradient}

    @property
    def margin_function(self) -> Margin:
        """The margin that all samples have in common. Setting it sets the attributes that it consists of."""
        margin = self.__dict__.get("_margin")
        if margin is None or torch.compiler.is_compiling():  # compiled, the numbers stay variables
            numbers = {number: getattr(self, setting) for setting, number in self.NUMBERS.items()}
            margin = Margin(**{**self.numbers, **numbers}, **self.margin_options)
            if not torch.compiler.is_compiling():
                self.__dict__["_margin"] = margin
        return margin

    @margin_function.setter
    def margin_function(self, value: Margin) -> None:
        _checks.instance("margin", value, Margin)
        names = {number: setting for setting, number in self.NUMBERS.items()}
        for number, default in (("m1", 1.0), ("m2", 0.0), ("m3", 0.0), ("annealing", 0.0)):
            if number in names or number in self.numbers:
                continue
            if getattr(value, number) is not default and getattr(value, number) != default:
                raise ValueError(
                    f"margin_function: expected {number}={default:g} in {type(self).__name__}, got {getattr(value, number)}"
                )
        self.numbers = {number: getattr(value, number) for number in self.numbers}
        self.__dict__["_margin"] = None
        for number, setting in (*names.items(), *((name, name) for name in self.margin_options)):
            setattr(self, setting, getattr(value, number))

    def current_margin(self, embeddings: Tensor, labels: Tensor) -> Margin:
        """The margin of this step."""
        return self.margin_function

    def current_scale(self, device: torch.device) -> float | Tensor | None:
        """The scale of this step."""
        if torch.compiler.is_compiling() and self.scale_varies and _checks.is_number(self.scale):
            # a number would be a constant of the graph, and every value compiled for
            return torch.ones((), dtype=torch.float64, device=device) * self.scale
        return self.scale if self.shard is None else self.all_reduce_gradient(self.scale)

    def hard_negatives(self, embeddings: Tensor, labels: Tensor) -> HardNegatives | None:
        """The treatment of near classes in this step."""
        return None

    def logits(self, embeddings: Tensor) -> Tensor:
        """Scaled cosines (N, C) of embeddings (N, D), without margin, for inference; to the nearest sub-centers.

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
