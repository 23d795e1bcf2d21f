"""Runs a model on the operators while leaving the model itself unchanged."""

from __future__ import annotations

import functools
import logging
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from . import autocast, opaque
from .backends.choice import BackendError
from .capture import PLACE, NotCapturable, globally_hooked, is_library, named_modules
from .ops._operator import is_eager
from .program import Program
from .state import State
from .trial import (
    are_tensors_of_their_own,
    as_laid_out,
    compared,
    compared_aside,
    corner_of,
    is_flat,
    strides_in_format_of,
)

logger = logging.getLogger("ffnet_kernels")

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_MOST_LAYOUTS = 64
_LEAST_OFTEN = 1024


def optimize(model: ModuleT) -> ModuleT:
    """Makes a model run on the operators, in place, and returns it.

    At the first call, what the model computes from one map ``[N, C, H, W]`` is made into a program: layers become
    operators, batch normalisation, parallel branches and layer scales are folded into weights that the program keeps,
    and maps are channels-last on the CPU. The program runs if a call is plain eager PyTorch; otherwise, and whenever
    its result is not certain, the modules run as they are. Calls with gradients have a program of their own, whose
    operators keep little for the backward pass and fold nothing.

    1. Results are those of the plain model, to rounding, in every later state, or the plain model's own error is
       raised. The first call for each shape and layout of the map runs both and compares them (of a large map, on a
       corner; with gradients, once).
    2. The model is left unchanged: modules, classes, parameters, buffers, hooks, state dict and both modes, and
       everything that can be done with them. Copies and pickles are plain models: optimize them again. Results have the
       strides of the plain model's.
    3. Later changes take effect: of values, parameters, submodules, classes, hooks, patched methods, attributes, modes.
       PyTorch does not track edits through ``.data``, of tensors made in inference mode, or of their memory by others,
       such as collectives of torch.distributed: call `refresh` if such a weight is folded.
    4. No user code runs that would not run without it. Modules of PyTorch, torchvision, timm and ffnet are trusted to
       be free of side effects; a module of any other class is called as it is, and modules below it have programs of
       their own. ``torch.compile(model, backend="ffnet_kernels")`` captures that, too.
    5. A program holds at most one additional copy of the weights that folding changes.
    6. `report` shows what runs where, and why not; `restore` undoes everything.

    Copies of a module's ``__dict__``, such as the replicas of ``nn.DataParallel``, run the modules as they are.

    Args:
        model: a module whose forward takes a map ``[N, C, H, W]``, or that has such modules.

    Returns:
        The same model.

    Raises:
        TypeError: if ``model`` is not an ``nn.Module``.
    """
    require_module(model, "optimize")
    known: Any = functools.cache(is_library)
    for _, module in named_modules(model):
        place = vars(module).get(PLACE)
        is_free = place is None or (isinstance(place, Shortcut) and place.module() is not module)
        if is_free and known(type(module)) and _has_convolution(module):
            module.__dict__[PLACE] = Shortcut(module)
    return model


def restore(model: ModuleT) -> ModuleT:
    """Undoes what `optimize` did to a model, in place, and returns the model.

    Raises:
        TypeError: if ``model`` is not an ``nn.Module``.
    """
    for module, _ in _shortcuts(model, "restore"):
        del module.__dict__[PLACE]
    return model


def refresh(model: ModuleT) -> ModuleT:
    """Makes an optimised model recompute all that it has computed from its weights, and returns the model.

    Needed only after changes that PyTorch does not track, see `optimize`.

    Raises:
        TypeError: if ``model`` is not an ``nn.Module``.
    """
    for _, shortcut in _shortcuts(model, "refresh"):
        for way in shortcut.ways:
            if way.program is not None:
                way.program.constants.known = None
    return model


def _shortcuts(model: nn.Module, asker: str) -> list[tuple[nn.Module, Shortcut]]:
    require_module(model, asker)
    found = ((module, vars(module).get(PLACE)) for _, module in named_modules(model))
    return [(module, shortcut) for module, shortcut in found if isinstance(shortcut, Shortcut)]


def require_module(model: Any, asker: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{asker}: expected an nn.Module, got {type(model).__name__}")


def _has_convolution(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d) for _, m in named_modules(module))


class _Local(threading.local):
    """Per thread: whether modules are to run as written, without programs of modules below them."""

    is_plain = False


_local = _Local()


