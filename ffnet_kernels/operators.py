"""The operators in torch's dispatcher: schemas, shapes (fakes) and autograd, the same for every backend.

``torch.ops.ffnet_kernels.<operator>`` runs a native kernel where its library has registered one for the device, else
the reference; ``torch.ops.ffnet_kernels_triton.<operator>`` and ``torch.ops.ffnet_kernels_cuda.<operator>`` are the
same operators on Triton and CUDA kernels. Users call :mod:`ffnet_kernels.functional`, which checks the arguments and
chooses the backend.

A backward operator returns the wanted gradients only, in the order of the tensor arguments; ``mask`` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import autograd, dispatch
from .backends import cuda, reference, triton
from .formats import empty_output


@dataclass(frozen=True)
class Operator:
    """Its arguments as the schema has them; ``tensors`` are those that may need a gradient."""

    name: str
    arguments: str
    tensors: tuple[int, ...]
    infer: Callable[..., tuple[Sequence[int], tuple[Tensor, ...]]]

    @property
    def schema(self) -> str:
        return f"{self.name}({self.arguments}) -> Tensor"

    @property
    def residual(self) -> int | None:
        """Which argument is added to the result as it is: its gradient is the incoming one."""
        names = [argument.split()[-1] for argument in self.arguments.split(", ")]
        return names.index("residual") if "residual" in names else None

    @property
    def backward_schema(self) -> str:
        return f"{self.name}_backward(Tensor grad, {self.arguments}, bool[] mask) -> Tensor[]"


def _infer_depthwise_conv2d(x, weight, bias, stride, padding, activation):
    height = (x.shape[2] + padding[0] + padding[1] - weight.shape[2]) // stride[0] + 1
    width = (x.shape[3] + padding[2] + padding[3] - weight.shape[3]) // stride[1] + 1
    return (x.shape[0], weight.shape[0], height, width), (x, weight)


def _infer_ffnified_attention(query, key, key_bias, value, *_):
    return query.shape, (query, key, value)


def _infer_channel_mixer(x, weight, bias, expand_weight, expand_bias, project_weight, *_):
    return (x.shape[0], project_weight.shape[0], x.shape[2], x.shape[3]), (x, weight)


OPERATORS = (
    Operator(
        "depthwise_conv2d",
        "Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[4] padding, str activation",
        (0, 1, 2),
        _infer_depthwise_conv2d,
    ),
    Operator(
        "ffnified_attention",
        "Tensor query, Tensor key, Tensor? key_bias, Tensor value, Tensor? value_bias, str activation, "
        "Tensor? scale, Tensor? residual",
        (0, 1, 2, 3, 4, 6, 7),
        _infer_ffnified_attention,
    ),
    Operator(
        "channel_mixer",
        "Tensor x, Tensor weight, Tensor? bias, Tensor expand_weight, Tensor? expand_bias, Tensor project_weight, "
        "Tensor? project_bias, str activation, Tensor? scale, Tensor? residual",
        (0, 1, 2, 3, 4, 5, 6, 8, 9),
        _infer_channel_mixer,
    ),
)

#: Runs on the CPU's kernels or on the reference.
CONV2D = Operator(
    "conv2d",
    "Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[4] padding, str activation",
    (0, 1, 2),
    _infer_depthwise_conv2d,
)


def _reference_forward(operator: str, out: Tensor, args: tuple) -> Tensor:
    return out.copy_(getattr(reference, operator)(*args))


def _chosen_backward(operator: str, call: tuple) -> list[Tensor]:
    name = f"{operator}_backward"
    return getattr(dispatch.select(name, call), name)(*call)


def _define(
    library: torch.library.Library,
    operator: Operator,
    run_forward: Callable[[str, Tensor, tuple], Tensor] = _reference_forward,
    run_backward: Callable[[str, tuple], list[Tensor]] = _chosen_backward,
) -> None:
    """Schemas, fakes and autograd of an operator and its backward in a namespace.

    ``run_forward(operator, out, args)`` fills ``out``, ``run_backward(operator, call)`` returns the wanted gradients,
    for devices for which no native kernel is registered.
    """
    namespace = library.ns
    forward_name, backward_name = f"{namespace}::{operator.name}", f"{namespace}::{operator.name}_backward"
    backward = getattr(reference, f"{operator.name}_backward")
    arity = operator.arguments.count(",") + 1

    def forward_fallback(*args):
        return run_forward(operator.name, empty_output(*operator.infer(*args)), args)

    def backward_fallback(*call):
        grads = run_backward(operator.name, call)
        return [as_laid_out(g, t, call[0]) for g, t in zip(grads, wanted(*call), strict=True)]

    def as_laid_out(grad, like, incoming):
        """In the strides that the fake announces, and never the incoming gradient itself."""
        out = torch.empty_like(like)
        return grad if grad is not incoming and grad.stride() == out.stride() else out.copy_(grad)

    def wanted(grad, *args_and_mask):
        *args, mask = args_and_mask
        return [args[i] for i, m in zip(operator.tensors, mask, strict=True) if m]

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*(inputs[i] for i in operator.tensors))
        ctx.static = tuple(None if i in operator.tensors else value for i, value in enumerate(inputs))

    def differentiate(ctx, grad):
        args = list(ctx.static)
        for i, tensor in zip(operator.tensors, ctx.saved_tensors, strict=True):
            args[i] = tensor
        wanted_at = {i: ctx.needs_input_grad[i] and i != operator.residual for i in operator.tensors}
        found: dict[int | None, Tensor] = {operator.residual: grad}
        if any(wanted_at.values()):
            mask = list(wanted_at.values())
            grads = getattr(getattr(torch.ops, namespace), f"{operator.name}_backward").default(grad, *args, mask)
            found.update(zip([i for i, wanted in wanted_at.items() if wanted], grads, strict=True))
        return tuple(found.get(i) if ctx.needs_input_grad[i] else None for i in range(arity))

    def setup_backward_context(ctx, inputs, output):
        ctx.tensors = (0, *(i + 1 for i in operator.tensors))
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensors))
        ctx.static = tuple(None if i in ctx.tensors else value for i, value in enumerate(inputs))

    def differentiate_backward(ctx, grads):
        # Second derivatives go through the reference, whose gradients are differentiable themselves. Aliases of the
        # inputs keep apart what depends on x directly and what depends on it through the incoming gradient.
        args = list(ctx.static)
        with torch.enable_grad():
            for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
                args[i] = None if tensor is None else tensor.view_as(tensor)
            outputs = backward(*args)
        inputs = [args[i] for i in ctx.tensors if args[i] is not None and ctx.needs_input_grad[i]]
        pairs = [
            (out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out.requires_grad
        ]
        second = torch.autograd.grad(
            [out for out, _ in pairs], inputs, [grad for _, grad in pairs],
            allow_unused=True, create_graph=torch.is_grad_enabled(),
        )  # fmt: skip
        found = iter(second)
        return tuple(
            next(found) if i in ctx.tensors and args[i] is not None and ctx.needs_input_grad[i] else None
            for i in range(arity + 2)
        )

    library.define(operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.define(operator.backward_schema, tags=(torch.Tag.pt2_compliant_tag,))
    # What the CPU library's kernel of the backward hands on: calls that it does not take.
    library.define(operator.backward_schema.replace("_backward(", "_backward_composed(", 1))
    library.impl(operator.name, forward_fallback, "CompositeExplicitAutograd")
    for name in (f"{operator.name}_backward", f"{operator.name}_backward_composed"):
        library.impl(name, backward_fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(forward_name, lambda *args: empty_output(*operator.infer(*args)), lib=library)
    torch.library.register_fake(backward_name, lambda *call: [torch.empty_like(t) for t in wanted(*call)], lib=library)
    autograd.register(library, operator.name, differentiate, setup_context)
    torch.library.register_autograd(
        backward_name, differentiate_backward, setup_context=setup_backward_context, lib=library
    )


LIBRARY = torch.library.Library("ffnet_kernels", "DEF")
TRITON_LIBRARY = torch.library.Library("ffnet_kernels_triton", "DEF")
CUDA_LIBRARY = torch.library.Library("ffnet_kernels_cuda", "DEF")
for _operator in OPERATORS:
    _define(LIBRARY, _operator)
    _define(TRITON_LIBRARY, _operator, triton.run_forward, triton.run_backward)
    _define(CUDA_LIBRARY, _operator, cuda.run_forward, cuda.run_backward)
_define(LIBRARY, CONV2D)

#: Layers in a row on the CPU's kernels, for inference in eager mode: see :mod:`ffnet_kernels.sequence`.
LIBRARY.define("sequence(Tensor x, Tensor?[] tensors, int[] numbers, float eps) -> Tensor")
