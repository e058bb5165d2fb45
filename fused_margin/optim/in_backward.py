"""Steps of class weights within the backward of their loss, so that their gradient is never stored."""

from __future__ import annotations

import gc
import inspect
import weakref
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from fused_margin import _checks
from fused_margin._ops.inputs import ForwardOutput, LossInputs, OutputGradients
from fused_margin._ops.library import untraced
from fused_margin._ops.row_update import DTYPES, NAME, STEPPED, RowUpdate, Rule, check_rows
from fused_margin._ops.step_in_backward import run_forward
from fused_margin.distributed import averaging_module
from fused_margin.optim.projected_sgd import ProjectedSGD, start_momentum

OPTIMIZERS = (ProjectedSGD, torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
# Options of torch's optimizers that the kernel does not have, with the value that it implements.
FIXED_OPTIONS = {"dampening": 0, "maximize": False, "amsgrad": False, "capturable": False, "differentiable": False}


def refuse(message: str) -> NoReturn:
    raise RuntimeError(f"{NAME}: {message}")


def step_in_backward(
    loss_fn: nn.Module, optimizer: torch.optim.Optimizer, *, stochastic_rounding: bool = True, seed: int = 0
) -> StepInBackward:
    """Lets ``loss.backward()`` step the class weights of a loss, without storing their gradient.

    The training loop does not change: ``loss.backward(); optimizer.step(); optimizer.zero_grad()``. The backward makes
    the step of ``loss_fn.weight`` by the options of its parameter group (:class:`ProjectedSGD` projects them), and
    ``loss_fn.weight.grad`` stays None, so that ``optimizer.step()`` steps the other parameters only. Learning rate
    schedulers, checkpoints and the state of the optimizer stay as they are; a run can change between both ways. If the
    loss or its gradient is not finite, the class weights and their momentum keep their values; a batch without valid
    labels has zero gradients instead.

    With ``sample_rate < 1`` only the drawn classes and their momentum change, as with ``sparse=True``. Momentum without
    Nesterov needs no further memory for the exclusive term; without momentum, with Nesterov momentum, with Adam, and with
    classes divided among ranks, that term needs a matrix (C, D) in the dtype of the computation.

    Args:
        loss_fn: a loss of this package with class weights, or ``compat.insightface.PartialFC_V2``. Its ``weight`` must
            be contiguous, in float32, float64 or bfloat16.
        optimizer: a :class:`ProjectedSGD`, ``torch.optim.SGD``, ``Adam`` or ``AdamW`` that has ``loss_fn.weight`` among its
            parameters.
        stochastic_rounding: whether class weights and moments in bfloat16 are rounded up or down at random, so that their
            expected value is exact. Rounding to nearest would lose most of the steps, which are smaller than half a unit in
            the last place (ELMO, arXiv:2510.11168).
        seed: of the random bits, which depend on it, on the step (``optimizer.state[weight]["step"]``) and on the position
            of the element, and on nothing else.

    Returns:
        The handle; ``handle.remove()`` returns to the ordinary way.

    Raises:
        TypeError, ValueError: for another loss or optimizer, or options of the optimizer that are not supported.
        RuntimeError: if the class weights are stepped already. The forward, the backward or ``optimizer.step()`` of what
            cannot be done this way also raises it, before it changes the class weights: a second backward before
            ``optimizer.step()`` (gradient accumulation), ``torch.amp.GradScaler`` and float16, hooks of the gradient of
            ``weight``, ``retain_graph`` and ``create_graph``, DistributedDataParallel around the loss, and other losses
            that use ``weight``. Clipping by ``clip_grad_norm_`` does not include the class weights, because they have no
            gradient.

    Examples:
        >>> import torch, fused_margin
        >>> loss_fn = fused_margin.ArcFaceLoss(num_classes=10, embedding_size=4)
        >>> optimizer = fused_margin.optim.ProjectedSGD(loss_fn.parameters(), lr=0.1)
        >>> handle = fused_margin.optim.step_in_backward(loss_fn, optimizer)
        >>> before = loss_fn.weight.detach().clone()
        >>> loss_fn(torch.randn(3, 4), torch.tensor([0, 3, 7])).backward()
        >>> loss_fn.weight.grad is None, torch.equal(loss_fn.weight, before)
        (True, False)
    """
    return StepInBackward(loss_fn, optimizer, stochastic_rounding=stochastic_rounding, seed=seed)


class StepInBackward:
    """The handle that :func:`step_in_backward` returns.

    Attributes:
        loss_fn: the loss.
        optimizer: the optimizer of its class weights.
        parameter: ``loss_fn.weight``.

    Examples:
        >>> import torch, fused_margin
        >>> loss_fn = fused_margin.ArcFaceLoss(num_classes=10, embedding_size=4)
        >>> optimizer = torch.optim.SGD(loss_fn.parameters(), lr=0.1)
        >>> handle = fused_margin.optim.step_in_backward(loss_fn, optimizer)
        >>> handle.parameter is loss_fn.weight
        True
        >>> handle.remove()
        >>> loss_fn(torch.randn(3, 4), torch.tensor([0, 3, 7])).backward()
        >>> loss_fn.weight.grad.shape
        torch.Size([10, 4])
    """

    def __init__(
        self, loss_fn: nn.Module, optimizer: torch.optim.Optimizer, *, stochastic_rounding: bool = True, seed: int = 0
    ):
        weight = getattr(loss_fn, "weight", None)
        if not hasattr(type(loss_fn), "stepper") or not isinstance(weight, nn.Parameter):
            raise TypeError(
                f"loss_fn: expected a loss of fused_margin with class weights, or PartialFC_V2 of "
                f"fused_margin.compat.insightface, got {type(loss_fn).__name__}"
            )
        self.loss_fn, self.optimizer, self.parameter = loss_fn, optimizer, weight
        _checks.instance("stochastic_rounding", stochastic_rounding, bool)
        self.stochastic_rounding, self.seed = stochastic_rounding, _checks.integer("seed", seed)
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed: expected a signed 64-bit integer, got {self.seed}")
        # torch wraps the methods of a class when its first optimizer is constructed
        if inspect.unwrap(type(optimizer).step) not in [inspect.unwrap(cls.step) for cls in OPTIMIZERS]:
            raise TypeError(
                "optimizer: expected fused_margin.optim.ProjectedSGD, torch.optim.SGD, Adam or AdamW, got "
                f"{type(optimizer).__module__}.{type(optimizer).__qualname__}; of an optimizer that wraps one of these, "
                "pass optimizer.optimizer"
            )
        if not weight.requires_grad:
            raise ValueError("loss_fn.weight: expected a parameter with requires_grad=True, got a frozen one")
        self._check_weight(weight)
        self._check_options(self._group())
        if id(weight) in STEPPED:
            refuse("these class weights are stepped in the backward already; remove that handle first")
        self.forwards: weakref.WeakSet = weakref.WeakSet()
        self._has_stepped = False  # since the last optimizer.step()
        self._is_in_step = False
        self._largest_upstream = 0.0  # without a GradScaler
        # Python's garbage collector does not see the references of this hook, so it must not keep the weight alive.
        own = weakref.ref(self)

        def refuse_gradient(_: Tensor) -> None:
            if (stepper := own()) is not None:
                stepper._gradient_of_another_loss()

        self._hooks = [
            weight.register_post_accumulate_grad_hook(refuse_gradient),
            optimizer.register_step_pre_hook(untraced(lambda *_: self._before_optimizer_step())),
            optimizer.register_step_post_hook(untraced(lambda *_: self._after_optimizer_step())),
        ]
        STEPPED[id(weight)] = type(loss_fn).__name__
        self._forget = weakref.finalize(weight, STEPPED.pop, id(weight), None)
        loss_fn.stepper = self  # type: ignore[assignment]

    def remove(self) -> None:
        """Returns to the ordinary way: ``backward`` computes the gradient, and ``optimizer.step()`` steps by it."""
        for hook in self._hooks:
            hook.remove()
        self._forget()
        if getattr(self.loss_fn, "stepper", None) is self:
            self.loss_fn.stepper = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the loss has other class weights, which no optimizer has."""

    def __reduce__(self) -> tuple:
        return (type(None), ())

    def run_forward(self, inputs: LossInputs, uniform: bool, ignore_index: int) -> ForwardOutput:
        return run_forward(self, inputs, uniform, ignore_index)

    def check_forward(self, inputs: LossInputs) -> None:
        weight = inputs.weight
        self._check_weight(weight)
        device = weight.device.type
        if inputs.embeddings is not None and inputs.embeddings.dtype == torch.float16:
            refuse("embeddings in float16 need torch.amp.GradScaler, which cannot undo a step; use bfloat16")
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            refuse("autocast to float16 needs torch.amp.GradScaler, which cannot undo a step; use bfloat16")
        self._refuse_hooks()
        if averaging_module(weight) is not None:
            refuse(
                "DistributedDataParallel has the class weights, and cannot average a gradient that is not computed; "
                "keep the loss outside, and divide its classes by process_group"
            )

    def begin_step(self, node: Any, upstream: OutputGradients) -> RowUpdate:
        weight = self.parameter
        if self._is_in_step:
            refuse(
                "an error or an interrupt has stopped an earlier step, which some class weights have made and others have "
                "not; load a checkpoint, then remove the handle and call step_in_backward again"
            )
        if self._has_stepped:
            refuse(
                "a second backward before optimizer.step(): gradients cannot be accumulated, because each backward makes "
                "a step; call optimizer.step() after every backward, also after one that raised, or use larger batches"
            )
        if weight.grad is not None:
            refuse("the class weights have a gradient; call optimizer.zero_grad(set_to_none=True) before the forward")
        self._refuse_hooks()
        if torch._C._autograd._get_current_graph_task_keep_graph():
            refuse("retain_graph=True: the step changes the class weights that the graph would use again")
        if any(other is not node and torch._C._will_engine_execute_node(other) for other in list(self.forwards)):
            refuse("two losses of the same class weights in one backward; call the loss once for both batches")
        self._refuse_scaled(upstream)
        group = self._group()
        self._check_options(group)
        stochastic = self.stochastic_rounding and weight.dtype == torch.bfloat16
        changes = stochastic or isinstance(self.optimizer, torch.optim.Adam)
        if changes and weight.is_cuda and torch.cuda.is_current_stream_capturing():
            refuse("a CUDA graph would repeat the random bits of stochastic rounding and the step number of Adam")
        state = self.optimizer.state[weight]
        for name in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
            check_rows(f"optimizer.state[weight][{name!r}]", state.get(name), weight)
        update = self._update(group, state, stochastic)
        self._is_in_step = True
        return update

    def _update(self, group: dict, state: dict, stochastic: bool) -> RowUpdate:
        if isinstance(self.optimizer, torch.optim.Adam):
            return self._adam(group, state, stochastic)
        momentum, weight = None, self.parameter
        if group["momentum"]:
            start_momentum(cast(torch.optim.SGD, self.optimizer), weight)
            momentum = state["momentum_buffer"]
        return RowUpdate(
            momentum, None, Rule.NESTEROV if group["nesterov"] else Rule.SGD, float(group["lr"]),
            beta1=float(group["momentum"]), weight_decay=float(group["weight_decay"]),
            project=group.get("project", False), stochastic=stochastic, seed=self.seed,
            step=int(self._count(group, state)) if stochastic else 0,
        )  # fmt: skip

    def end_step(self) -> None:
        self._has_stepped, self._is_in_step = True, False
        state = self.optimizer.state[self.parameter]
        if "step" in state:
            state["step"] += 1

    def _adam(self, group: dict, state: dict, stochastic: bool) -> RowUpdate:
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(self.parameter, memory_format=torch.preserve_format)
        count, (beta1, beta2) = self._count(group, state) + 1.0, map(float, group["betas"])
        is_decoupled = isinstance(self.optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
        return RowUpdate(
            state["exp_avg"], state["exp_avg_sq"], Rule.ADAMW if is_decoupled else Rule.ADAM, float(group["lr"]),
            beta1=beta1, beta2=beta2, eps=float(group["eps"]), weight_decay=float(group["weight_decay"]),
            correction1=1.0 - beta1**count, correction2=1.0 - beta2**count, stochastic=stochastic, seed=self.seed,
            step=int(count) - 1,
        )  # fmt: skip

    def _count(self, group: dict, state: dict) -> float:
        """The number of steps so far, stored as torch's Adam stores it."""
        if "step" not in state:
            is_adam = isinstance(self.optimizer, torch.optim.Adam)
            dtype = torch.get_default_dtype() if is_adam else torch.float64
            device = self.parameter.device if group.get("fused") else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32 if group.get("fused") else dtype, device=device)
        return float(state["step"])

    def _group(self) -> dict[str, Any]:
        for group in self.optimizer.param_groups:
            if any(p is self.parameter for p in group["params"]):
                return group
        raise ValueError("optimizer: expected one that has loss_fn.weight among its parameters")

    def _check_weight(self, weight: Tensor) -> None:
        if weight.dtype not in DTYPES:
            raise TypeError(
                f"loss_fn.weight: expected torch.float32, torch.float64 or torch.bfloat16 to step in the backward, got "
                f"{weight.dtype}"
            )
        if not weight.is_contiguous():
            raise ValueError("loss_fn.weight: expected a contiguous matrix to step in the backward")

    def _check_options(self, group: dict[str, Any]) -> None:
        for name, supported in FIXED_OPTIONS.items():
            if group.get(name, supported) != supported:
                raise ValueError(f"optimizer: {name}={group[name]} is not supported by {NAME}")
        if isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu":
            raise ValueError("optimizer: expected a number as lr, got a tensor on a device")

    def _refuse_hooks(self) -> None:
        weight = self.parameter
        if weight._backward_hooks or len(weight._post_accumulate_grad_hooks or ()) > 1:
            refuse("the class weights have hooks for their gradient, which is not computed; remove the hooks")

    def _refuse_scaled(self, upstream: OutputGradients) -> None:
        """Refuses the gradient of a loss that an enabled GradScaler has multiplied; its multiplication leaves no trace.

        Searching all objects for a scaler takes long, so that it is done only when the gradient is above 1, and above twice
        the largest so far. On a GPU, where reading the gradient waits for it, it is read until one is above 0.
        """
        seen = self._largest_upstream
        if self.parameter.is_cuda and seen > 0:
            return
        values = [g for g in upstream if g is not None and g.numel()]
        largest = max((float(g.abs().max()) for g in values), default=0.0)
        # A sample's gradient is at most that of the loss, 1 / N of it in a mean, and smaller later in a training.
        if largest > max(1.0, 2 * seen):  # false for NaN
            scalers = [o for o in gc.get_objects() if issubclass(type(o), torch.amp.GradScaler) and o.is_enabled()]
            samples = max(g.numel() for g in values)
            if any(largest > scaler.get_scale() / (64 * samples) for scaler in scalers):
                refuse(
                    "torch.amp.GradScaler cannot undo a step, and multiplies its gradient; use bfloat16 without a scaler"
                )
        self._largest_upstream = max(largest, seen)

    def _before_optimizer_step(self) -> None:
        if self.parameter.grad is not None:
            self._gradient_of_another_loss()

    def _after_optimizer_step(self) -> None:
        self._has_stepped = False

    def _gradient_of_another_loss(self) -> None:
        if self.parameter.grad is not None:
            refuse(
                "the class weights got a gradient from another loss, such as a regularizer; a step in the backward knows "
                "the gradient of its own loss only"
            )
