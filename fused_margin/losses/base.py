"""Base classes of the losses: class weights, options of a cross-entropy over classes, margin and scale."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from fused_margin import _checks
from fused_margin._cross_entropy import margin_cross_entropy
from fused_margin._ops import collectives
from fused_margin._ops.normalization import unit_rows
from fused_margin._ops.row_update import WeightStepper
from fused_margin.distributed import Shard
from fused_margin.losses import settings
from fused_margin.losses.exclusive import ExclusiveRegularizer, checked_refresh
from fused_margin.losses.options import ClassificationOptions
from fused_margin.margins import HardNegatives, Margin, minimum_scale, warn
from fused_margin.nearest import NearestClass

T = TypeVar("T")

PROBABILITY = 0.9  # of a sample's class; a scale too small to reach it triggers a warning


class ClassificationLoss(settings.Settings):
    """The base class of all losses with class weights: the options of a cross-entropy over the classes.

    See :class:`fused_margin.MarginLoss` for the arguments.

    Attributes:
        weight: (C, D) parameter. If classes are divided, it holds the classes of this rank.
        shard: the :class:`fused_margin.distributed.Shard` of this rank, or None if classes are not divided.

    Examples:
        >>> import torch, fused_margin
        >>> loss_fn = fused_margin.SoftmaxLoss(num_classes=10, embedding_size=4)
        >>> isinstance(loss_fn, fused_margin.losses.ClassificationLoss)
        True
        >>> {name: tuple(value.shape) for name, value in loss_fn.sharded_state_dict().items()}
        {'weight': (10, 4), 'bias': (10,)}
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {
        "sample_rate": settings.number(0.0, 1.0, open_low=True),
        "sparse": settings.boolean,
        "exclusive_weight": settings.number(0.0),
        "exclusive_refresh": checked_refresh,
        "reduction": settings.REDUCTION,
        "ignore_index": settings.integer,
        "label_smoothing": settings.LABEL_SMOOTHING,
        "workspace_mb": settings.WORKSPACE_MB,
    }
    FIXED = ("num_classes", "embedding_size", "sub_centers", "process_group", "device", "dtype")

    weight: nn.Parameter
    class_weight: Tensor | None
    num_classes: int
    embedding_size: int
    sub_centers: int
    sample_rate: float
    sparse: bool
    exclusive_weight: float
    exclusive_refresh: str | int
    reduction: str
    ignore_index: int
    label_smoothing: float
    workspace_mb: float
    stepper: WeightStepper | None = None  # set by fused_margin.optim.step_in_backward
    has_label_smoothing: bool
    has_exclusive_term: bool

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
        """The group whose ranks the classes are divided among, or None."""
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

    def check_parameters(self) -> None:
        """Checks class_weight, sub_centers and the shard against weight, which is another tensor after functional_call."""
        _checks.sub_centers(self.sub_centers, self.weight, 0.0, 0.0)
        classes = _checks.shard(self.shard, self.weight, self.sub_centers, 0.0)
        _checks.per_class("class_weight", self.class_weight, self.weight, classes)

    def __setstate__(self, state: dict[str, Any]) -> None:
        shard = state.get("shard")
        if shard is not None and shard.group is None:  # version 0.1 pickled losses that draw classes with a shard
            state = {**state, "shard": None}
        super().__setstate__(state)

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
            _checks.exact_search_device("weight", self.weight)

    def setting_changed(self, name: str) -> None:
        # Flags, because comparing these numbers in forward would make them constants under torch.compile.
        if name == "label_smoothing":
            self.has_label_smoothing = self.label_smoothing > 0
        elif name == "exclusive_weight":
            self.has_exclusive_term = self.exclusive_weight > 0
        if name == "workspace_mb" and self.exclusive is not None:
            self.exclusive.workspace_mb = self.workspace_mb
        elif name == "exclusive_refresh" or (name == "exclusive_weight" and "exclusive_refresh" in self.__dict__):
            # The constructor sets exclusive_weight first, when exclusive_refresh is not an attribute yet.
            self.create_nearest_cache()

    def create_nearest_cache(self) -> None:
        """Creates the cache of nearest classes, if ``exclusive_refresh`` needs one and there is none."""
        refresh = self.exclusive_refresh
        if self.exclusive is not None and self.exclusive.refresh != refresh:
            self.exclusive = None
        if self.exclusive is None and self.exclusive_weight > 0 and refresh != "every_step":
            self.exclusive = ExclusiveRegularizer(refresh=refresh, shard=self.shard, workspace_mb=self.workspace_mb)
            self.exclusive.train(self.training).create_cache(self.weight)

    def cross_entropy_options(self) -> dict[str, Any]:
        """The options of this step that all losses share. In evaluation mode, and on meta, all classes take part."""
        return {
            "class_weight": self.class_weight,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing if self.has_label_smoothing else 0.0,
            "shard": self.shard,
            "sample_rate": self.sample_rate if self.training and not self.weight.is_meta else 1.0,
            "sparse": self.sparse,
            "workspace_mb": self.workspace_mb,
            # The weight is another tensor within torch.func.functional_call.
            "stepper": self.stepper if self.stepper is not None and self.stepper.parameter is self.weight else None,
        }

    def sharded_state_dict(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
        """The state of all ranks, for ``torch.distributed.checkpoint``. The number of ranks may change between save and load.

        Every rank calls ``dcp.save(loss_fn.sharded_state_dict(), checkpoint_id=folder)``. ``dcp.load`` with the result of
        the same call fills parameters and buffers in place. The cache of ``exclusive_refresh`` is not saved; it is
        rebuilt when needed.

        Args:
            optimizer: its state that has a parameter's shape (momentum) is included. Before loading, the optimizer must
                have made a step, or :func:`fused_margin.optim.start_momentum` must have been called for each parameter.

        Returns:
            Tensors by name. If classes are divided, the class parameters are ShardedTensors.
        """
        state = {name: value for name, value in self.state_dict().items() if not name.startswith("exclusive.")}
        divided = self.class_parameters()
        for name, parameter in self.named_parameters():
            optimizer_state = {} if optimizer is None else optimizer.state.get(parameter, {})
            tensors = {
                f"{name}.{key}": v
                for key, v in optimizer_state.items()
                if isinstance(v, Tensor) and v.shape == parameter.shape
            }
            tensors[name] = state[name]
            if self.shard is not None and name in divided:
                tensors = {key: self.shard.sharded_tensor(value) for key, value in tensors.items()}
            state |= tensors
        return state

    def class_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters with one or several rows per class. If classes are divided, those of this rank."""
        return {"weight": self.weight}

    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum over ranks of a value of each rank's own samples."""
        return value if self.shard is None else collectives.all_reduce_forward(value, self.shard.name)

    def all_reduce_gradient(self, value: T) -> T | Tensor:
        """A value that is the same on every rank. A learned value gets, on every rank, the gradient of all samples."""
        if self.shard is not None and isinstance(value, Tensor) and value.requires_grad:
            return collectives.all_reduce_backward(value, self.shard.name)
        return value

    def nearest(self) -> NearestClass | None:
        """The nearest other class of every class from the cache of ``exclusive_refresh``; None without a cache."""
        if self.exclusive is None or not self.has_exclusive_term:
            return None
        return self.exclusive.find(self.weight)

    def own_repr(self) -> list[str]:
        """The arguments of this loss in its repr, as name=value."""
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

    See :func:`fused_margin.functional.margin_cross_entropy` for the formula. Subclasses add arguments of their own.
    The arguments after ``scale`` are the keyword arguments of every margin loss.

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        numbers: a dict of the numbers m1, m2 and m3 of :class:`fused_margin.Margin` that are not attributes of the
            subclass.
        scale: s of the logits, a positive number. None uses the norm of each embedding. A 0-d tensor becomes a buffer, a
            ``torch.nn.Parameter`` a learned parameter.
        beyond_pi, easy, gradient: see :class:`fused_margin.Margin`.
        exclusive_weight: lambda of RegularFace's exclusive term, which is added to the loss. Default: 0.0, no term.
        exclusive_refresh: when to search the nearest classes of that term, see
            :class:`fused_margin.ExclusiveRegularizer`. Default: "every_step".
        class_weight: (C,) factors, as ``weight`` in ``torch.nn.CrossEntropyLoss``. A buffer. Default: None.
        reduction: as in ``torch.nn.CrossEntropyLoss``. Default: "mean".
        ignore_index: as in ``torch.nn.CrossEntropyLoss``. Default: -100.
        label_smoothing: as in ``torch.nn.CrossEntropyLoss``. Default: 0.0.
        sub_centers: rows of ``weight`` per class; the cosine to a class is the cosine to its nearest row (see
            :class:`fused_margin.SubCenterArcFaceLoss`). Default: 1.
        process_group: divides the classes among the ranks of a torch.distributed group. ``weight`` then holds the
            classes of this rank, a contiguous slice (the first C % world_size ranks have one more class). Every rank
            calls the loss with its own samples. It gets the loss of the samples of all ranks (its own losses with
            ``reduction="none"``) and the gradients of that loss. DistributedDataParallel divides the backbone's gradients
            by the number of ranks; to undo this, multiply the gradient of the embeddings:
            ``embeddings.register_hook(lambda g: g * world_size)``. Keep the loss outside of DistributedDataParallel, which
            would give every rank the same class weights; the forward raises ValueError. Default: None, no division.
        sample_rate: share of the classes that take part in a training step: the classes of the samples, and other
            classes drawn by torch's generator (PartialFC, arXiv:2203.15565). Default: 1.0.
        sparse: if True and sample_rate is below 1, the gradient of ``weight`` is sparse, as in ``torch.nn.Embedding``.
            :class:`fused_margin.optim.ProjectedSGD` accepts sparse gradients (with ``project=False`` it makes the step of
            ``torch.optim.SGD``), and does not change the rows and the momentum of the other classes. If False, the
            gradient is dense, which every optimizer, ``clip_grad_norm_`` and DistributedDataParallel accept; weight decay
            and momentum then change all classes. Default: False.
        workspace_mb: bound on scratch memory in MiB, for any C. Default: 256.
        device: device of ``weight``. Default: None, torch's default device.
        dtype: dtype of ``weight``. Default: None, torch's default dtype.

    Arguments are attributes that can be set between steps: a margin schedule is ``loss_fn.margin = 0.3``. A new value is
    checked as in the constructor, and nothing changes if the check raises. num_classes, embedding_size, sub_centers,
    process_group, device and dtype are fixed. If ``scale`` is a tensor, setting a number fills the tensor. All ranks of a
    group must set the same values.

    Under torch.compile, the second value of a number such as the margin or the scale compiles the loss a second time,
    and further values do not. A label smoothing or an exclusive weight that becomes 0 also compiles once more.
    ``workspace_mb``, ``sample_rate``, ``ignore_index``, ``norms`` of MagFace and arguments that are not numbers compile for
    every value, so set them before the first step.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Attributes:
        weight: (C, D) parameter, initialized N(0, 0.01). It need not be normalized. If classes are divided, it holds the
            classes of this rank.
        NUMBERS: maps each setting of the loss to the number of :class:`fused_margin.Margin` that it sets.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        A margin of your own is a method of a subclass:

        >>> import torch, fused_margin
        >>> class LargerForSmallClasses(fused_margin.MarginLoss):
        ...     def __init__(self, counts, embedding_size, scale=64.0, **options):
        ...         super().__init__(len(counts), embedding_size, {}, scale, **options)
        ...         self.register_buffer("margins", 0.5 / counts**0.25)
        ...     def current_margin(self, embeddings, labels):
        ...         return fused_margin.Margin(m2=self.margins[labels])
        >>> loss_fn = LargerForSmallClasses(torch.tensor([1.0, 16.0, 81.0]), 4, reduction="none")
        >>> loss_fn(torch.randn(2, 4), torch.tensor([0, 2])).shape
        torch.Size([2])
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {**settings.MARGIN_OPTIONS, "scale": settings.scale}
    NUMBERS: ClassVar[dict[str, str]] = {}
    scale: float | Tensor | None
    scale_was_changed = False  # after the constructor
    beyond_pi: str
    easy: bool
    gradient: str

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        numbers: dict[str, Any],
        scale: float | Tensor | None,
        *,
        beyond_pi: str = "monotone",
        easy: bool = False,
        gradient: str = "exact",
        **options: Unpack[ClassificationOptions],
    ):
        _checks.scale(scale)
        super().__init__(num_classes, embedding_size, **options)
        Margin(**numbers)  # checks the numbers
        self.numbers = numbers
        self.beyond_pi, self.easy, self.gradient = beyond_pi, easy, gradient
        self.scale = scale
        self.reset_parameters()

    def store_setting(self, name: str, value: Any) -> None:
        if name != "scale":
            super().store_setting(name, value)
            return
        if _checks.is_number(value):
            self.warn_if_small(value)
        old = getattr(self, "scale", None)
        if isinstance(old, Tensor) and _checks.is_number(value):  # the scale stays a buffer or a parameter
            with torch.no_grad():
                old.fill_(value)
            return
        self.scale_was_changed = self.scale_was_changed or "scale" in self.__dict__
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and "scale" not in self._buffers:
            self.__dict__.pop("scale", None)
            self._parameters.pop("scale", None)
            self.register_buffer("scale", value)
        else:
            if not isinstance(value, Tensor):  # a registered name that is None accepts no number
                self._buffers.pop("scale", None)
                self._parameters.pop("scale", None)
            super().store_setting(name, value)

    def warn_if_small(self, scale: float) -> None:
        minimum = minimum_scale(self.num_classes, PROBABILITY) if self.num_classes > 1 else 0.0
        if scale < minimum:
            warn(
                f"scale {scale:g} is below {minimum:.2f}: with {self.num_classes} classes no sample can reach a "
                f"probability of {PROBABILITY} for its class (see fused_margin.margins.minimum_scale)"
            )

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: (N, D), float32, float64, float16 or bfloat16. They need not be normalized.
            labels: (N,) integers in [0, C), or ``ignore_index``.

        Returns:
            Scalar, or (N,) with ``reduction="none"``; float64 if an input is, else float32.
        """
        # Checked first, because current_margin reads them. A rank may have no classes.
        _checks.embeddings_for(embeddings, self.weight, at_least=1 if self.shard is None else 0)
        _checks.per_sample_index("labels", labels, embeddings)
        if self.class_weight is not None or self.sub_centers > 1 or self.shard is not None:
            self.check_parameters()
        return margin_cross_entropy(
            embeddings,
            self.weight,
            labels,
            self.current_margin(embeddings, labels),
            self.current_scale(labels.device),
            exclusive_weight=self.exclusive_weight if self.has_exclusive_term else 0.0,
            sub_centers=self.sub_centers,
            hard_negatives=self.hard_negatives(embeddings, labels),
            nearest=None if self.exclusive is None else self.nearest(),
            **self.cross_entropy_options(),
        )

    @property
    def margin_options(self) -> dict[str, Any]:
        """beyond_pi, easy and gradient of the margin."""
        return {"beyond_pi": self.beyond_pi, "easy": self.easy, "gradient": self.gradient}

    @property
    def margin_function(self) -> Margin:
        """The margin without per-sample numbers. Setting it sets the attributes that define it."""
        values = {**self.numbers, **self.margin_options}
        values |= {number: getattr(self, setting) for setting, number in self.NUMBERS.items()}
        if torch.compiler.is_compiling():  # built in the graph, so that its numbers stay variables
            return Margin(**values)
        margin = self.__dict__.get("_margin")
        if margin is None or any(getattr(margin, name) is not value for name, value in values.items()):
            margin = self.__dict__["_margin"] = Margin(**values)
        return margin

    @margin_function.setter
    def margin_function(self, value: Margin) -> None:
        _checks.instance("margin_function", value, Margin)
        names = {number: setting for setting, number in self.NUMBERS.items()}
        for number, default in (("m1", 1.0), ("m2", 0.0), ("m3", 0.0), ("annealing", 0.0)):
            if number in names or number in self.numbers:
                continue
            given = getattr(value, number)
            if isinstance(given, Tensor) or given != default:
                raise ValueError(
                    f"margin_function: expected {number}={default:g} in {type(self).__name__}, got {given}"
                )
        self.numbers = {number: getattr(value, number) for number in self.numbers}
        for number, setting in (*names.items(), *((name, name) for name in self.margin_options)):
            setattr(self, setting, getattr(value, number))

    def current_margin(self, embeddings: Tensor, labels: Tensor) -> Margin:
        """The margin of this step, with a number or an (N,) tensor for m1, m2 and m3. Override it for a margin of your own."""
        return self.margin_function

    def current_scale(self, device: torch.device) -> float | Tensor | None:
        """The scale of this step: a number, a tensor, or None for the norm of each embedding."""
        if torch.compiler.is_compiling() and self.scale_was_changed and _checks.is_number(self.scale):
            # A number would be a constant of the graph, which would be compiled for every value.
            return torch.ones((), dtype=torch.float64, device=device) * self.scale
        return self.scale if self.shard is None else self.all_reduce_gradient(self.scale)

    def hard_negatives(self, embeddings: Tensor, labels: Tensor) -> HardNegatives | None:
        """The :class:`fused_margin.margins.HardNegatives` of this step, or None."""
        return None

    def logits(self, embeddings: Tensor) -> Tensor:
        """Scaled cosines without margin, for inference. With sub-centers, to the nearest sub-center of each class.

        Args:
            embeddings: (N, D).

        Returns:
            (N, C). If classes are divided, C is the number of classes of this rank.
        """
        _checks.embeddings_for(embeddings, self.weight, at_least=0)
        dtype = torch.promote_types(embeddings.dtype, self.weight.dtype)
        # Embeddings in float64, because the gradient of a norm needs the squares. weight can be much larger, so it gets no
        # float64 copy; in half precision its inverse norms could underflow.
        unit = unit_rows(embeddings, torch.float64)[0].to(dtype)
        unit_weight = unit_rows(self.weight, torch.promote_types(self.weight.dtype, torch.float32))[0].to(dtype)
        cosine, scale = F.linear(unit, unit_weight), self.scale
        if self.sub_centers > 1:
            cosine = cosine.unflatten(1, (-1, self.sub_centers)).amax(dim=2)
        if scale is None:
            return cosine * torch.linalg.vector_norm(embeddings, dim=1, keepdim=True, dtype=torch.float64).to(dtype)
        return cosine * scale

    def margin_repr(self) -> list[str]:
        """The numbers of the margin in the repr, as name=value."""
        return [f"{name}={getattr(self.margin_function, name)}" for name in ("m1", "m2", "m3")]

    def own_repr(self) -> list[str]:
        return [f"scale={self.scale}", *self.margin_repr()]
