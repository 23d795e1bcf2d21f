"""What all operators share: registration with torch's dispatcher, calls, and gradients.

``torch.ops.ffnet_kernels.<operator>`` runs a native kernel where its library has registered one for the device, else
the reference; ``torch.ops.ffnet_kernels_triton.<operator>`` and ``torch.ops.ffnet_kernels_cuda.<operator>`` are the
same operators on Triton and CUDA kernels, and ``torch.ops.ffnet_kernels_training`` has those of training steps.

Gradients come from kernels, through an operator of their own, ``<operator>_backward``. For double backward, and in
torch.func transforms, plain PyTorch differentiates the operator's reference instead.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import choice, cpu, cuda, reference, triton
from . import _sharding, schemas
from ._arguments import autocast

LIBRARIES = {
    name: torch.library.Library(name, "DEF")
    for name in ("ffnet_kernels", "ffnet_kernels_triton", "ffnet_kernels_cuda", "ffnet_kernels_training")
}


def define(library: torch.library.Library, schema: str) -> Any:
    """Returns the operator of a schema, defining it if no native library has.

    Raises:
        RuntimeError: if a library defined it with another schema.
    """
    name = schema.partition("(")[0]
    namespace = getattr(torch.ops, library.ns)
    if not hasattr(namespace, name):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(namespace, name).default
    own = torch._C.parse_schema(f"{library.ns}::{schema}")
    if own != overload._schema:
        raise RuntimeError(
            f"a native library of another version of ffnet_kernels is loaded (install the package again): expected "
            f"{own}, got {overload._schema}"
        )
    return overload


for _schema in (schemas.CONV2D_PAIR, schemas.NORM_MIXER, schemas.STEPS):
    define(LIBRARIES["ffnet_kernels"], _schema)


class Operator:
    """An operator with one result, whose backward operator returns the gradients that a mask asks for.

    Its module provides, for arguments as in the schema unless stated otherwise:

    ``checked``: normalises the arguments of the public function, or raises;
    ``spelled``: the same for the CPU kernel, quickly, for arguments that are right;
    ``reference``: computes it in plain PyTorch;
    ``empty``: allocates its result, in the shape and layout that kernels return;
    ``gradient``: on a backend's primitives, for ``(primitives, grad, *args, mask)``: the gradients of all tensors but
    the residual, None where the mask does not ask for one.
    """

    def __init__(self, module: str, *, weights: tuple[str, ...] = (), parallel: bool = False) -> None:
        """Registers the operator of a module with torch.

        Args:
            module: its name, of which the last part is the operator's, by which `schemas` has its arguments. Tensors
                among them may need a gradient; ``residual``, which is added to the result, is the last of these.
            weights: names of the weights of its convolutions, for counting their work.
            parallel: whether these convolve the same map; otherwise each convolves the result of the one before.
        """
        self.name = module.rpartition(".")[2]
        self.defined: Any = sys.modules[module]
        self.weights, self.parallel = weights, parallel
        kinds, self.names = zip(*(argument.split() for argument in self.arguments.split(", ")), strict=True)
        self.tensors = tuple(i for i, kind in enumerate(kinds) if kind.startswith("Tensor"))
        self.residual = self.names.index("residual") if "residual" in self.names else None
        #: The overloads of the backends that have kernels for it.
        self.overloads: dict[str, Any] = {}
        self.reference: Callable[..., Tensor] = self.defined.reference
        self.register()
        OPERATORS[self.name] = self

    @property
    def arguments(self) -> str:
        """As the schema has them."""
        return schemas.ARGUMENTS[self.name]

    def run(self, *arguments: Any) -> Tensor:
        """Runs the operator with the arguments of the public function."""
        if is_plain_cpu_call(arguments[0]) and cpu.slower(self.name, arguments) is None:
            # The kernel checks its arguments itself; if they are wrong, the checks below explain it better.
            try:
                return call(self.overloads["cpu"], *self.defined.spelled(*arguments))
            except _WRONG_ARGUMENTS:
                pass
        if _sharding.is_distributed(arguments[0]):
            return _sharding.run(self, arguments)
        checked = self.defined.checked(*autocast(*arguments))
        return self.on(choice.select(self.name, checked).NAME, *checked)

    def on(self, backend: str, *checked: Any) -> Any:
        """Runs the operator on a backend, with arguments as in the schema."""
        overload = self.overloads.get(backend)
        return self.reference(*checked) if overload is None else call(overload, *checked)

    def backward_on(self, backend: str, *call: Any) -> list[Tensor]:
        """Computes the wanted gradients on a backend, with arguments as in the backward operator's schema."""
        overload = self.overloads.get(backend)
        return self._fallback_gradients(reference, call) if overload is None else backward_of(overload)(*call)

    def register(self) -> None:
        self.define(LIBRARIES["ffnet_kernels"], cpu)
        for backend in (triton, cuda):
            if self.name in backend.OPERATORS:
                self.define(LIBRARIES[f"ffnet_kernels_{backend.NAME}"], backend)

    def define(self, library: torch.library.Library, backend: Any) -> None:
        """The operator and its backward in a namespace."""
        forward, backward, composed = schemas.of_operator(self.name)
        overload = self._declare(library, forward, self._fake)
        self._declare(library, backward, lambda *call: [torch.empty_like(t) for t in self._wanted(call)])
        define(library, composed)

        def run(*args):
            out = self.defined.empty(*args)
            return out.copy_(self.reference(*args)) if backend is cpu else backend.run_forward(self, out, args)

        # Used where no native kernel is registered for a device.
        library.impl(self.name, run, "CompositeExplicitAutograd")
        for name in (f"{self.name}_backward", f"{self.name}_backward_composed"):
            library.impl(name, lambda *call: self._fallback_gradients(backend, call), "CompositeExplicitAutograd")
        self._make_differentiable(library, overload, _wanted_gradients)
        self.overloads.setdefault(backend.NAME, overload)

    def _declare(self, library: torch.library.Library, schema: str, fake: Callable[..., Any]) -> Any:
        overload = define(library, schema)
        torch.library.register_fake(overload, fake, lib=library)
        return overload

    def _fake(self, *args: Any) -> Tensor:
        if len(devices := {args[i].device for i in self.tensors if args[i] is not None}) > 1:
            raise ValueError(f"{self.name}: expected tensors on one device, got {', '.join(sorted(map(str, devices)))}")
        return self.defined.empty(*args)

    def _wanted(self, call: tuple) -> list[Tensor]:
        """The tensors whose gradients a call of the backward operator asks for."""
        return [call[i + 1] for i in itertools.compress(self.tensors, call[-1])]

    def _fallback_gradients(self, backend: Any, call: tuple) -> list[Tensor]:
        """Computes the wanted gradients where there is no native kernel."""
        grad, *args, mask = call
        if backend is not cpu and backend is not reference:
            found = backend.run_backward(self, call)
        else:
            composed = backend is cpu and self.name in cpu.COMPOSED and choice.prefers(cpu, self.name, tuple(args))
            found = self.defined.gradient(cpu if composed else reference, *call)
        gradients = itertools.compress([*found, grad], mask)
        return [_as_laid_out(g, t, grad) for g, t in zip(gradients, self._wanted(call), strict=True)]

    def _make_differentiable(self, library: torch.library.Library, overload: Any, kernel_gradients: Callable) -> None:
        """Registers gradients with the dispatcher and for the fast path of `call`; the latter is why this is written
        for speed.

        ``kernel_gradients(backward, grad, args, kept, mask)``: the gradients of all tensors but the residual, where
        wanted, by the backward operator. ``kept`` are the results after the first.
        """
        backward, arity, tensors, residual = backward_of(overload), len(self.names), self.tensors, self.residual
        kept = slice(len(tensors), len(tensors) + len(overload._schema.returns) - 1)
        others = [i for i in range(arity) if i not in tensors]
        stored = [tensors.index(i) if i in tensors else kept.stop + others.index(i) for i in range(arity)]
        found_at = [tensors.index(i) if i in tensors and i != residual else 0 for i in range(arity)]
        # Like plain layers, keeps no biases, so these may change before the backward pass.
        biases = [place for place, i in enumerate(tensors) if self.names[i].endswith(("bias", "beta"))]

        def setup_context(ctx, inputs, output):
            saved = [inputs[i] for i in tensors]
            ctx.biases = []
            if is_eager():
                for place in biases:
                    if saved[place] is not None:
                        ctx.biases.append((place, saved[place], saved[place]._version))
                        saved[place] = saved[place].detach().clone()
            if isinstance(output, tuple):
                saved += output[1:]
                ctx.mark_non_differentiable(*output[1:])
            ctx.save_for_backward(*saved)
            ctx.others = [inputs[i] for i in others]
            ctx.set_materialize_grads(False)

        def differentiate(ctx, grad, *_of_kept):
            if grad is None:
                return (None,) * arity
            store, needed = (*ctx.saved_tensors, *ctx.others), ctx.needs_input_grad
            args = [store[i] for i in stored]
            if torch.is_grad_enabled() or is_batched(grad) or choice.is_transformed():
                for place, bias, version in ctx.biases:  # with their graphs
                    if bias._version != version:
                        raise RuntimeError(
                            "one of the variables needed for gradient computation has been modified by an inplace "
                            f"operation: the {self.names[tensors[place]]} of {self.name}, for second derivatives"
                        )
                    args[tensors[place]] = bias
                return gradients_of(self.reference, grad, args, needed)
            mask = [needed[i] for i in tensors]
            if residual is not None:
                mask[-1] = False
            found = kernel_gradients(backward, grad, args, store[kept], mask) if any(mask) else [None] * arity
            result = [found[i] if n else None for i, n in zip(found_at, needed, strict=True)]
            if residual is not None and needed[residual]:
                result[residual] = grad
            return tuple(result)

        torch.library.register_autograd(overload, differentiate, setup_context=setup_context, lib=library)
        _DIFFERENTIATED[overload] = differentiate, setup_context


