"""Registration of the torch.library ops, and the two ops over chunks of classes with their gradients and fakes.

torch.library.custom_op would be shorter, but the first call of such an op imports the compiler, which takes seconds.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_margin._ops import forward_backward
from fused_margin._ops.inputs import ForwardOutput, Gradients, LossInputs, OutputGradients
from fused_margin._ops.row_update import STEPPED, WeightStepper, refuse_stepped

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


def refuse_unsupported(arguments: Sequence) -> None:
    """Raises RuntimeError for a derivative of these inputs that the ops would otherwise omit."""
    transformed = torch._C._are_functorch_transforms_active() and torch.is_grad_enabled()
    for value in arguments:
        if not isinstance(value, Tensor):
            continue
        if forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(FORWARD_MODE)
        if transformed and value.requires_grad:
            raise RuntimeError(GRADIENT_TRANSFORM)


def refuse_transforms(*arguments: Any) -> None:
    """Raises RuntimeError for every transform, including vmap: a collective runs once, on every rank."""
    refuse_unsupported(arguments)
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(ANY_TRANSFORM)


def refuse_batched_gradients(upstream: Sequence[Tensor | None]) -> None:
    """Raises RuntimeError for torch.autograd.grad(is_grads_batched=True), in a backward without a batching rule."""
    if any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in upstream):
        raise RuntimeError(BATCHED_GRADIENTS)


class _Library(torch.library.Library):
    """Checks the inputs before every autograd kernel, including those that torch.library.register_autograd makes."""

    def impl(self, op_name, fn, dispatch_key="", *, with_keyset=False, **options):
        if dispatch_key != "Autograd":
            return super().impl(op_name, fn, dispatch_key, with_keyset=with_keyset, **options)

        def checked(keyset, *arguments):
            refuse_unsupported(arguments)
            return fn(keyset, *arguments)

        return super().impl(op_name, checked, dispatch_key, with_keyset=True, **options)


_LIBRARY = _Library(NAMESPACE, "FRAGMENT")


def untraced(function: Callable) -> Callable:
    """Keeps torch.compile from tracing into a kernel. Does not import the compiler if it is not imported yet."""
    disabled = torch._disable_dynamo(function)  # imports the compiler when it is called

    @wraps(function)
    def call(*arguments):
        return (disabled if "torch._dynamo" in sys.modules else function)(*arguments)

    return call


def _counting_writes(function: Callable, written: Sequence[int]) -> Callable:
    """Tells autograd that a kernel has written to these arguments, so that a backward that saved one raises."""

    def call(*arguments):
        result = function(*arguments)
        for index in written:
            if arguments[index] is not None and not arguments[index].is_inference():
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
    tags: Sequence[torch.Tag] = (),
):
    """Defines ``fused_margin::name`` and returns it.

    torch.compile's cache on disk identifies an op by its name alone. An op whose arguments change therefore needs a new
    name, and so does the op whose backward calls it.

    Args:
        function: the computation, on any device.
        fake: the computation for fake tensors: shapes and dtypes only.
        schema: arguments and results of the op. By default they are inferred from the function's annotations.
        mutates: names of the arguments that ``function`` writes to.
        backward, setup_context: as in ``torch.library.register_autograd``. Without them the op has no derivative, and
            differentiating it raises RuntimeError.
        tags: tags in addition to ``torch.Tag.pt2_compliant_tag``.
    """
    schema = schema or torch.library.infer_schema(function, mutates_args=mutates)
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    written = [i for i, argument in enumerate(op._schema.arguments) if argument.name in mutates]
    kernel = untraced(function)
    _LIBRARY.impl(name, _counting_writes(kernel, written) if written else kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    if mutates:  # torch.library.register_autograd refuses ops that write to their arguments
        _LIBRARY.impl(name, _without_derivative(op), "Autograd", with_keyset=True)
    else:
        backward = backward or _refuse(f"fused_margin: {name} has no derivative")
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return op


def _refuse(message: str) -> Callable:
    def refuse(ctx, *_):
        raise RuntimeError(message)

    return refuse


# The backward of a backward op raises, so that no second derivative is silently wrong.
refuse_second_order = _refuse(SECOND_ORDER)


def _without_derivative(op) -> Callable:
    def kernel(keyset, *arguments):
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments):
            raise RuntimeError(f"{op.name()} has no derivative: detach its inputs")
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    return kernel


if TYPE_CHECKING:
    TensorTuple = type[ForwardOutput | OutputGradients | Gradients]

# The first arguments of the ops on LossInputs are its fields, in order.
FIELDS = fields(LossInputs)
IS_TENSOR = [field.type in (Tensor, Tensor | None) for field in FIELDS]
_SCHEMA_TYPE: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "SymInt", bool: "bool", str: "str"
}  # fmt: skip
INPUTS_SCHEMA = ", ".join(f"{_SCHEMA_TYPE[field.type]} {field.name}" for field in FIELDS)


def _outputs(kind: "TensorTuple") -> str:
    return f"({', '.join(['Tensor'] * len(kind._fields))})"


def arguments_schema(kind: "TensorTuple", prefix: str = "") -> str:
    """One argument per field, not a list: autograd and vmap ignore the tensors of a list that may contain None."""
    return ", ".join(f"{_SCHEMA_TYPE[kind.__annotations__[name]]} {prefix}{name}" for name in kind._fields)


def run_forward(
    inputs: LossInputs, uniform: bool, ignore_index: int, stepper: WeightStepper | None = None
) -> ForwardOutput:
    """Runs the forward of a call, differentiable in embeddings, weight, scale and bias.

    Args:
        stepper: steps weight in the backward, instead of computing its gradient.
    """
    if stepper is not None and torch.is_grad_enabled() and inputs.weight.requires_grad:
        return stepper.run_forward(inputs, uniform, ignore_index)
    if not torch.compiler.is_compiling() and STEPPED:  # the table would become a guard of every compiled loss
        refuse_stepped(inputs.weight)
    differentiable = (inputs.embeddings, inputs.weight, inputs.bias, inputs.sample_scale)
    save_for_backward = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    arguments = [getattr(inputs, field.name) for field in FIELDS]
    return ForwardOutput(*forward_chunks(*arguments, uniform, ignore_index, save_for_backward))


def _forward_kernel(*arguments):
    *inputs, uniform, ignore_index, save_for_backward = arguments
    return tuple(forward_backward.forward(LossInputs(*inputs), uniform, ignore_index, save_for_backward))


def _forward_fake(*arguments):
    *values, uniform, _ignore_index, save_for_backward = arguments
    inputs = LossInputs(*values)
    output = forward_backward.allocate_output(inputs, uniform, save_for_backward)[1]
    if not inputs.is_divided or inputs.embeddings is None:
        return tuple(output)
    # The numbers of samples of all ranks and of drawn classes depend on the data.
    size, compute = torch.library.get_ctx().new_dynamic_size, output.normalized_embeddings.dtype
    gathered, new = size(), inputs.weight.new_empty
    rows = size() if inputs.sample_rate < 1 else None
    return tuple(
        output._replace(
            target_row=new(gathered if inputs.sub_centers > 1 else 0, dtype=torch.int64),
            normalized_embeddings=new(gathered, inputs.weight.shape[1], dtype=compute),
            embedding_inverse_norm=new(gathered, dtype=compute),
            weight_inverse_norm=output.weight_inverse_norm if rows is None else new(rows, dtype=compute),
            exponent=new(size(), gathered, dtype=torch.float64),
            saved_chunks=new(size(), dtype=output.saved_chunks.dtype),
            drawn_rows=new(0 if rows is None else rows, dtype=torch.int64),
            gathered_labels=new(gathered, dtype=torch.int64),
            gathered_scale=new(0 if inputs.sample_scale is None else gathered, dtype=torch.float64),
            gathered_threshold=new(0 if inputs.hard_threshold is None else gathered, dtype=torch.float64),
            gathered_largest=new(gathered, dtype=torch.float64),
            gathered_logsumexp=new(gathered, dtype=torch.float64),
        )
    )


def _backward_arguments(values: tuple) -> tuple[LossInputs, OutputGradients, ForwardOutput, tuple[bool, bool, bool]]:
    rest = iter(values)
    inputs = LossInputs(*islice(rest, len(FIELDS)))
    upstream = OutputGradients(*islice(rest, len(OutputGradients._fields)))
    saved = ForwardOutput(*islice(rest, len(ForwardOutput._fields)))
    need_embeddings, need_weight, need_bias = rest
    return inputs, upstream, saved, (need_embeddings, need_weight, need_bias)


def _backward_kernel(*values):
    inputs, upstream, saved, needs = _backward_arguments(values)
    return tuple(forward_backward.backward(inputs, upstream, saved, *needs))


def _backward_fake(*values):
    inputs, _, saved, (need_embeddings, need_weight, need_bias) = _backward_arguments(values)
    embeddings, weight, bias, scale = inputs.embeddings, inputs.weight, inputs.bias, inputs.sample_scale
    d_weight = weight.new_empty(0)
    if need_weight and inputs.sample_rate < 1 and inputs.sparse_gradient:
        d_weight = weight.new_empty(saved.drawn_rows.shape[0], weight.shape[1])
    elif need_weight:
        d_weight = torch.empty_like(weight)
    d_embeddings, d_bias = weight.new_empty(0), weight.new_empty(0)
    if need_embeddings and embeddings is not None:
        d_embeddings = torch.empty_like(embeddings, memory_format=torch.contiguous_format)
    if need_bias and bias is not None:
        d_bias = bias.new_empty(bias.shape)
    d_scale = torch.empty_like(scale) if scale is not None else weight.new_empty(0, dtype=torch.float64)
    return d_embeddings, d_weight, d_bias, d_scale


backward_chunks = register(
    "backward_chunks",
    _backward_kernel,
    _backward_fake,
    schema=f"({INPUTS_SCHEMA}, {arguments_schema(OutputGradients, 'd_')}, {arguments_schema(ForwardOutput)}, "
    f"bool need_embeddings, bool need_weight, bool need_bias) -> {_outputs(Gradients)}",
    backward=refuse_second_order,
)


def _forward_context(ctx, inputs, output):
    inputs = inputs[: len(FIELDS)]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(value for value, tensor in zip(inputs, IS_TENSOR, strict=True) if tensor), *output)
    ctx.settings = [value for value, tensor in zip(inputs, IS_TENSOR, strict=True) if not tensor]


def upstream_of(inputs: LossInputs, saved: ForwardOutput, gradients: Sequence[Tensor | None]) -> OutputGradients:
    """The upstream gradients of a call, from one for each field of ForwardOutput."""
    d = ForwardOutput(*gradients)  # type: ignore[arg-type]
    return OutputGradients(
        d.relative_logsumexp,
        d.target_cosine,
        d.uniform_cosine if saved.uniform_cosine.numel() else None,
        d.nearest_cosine if inputs.nearest else None,
        d.target_bias if inputs.bias is not None else None,
        d.target_length if inputs.need_length else None,
    )


def input_gradients(
    values: list, upstream: OutputGradients, saved: ForwardOutput, needed: dict[str, bool]
) -> dict[str, Tensor | None]:
    """The gradients of the inputs by name, None for those that are not needed.

    Args:
        values: the fields of LossInputs.
    """
    inputs, result = LossInputs(*values), dict.fromkeys(needed)
    if inputs.is_divided:
        refuse_batched_gradients(upstream)
    if all(g is None for g in upstream):
        return result
    needs = [needed[name] for name in ("embeddings", "weight", "bias")]
    gradients = Gradients(*backward_chunks(*values, *upstream, *saved, *needs))
    if needed["weight"] and inputs.sample_rate < 1 and inputs.sparse_gradient:
        rows = saved.drawn_rows.unsqueeze(0)
        gradients = gradients._replace(
            weight=torch.sparse_coo_tensor(
                rows, gradients.weight, inputs.weight.shape, is_coalesced=True, check_invariants=False
            )
        )
    return result | {name: value for name, value in gradients._asdict().items() if needed[name]}


def _forward_gradient(ctx, *gradients_of_outputs):
    tensors, settings = list(ctx.saved_tensors), iter(ctx.settings)
    saved = ForwardOutput(*tensors[sum(IS_TENSOR) :])
    values = [tensors.pop(0) if tensor else next(settings) for tensor in IS_TENSOR]
    needed = dict(zip((field.name for field in FIELDS), ctx.needs_input_grad, strict=False))
    upstream = upstream_of(LossInputs(*values), saved, gradients_of_outputs)
    return (*input_gradients(values, upstream, saved, needed).values(), None, None, None)


forward_chunks = register(
    "forward_chunks",
    _forward_kernel,
    _forward_fake,
    schema=f"({INPUTS_SCHEMA}, bool uniform, SymInt ignore_index, bool save_for_backward) -> {_outputs(ForwardOutput)}",
    backward=_forward_gradient,
    setup_context=_forward_context,
    tags=(torch.Tag.nondeterministic_seeded,),  # where classes are drawn
)
