"""Registers the package's ops with torch.library, and refuses the derivatives that they do not have.

torch.library.custom_op would be shorter, but the first call of such an op imports the compiler, which takes seconds.
"""

import sys
from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMESPACE = "fused_margin"
FORWARD_MODE = (
    "fused_margin: forward-mode derivatives (torch.func.jvp, jacfwd, dual numbers) are not supported; use reverse mode "
    "(backward or torch.autograd.grad), or fused_margin.reference"
)
GRADIENT_TRANSFORM = (
    "fused_margin: gradients inside torch.func (grad, vjp, jacrev, hessian, vmap with gradients) are not supported; use "
    "backward or torch.autograd.grad, or fused_margin.reference"
)
ANY_TRANSFORM = (
    "fused_margin: the transforms of torch.func are not supported where classes are divided among ranks; use backward "
    "or torch.autograd.grad"
)
BATCHED_GRADIENTS = (
    "fused_margin: is_grads_batched is not supported where classes are drawn or divided among ranks; ask for one gradient "
    "at a time"
)
SECOND_ORDER = "fused_margin: second derivatives are not supported; use fused_margin.reference for them"


def _tensors(arguments: Sequence) -> list[Tensor]:
    lists = (a if isinstance(a, (list, tuple)) else [a] for a in arguments)
    return [t for values in lists for t in values if isinstance(t, Tensor)]


def refuse_unsupported(arguments: Sequence) -> None:
    """An error for a derivative of these inputs that the ops would otherwise leave out."""
    tensors = _tensors(arguments)
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(FORWARD_MODE)
    if (
        torch._C._are_functorch_transforms_active()
        and torch.is_grad_enabled()
        and any(t.requires_grad for t in tensors)
    ):
        raise RuntimeError(GRADIENT_TRANSFORM)


def refuse_transforms(*arguments) -> None:
    """Also an error for vmap: a collective runs once, on every rank."""
    refuse_unsupported(arguments)
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(ANY_TRANSFORM)


def refuse_batched_gradients(upstream: Sequence[Tensor | None]) -> None:
    """An error for torch.autograd.grad(is_grads_batched=True), for a backward that has no rule for it."""
    if any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in upstream):
        raise RuntimeError(BATCHED_GRADIENTS)


class _Library(torch.library.Library):
    """Checks the inputs before each kernel that autograd calls, also those that torch.library.register_autograd makes."""

    def impl(self, op_name, fn, dispatch_key="", *, with_keyset=False, **options):
        if dispatch_key != "Autograd":
            return super().impl(op_name, fn, dispatch_key, with_keyset=with_keyset, **options)

        def checked(keyset, *arguments):
            refuse_unsupported(arguments)
            return fn(keyset, *arguments)

        return super().impl(op_name, checked, dispatch_key, with_keyset=True, **options)


_LIBRARY = _Library(NAMESPACE, "FRAGMENT")


def _untraced(function: Callable) -> Callable:
    """Keeps torch.compile from tracing into a kernel, without importing the compiler where nothing has."""
    disabled = torch._disable_dynamo(function)  # imports the compiler when it is called

    @wraps(function)
    def call(*arguments):
        return (disabled if "torch._dynamo" in sys.modules else function)(*arguments)

    return call


def _counting_writes(function: Callable, written: Sequence[int]) -> Callable:
    """Tells autograd that a kernel has written to these arguments: one that was saved for a backward is an error then."""

    def call(*arguments):
        result = function(*arguments)
        for index in written:
            if not arguments[index].is_inference():
                torch.autograd.graph.increment_version(arguments[index])
        return result

    return call


def register(
    name: str,
    function: Callable,
    fake: Callable,
    *,
    schema: str | None = None,
    mutates: Sequence[str] = (),
    backward: Callable | None = None,
    setup_context: Callable | None = None,
):
    """Defines ``fused_margin::name`` and returns it.

    Args:
        function: what computes it, on any device.
        fake: the same for fake tensors: shapes and dtypes only.
        schema: of the arguments and results; by default, from the function's annotations.
        mutates: names of the arguments that it writes to.
        backward, setup_context: as in ``torch.library.register_autograd``; without them, it has no derivative, and
            an attempt to differentiate it is an error.
    """
    schema = schema or torch.library.infer_schema(function, mutates_args=mutates)
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    written = [i for i, argument in enumerate(op._schema.arguments) if argument.name in mutates]
    kernel = _untraced(function)
    _LIBRARY.impl(name, _counting_writes(kernel, written) if written else kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    if mutates:  # torch.library.register_autograd refuses it
        _LIBRARY.impl(name, _without_derivative(op), "Autograd", with_keyset=True)
    else:
        backward = backward or _refuse(f"fused_margin: {name} has no derivative")
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return op


def _refuse(message: str) -> Callable:
    def refuse(ctx, *_):
        raise RuntimeError(message)

    return refuse


# The backward of a backward op: an error, never a silently wrong second derivative.
refuse_second_order = _refuse(SECOND_ORDER)


def _without_derivative(op) -> Callable:
    def kernel(keyset, *arguments):
        if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(arguments)):
            raise RuntimeError(f"{op.name()} has no derivative: detach its inputs")
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    return kernel


class _Refused(torch.autograd.Function):
    """A gradient as it is, which cannot be differentiated by the tensors that it comes from."""

    @staticmethod
    def forward(ctx, gradient: Tensor, *_sources: Tensor) -> Tensor:
        return gradient.detach()

    backward = staticmethod(refuse_second_order)


class _Unpacked:
    """An autograd context whose saved tensors have been read: activation checkpointing lets them be read once."""

    def __init__(self, ctx):
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str):
        return getattr(self._ctx, name)


def first_order_only(backward: Callable) -> Callable:
    """For the backward of a torch.autograd.Function: differentiating it again is an error.

    torch.autograd.function.once_differentiable does the same for the upstream gradients only: the derivative by what
    the forward has saved would silently be 0.
    """

    @wraps(backward)
    def call(ctx, *upstream):
        ctx = _Unpacked(ctx)
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        sources = [t for t in (*upstream, *ctx.saved_tensors) if t is not None and t.requires_grad]
        if not torch.is_grad_enabled() or not sources:
            return gradients
        alone = not isinstance(gradients, tuple)
        refused = [None if g is None else _Refused.apply(g, *sources) for g in ([gradients] if alone else gradients)]
        return refused[0] if alone else tuple(refused)

    return call


class FirstOrderFunction(torch.autograd.Function):
    """A torch.autograd.Function with one backward and no other derivative: asking for another is an error that says so."""

    def __init_subclass__(cls):
        super().__init_subclass__()
        cls.backward = staticmethod(first_order_only(cls.backward))

    @classmethod
    def apply(cls, *arguments):
        refuse_transforms(*arguments)
        return super().apply(*arguments)