class Shortcut:
    """What an optimised module calls: a program if one applies, otherwise the module as written."""

    is_program = True

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        #: Without and with gradients, and both under autocast.
        self.ways = tuple(Way(differentiable) for _ in range(2) for differentiable in (False, True))
        self.last = self.ways[0]
        self.key = opaque.key_of(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self.module()
        if torch.compiler.is_dynamo_compiling():  # which does not trace frames
            result = module._call_impl(*args, **kwargs)
            if self.ways[0].refusal is None and opaque.may_stand_for(args, kwargs, result) and _is_traced_alone():
                return torch.ops.ffnet_kernels_modules.run(args[0], self.key, result.shape, result.stride())
            return result
        # DataParallel and others copy a module's attributes, this one included: then the copy is called.
        caller = sys._getframe(1).f_locals.get("self")
        if caller is not module and isinstance(caller, nn.Module) and vars(caller).get(PLACE) is self:
            return caller._call_impl(*args, **kwargs)
        if _local.is_plain or torch.compiler.is_compiling():
            return module._call_impl(*args, **kwargs)
        differentiable = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        way = self.last = self.ways[differentiable + 2 * torch.is_autocast_enabled("cpu")]
        if way.program is None and way.waiting:
            way.waiting -= 1
        elif len(args) == 1 and not kwargs and is_plain_eager(args[0]) and args[0].dim() == 4:
            program = way.current_program(module, args[0])
            if program is not None and program.takes(args[0]):
                way.bypass = None
                return way.run(module, program, args[0])
        way.bypass = why_not_program(way, args, kwargs)
        return module._call_impl(*args, **kwargs)

    def __reduce__(self) -> tuple:
        """Copied or pickled with a module's attributes, it is None: the copy is a plain module."""
        return type(None), ()


def _is_traced_alone() -> bool:
    """Whether torch.compile traces the call of an optimised module that has a program, and nothing around it.

    Then the module has no effects that would happen twice, and nothing traced before it changes what it computes.
    """
    traced = sys.modules["torch._dynamo.symbolic_convert"].InstructionTranslator.current_tx().output
    frame = traced.root_tx
    if frame.f_code is not Shortcut.__call__.__code__:
        return False
    shortcut, x = frame.f_locals["self"], frame.f_locals["args"][0]
    module = shortcut.module()
    if type(x) is not Tensor or x.dim() != 4 or vars(module).get(PLACE) is not shortcut or globally_hooked():
        return False
    program = shortcut.ways[0].current_program(module, x)
    if program is None or not program.takes(x):
        return False
    opaque.drop_unused(traced.graph)
    return True


# As torch.compiler.assume_constant_result does, which would import all of torch.compile.
_is_traced_alone._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Way:
    """The program of a module, with or without gradients, or the reason why there is none, and what is known of its
    results."""

    def __init__(self, differentiable: bool) -> None:
        self.differentiable = differentiable
        self.autocast: torch.dtype | None = None  # of the program
        self.program: Program | None = None
        self.refusal: str | None = None
        self.example: Tensor | None = None  # a map as the last one, without data
        self.lock = threading.Lock()
        self.patience = self.waiting = 0
        self.bypass: str | None = None  # why the last call ran the modules, where it would not do for any call

    def current_program(self, module: nn.Module, x: Tensor) -> Program | None:
        """The program for the module's present state, or None."""
        program = self.program
        if program is not None and program.fits(x) and program.is_current(module):
            self.patience, self.refusal = max(self.patience - 1, 0), None
            return program
        if self.waiting:  # the program is of an earlier state
            self.waiting -= 1
            return None
        # Rebuilt ever less often if that fails, or if the model keeps changing.
        self.patience = min(2 * self.patience + 1, _LEAST_OFTEN)
        self.waiting = self.patience - 1
        with self.lock:
            try:
                self.autocast = autocast.dtype()
                self.program = Program(module, State(module), x, self.differentiable)
            except NotCapturable as error:
                self.refusal = str(error)
                return None
            except Exception as error:  # the model is wrong: its modules raise the error
                self.refusal = f"no program can be made of it: {error}"
                return None
            self.refusal = None
            return self.program

    def run(self, module: Any, program: Program, x: Tensor) -> Any:
        key = (x.shape, x.stride(), *program.weight_strides())
        strides = program.layouts.get(key)
        if strides is None:
            return self.first_run(module, program, x, key)
        given = x
        if self.differentiable and x.requires_grad:
            grad_strides = program.grad_strides.get(key, x.stride() if x.is_contiguous() else None)
            if grad_strides is not None:
                given = x.view_as(x)
                given.register_hook(functools.partial(gradient_as_laid_out, strides=grad_strides))
        effects = Effects(program) if self.differentiable else None
        try:
            out = program.run(given)
        except BackendError:  # of one that was asked for
            raise
        except Exception as error:  # plain modules raise their own error for a wrong map
            if effects is not None:
                effects.take_back()
            result = module._call_impl(x)
            self.refuse(f"its program failed where the modules do not: {error}")
            return result
        return as_laid_out(out, strides)

    def first_run(self, module: Any, program: Program, x: Tensor, key: tuple) -> Any:
        """Runs the modules for the strides of the result, and to check that the program computes the same; with
        gradients only once, and not if it draws random numbers. If the program is for maps of any size, a corner of a
        large map is enough."""
        self.example = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        corner = None if self.differentiable or not program.is_for_any_size else corner_of(x)
        expected: Any = None
        if corner is not None:
            try:
                expected = plainly(module, corner)
            except Exception:  # it may be smaller than what is pooled
                corner = None
        tried = x if corner is None else corner
        result = expected = plainly(module, x) if corner is None else expected
        leaves, _ = tree_flatten(expected)
        level, reason = logging.WARNING, None
        if not self.differentiable:
            result, reason = compared(program.run, functools.partial(plainly, module), tried, expected)
        elif not (program.is_compared or program.draws or is_flat(x)):
            reason, program.is_compared = compared_aside(program.run, x, expected), True
        if self.differentiable and x.requires_grad:
            watch_gradient(x, leaves, lambda grad: program.grad_strides.__setitem__(key, grad.stride()))
        if reason is None and not are_tensors_of_their_own([*leaves, tried]):
            reason = "its result is no tensor of its own"
        if reason is None and (small := program.why_small(x)) is not None:
            level, reason = logging.DEBUG, str(small)
        strides: list[Any] = [] if reason is not None else [leaf.stride() for leaf in leaves]
        if corner is not None and reason is None:
            try:
                result = program.run(x)
            except BackendError:
                raise
            except Exception as error:
                reason = f"its program failed where the modules do not: {error}"
            else:
                strides = list(map(strides_in_format_of, leaves, tree_flatten(result)[0]))
                if None in strides:
                    strides = [leaf.stride() for leaf in tree_flatten(plainly(module, x))[0]]
        if reason is not None:
            result = expected if corner is None else plainly(module, x)
            self.refuse(reason, level)
            return result
        if len(program.layouts) >= _MOST_LAYOUTS:
            program.layouts.clear()
        program.layouts[key] = strides
        return as_laid_out(result, strides)

    def refuse(self, reason: str, level: int = logging.WARNING) -> None:
        logger.log(level, "optimize: %s; plain PyTorch runs", reason)
        self.program, self.refusal, self.patience, self.waiting = None, reason, _LEAST_OFTEN, _LEAST_OFTEN


class Effects:
    """The side effects of a training program, to be undone if it fails."""

    def __init__(self, program: Program) -> None:
        self.moved = program.moved
        with torch.no_grad():
            self.before = [tensor.clone() for tensor in self.moved]
        self.random = random_states(program.device) if program.draws else None

    def take_back(self) -> None:
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(self.moved)):
            for tensor, before in zip(self.moved, self.before, strict=True):
                tensor.copy_(before)
        if self.random is not None:
            torch.set_rng_state(self.random[0])
            if len(self.random) > 1:
                torch.cuda.set_rng_state(self.random[1])