class TrainingOperator(Operator):
    """A CPU-only operator whose kernel also returns what its backward operator needs.

    Its module has ``reference`` and ``empty`` (of all results), and

    ``empty_gradients``: as ``empty``, of the backward operator;
    ``kernel_gradients``: see `Operator._make_differentiable`.
    """

    @property
    def arguments(self) -> str:
        return schemas.TRAINING[self.name][0]

    def register(self) -> None:
        library = LIBRARIES["ffnet_kernels_training"]
        forward, backward = schemas.of_training(self.name)
        overload = self._declare(library, forward, self.defined.empty)
        self._declare(library, backward, self.defined.empty_gradients)
        self._make_differentiable(library, overload, self.defined.kernel_gradients)
        self.overloads["cpu"] = overload


#: What kernels and dispatch raise for bad arguments. No other exception is treated so, such as the one by which saving
#: a tensor ends the second forward pass of `torch.utils.checkpoint`.
_WRONG_ARGUMENTS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
#: By name.
OPERATORS: dict[str, Operator] = {}
#: By overload, its gradient and what keeps the tensors for it.
_DIFFERENTIATED: dict[Any, tuple[Callable, Callable]] = {}


is_batched = torch._C._functorch.is_legacy_batchedtensor  # in a vectorised Jacobian