def random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def watch_gradient(x: Tensor, results: list[Any], see: Callable[[Tensor], Any]) -> None:
    """Has ``see`` called with the gradient of x that backpropagation through the results computes."""
    edge = torch.autograd.graph.get_gradient_edge(x)
    seen: set[Any] = set()
    waiting = [result.grad_fn for result in results if type(result) is Tensor and result.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        for place, (behind, number) in enumerate(node.next_functions):
            if behind is edge.node and number == edge.output_nr:

                def hook(grads: Any, _: Any, place: int = place) -> None:
                    if type(grads[place]) is Tensor:
                        see(grads[place])

                node.register_hook(hook)
            elif behind is not None:
                waiting.append(behind)


def plainly(module: Any, x: Tensor) -> Any:
    """Runs a module as written, without programs of the modules below it."""
    _local.is_plain = True
    try:
        return module._call_impl(x)
    finally:
        _local.is_plain = False


def is_plain_eager(x: Any) -> bool:
    """Whether a call on x is plain eager execution: no tracing, transforms, modes or subclasses."""
    return (
        type(x) is Tensor
        and is_eager()  # first, as the rest cannot be compiled
        and torch._C._len_torch_function_stack() == 0  # before anything that a mode would see
        and x.layout is torch.strided
        and not x.is_nested
        and x.device.type in ("cpu", "cuda")
        and x.is_floating_point()
        and not x.is_neg()
        and autocast.is_known(x)
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None  # mainly of checkpointing
        and not globally_hooked()
    )


def why_not_program(way: Way, args: tuple, kwargs: dict) -> str | None:
    """Why a call could not use a program, as far as the call itself is the reason."""
    if way.program is None and way.refusal is not None:
        return None
    if len(args) != 1 or kwargs:
        return "it was called with other arguments than one map"
    if type(args[0]) is not Tensor or torch._C._len_torch_function_stack() > 0:  # which would see the calls below
        return _NOT_PLAIN
    device = args[0].device.type
    if torch.amp.is_autocast_available(device) and not autocast.is_known(args[0]):
        return f"it was called under autocast to {torch.get_autocast_dtype(device)} on a map of {args[0].dtype}"
    return None if is_plain_eager(args[0]) else _NOT_PLAIN


_NOT_PLAIN = "it was called in a way that is not plain eager PyTorch"


def gradient_as_laid_out(grad: Tensor, strides: tuple) -> Tensor:
    if not is_batched(grad):
        return as_laid_out(grad, [strides])
    is_row_major = torch.empty(grad.shape, device="meta").stride() == strides
    return grad.contiguous() if is_row_major else grad  # no other strides can be asked for


is_batched = torch._C._functorch.is_legacy_batchedtensor  # in a vectorised Jacobian