def is_eager() -> bool:
    """Whether calls simply run eagerly: nothing compiles, traces, transforms or observes them."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
        or choice.is_transformed()
    )


def is_plain_cpu_call(x: Any) -> bool:
    """Whether operators on a map x simply run on the CPU kernels; the precondition of the eager fast path."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.dim() == 4
        and x.dtype in cpu.DTYPES
        and is_eager()
        and choice.prefers_cpu()
        and not torch.is_autocast_enabled("cpu")
    )


def call(overload: Any, *args: Any) -> Any:
    """``overload(*args)``, of an operator above.

    ``torch.library.register_autograd`` goes through the dispatcher and many Python frames, forward and backward, which
    is noticeable for small layers. In eager mode an ``autograd.Function`` avoids both.
    """
    if torch.is_grad_enabled() and is_eager():
        return _function(overload).apply(*args)
    return overload(*args)


@functools.cache
def _function(overload: Any) -> Any:
    differentiate, setup_context = _DIFFERENTIATED[overload]

    def forward(ctx, *args):  # with a separate setup_context, every call would inspect its signature
        with torch._C._AutoDispatchBelowAutograd():
            output = overload(*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    return type(overload.name().rpartition("::")[2], (torch.autograd.Function,), methods)


def backward_of(overload: Any) -> Any:
    """The backward operator of an operator, in its namespace."""
    namespace, name = overload.name().split("::")
    return getattr(getattr(torch.ops, namespace), f"{name}_backward").default


def gradients_of(function: Callable[..., Tensor], grad: Tensor, args: list, needed: tuple) -> tuple:
    """Gradients of the arguments that need one, with a graph if the backward pass creates one."""
    create_graph, device = torch.is_grad_enabled(), grad.device.type
    autocasts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    # The arguments have the dtypes of the forward pass, whatever autocast context the backward pass runs in.
    with torch.enable_grad(), torch.autocast(device, enabled=False) if autocasts else contextlib.nullcontext():
        # Aliases keep apart what depends on an argument directly and what depends on it through the incoming gradient.
        args = [arg.view_as(arg) if isinstance(arg, Tensor) else arg for arg in args]
        wanted = list(itertools.compress(args, needed))
        found = iter(torch.autograd.grad(function(*args), wanted, grad, create_graph=create_graph, allow_unused=True))
    return tuple(next(found) if n else None for n in needed)


def _wanted_gradients(backward: Any, grad: Tensor, args: list, kept: tuple, mask: list[bool]) -> list[Tensor | None]:
    found = iter(backward(grad, *args, mask))
    return [next(found) if wanted else None for wanted in mask]


def _as_laid_out(grad: Tensor, like: Tensor, incoming: Tensor) -> Tensor:
    """With the strides that the fake kernel declares, and never the incoming gradient itself."""
    out = torch.empty_like(like)
    return grad if grad is not incoming and grad.stride() == out.stride() else out.copy_(grad)
