"""Layers in a row as one call: what eager inference on the CPU spends between operators is Python.

A small model calls its operators in quick succession, and modules, attributes and checks of arguments lie between
two calls. `Sequence` hands all its layers to one native operator. What they are is collected once and looked over in
each call: it is collected anew when the class, an attribute, a child, a parameter or a hook of a module in it has
changed. Values are read from the parameters themselves, in every call.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from . import checks, dispatch

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

# csrc/bindings/torch_cpu_sequence.cpp has the same order.
_CONV2D, _DEPTHWISE_CONV2D, _FFNIFIED_ATTENTION, _CHANNEL_MIXER, _POOLED_LINEAR = range(5)
_ACTIVATION = {name: index for index, name in enumerate(checks.ACTIVATIONS)}
_NO_GEOMETRY = (0,) * 6
_DROPOUTS = (nn.Dropout, nn.Dropout2d)


_COLLECTED = "_collected_layers"  # the attribute of a module that keeps its `_Collected`
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # without gradients no others are called


class Layers:
    """Operators in the order in which they run, each on the result of the one before.

    A module that can run here defines ``add_kernel_layers(layers) -> bool``, which stands for its ``forward`` of one
    map: it calls `watch` for every further module that decides what runs, takes tensors from `parameters`, and adds
    operators by the methods named like them.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor | None] = []
        self.numbers: list[int] = []
        self.eps = 0.0
        self.refused = False
        self.inputs: int | None = None  # channels of the map that goes in
        self._channels: int | None = None  # of the map so far
        self._modules: list[nn.Module] = []
        self._attributes: list[dict] = []  # of these modules
        # By name of a registry, such as "_modules", the attributes of the modules whose entries in it matter.
        self._registered: defaultdict[str, list[dict]] = defaultdict(list)
        self._computed = False
        self._snapshot: tuple = ()

    def __len__(self) -> int:
        return len(self.numbers) // (3 + len(_NO_GEOMETRY))

    def takes(self, x: Tensor) -> bool:
        """Whether the first layer is one for as many channels; the native operator would take some others, too."""
        return x.shape[1] == self.inputs

    def _follow(self, inputs: int, outputs: int) -> None:
        if self._channels is None:
            self.inputs = inputs
        self.refused |= self._channels not in (None, inputs)
        self._channels = outputs

    def conv2d(self, weight, bias, *, stride=1, padding=0, activation: str = "none") -> None:
        self._follow(weight.shape[1], weight.shape[0])
        self._convolution(_CONV2D, weight, bias, stride, padding, activation)

    def depthwise_conv2d(self, weight, bias, *, channels: int, stride=1, padding=0, activation: str = "none") -> None:
        self._follow(channels, weight.shape[0])
        self._convolution(_DEPTHWISE_CONV2D, weight, bias, stride, padding, activation)

    def _convolution(self, kind: int, weight, bias, stride, padding, activation: str) -> None:
        strides, pads = checks.strides_and_padding(weight.shape[2:], stride, padding)
        self.tensors += (weight, bias)
        self.numbers += (kind, _ACTIVATION[activation], False, *strides, *pads)

    def ffnified_attention(
        self, key, key_bias, value, value_bias, scale, *, activation: str, projection=(None, None), residual: bool
    ) -> None:
        """``projection``: weight ``[C, C, 1, 1]`` and bias of the 1×1 convolution that makes the query, if any.
        ``residual``: whether the layer adds what came into it."""
        self._follow(key.shape[0], key.shape[0])
        self.tensors += (*projection, key, key_bias, value, value_bias, scale)
        self.numbers += (_FFNIFIED_ATTENTION, _ACTIVATION[activation], residual, *_NO_GEOMETRY)

    def channel_mixer(
        self, weight, bias, expand_weight, expand_bias, project_weight, project_bias, scale, *,
        activation: str, residual: bool,
    ) -> None:  # fmt: skip
        self._follow(weight.shape[0], project_weight.shape[0])
        self.tensors += (weight, bias, expand_weight, expand_bias, project_weight, project_bias, scale)
        self.numbers += (_CHANNEL_MIXER, _ACTIVATION[activation], residual, *_NO_GEOMETRY)

    def pooled_linear(self, weight, bias, *, norm=(None, None, None, None), eps: float = 0.0) -> None:
        """A classifier's head: ``weight · norm(mean over pixels) + bias``; `run` then returns ``[N, O]``.

        ``norm``: weight, bias, running mean and variance of a batch normalisation; ``eps`` is its own.
        """
        self._follow(weight.shape[1], weight.shape[0])
        self.tensors += (*norm, weight, bias)
        self.numbers += (_POOLED_LINEAR, _ACTIVATION["none"], False, *_NO_GEOMETRY)
        self.eps = eps

    def add(self, module: nn.Module | None) -> bool:
        """Adds what ``module`` computes. False if it cannot, or if something waits for the module to be called."""
        if module is None or not self.watch(module):
            return False
        kind = type(module)
        if _adds_layers(kind):
            return module.add_kernel_layers(self)  # type: ignore[operator]
        if kind is nn.Sequential:
            return all(map(self.add, module._modules.values()))
        return kind is nn.Identity or (kind in _DROPOUTS and not module.training)

    def watch(self, module: nn.Module, *, called: bool = True) -> bool:
        """Has the layers collected anew when ``module`` changes.

        Returns whether it does what its class does, when it is ``called``: it has no hook and no ``forward`` of its
        own.
        """
        attributes = module.__dict__
        self._modules.append(module)
        self._attributes.append(attributes)
        if module._modules or isinstance(module, nn.Sequential):
            self._registered["_modules"].append(attributes)
        if not called:
            return True
        for name in _HOOKS:
            self._registered[name].append(attributes)
        return "forward" not in attributes and not any(attributes[name] for name in _HOOKS)

    def parameters(self, module: nn.Module, *names: str) -> list[Any]:
        """Parameters and buffers of a module by name."""
        attributes = module.__dict__
        for registry in ("_parameters", "_buffers"):
            if not attributes[registry].keys().isdisjoint(names):
                self._registered[registry].append(attributes)
        self._computed |= not set(names) <= {*module._parameters, *module._buffers}
        return [getattr(module, name) for name in names]

    def remember(self) -> None:
        """What is watched, as it is now."""
        self._snapshot = self._look()

    def are_current(self) -> bool:
        """Whether what is watched is what it was."""
        if self._computed:
            return False
        kinds, attributes, content = self._look()
        old_kinds, old_attributes, old_content = self._snapshot
        try:
            unchanged = kinds == old_kinds and attributes == old_attributes
        except Exception:  # of a comparison of whatever users keep in a module
            return False
        return unchanged and len(content) == len(old_content) and all(map(is_, content, old_content))

    def _look(self) -> tuple[list, list, list]:
        registries = (map(itemgetter(name), owners) for name, owners in self._registered.items())
        return (
            list(map(type, self._modules)),
            list(map(list, map(dict.values, self._attributes))),
            [*chain.from_iterable(map(dict.values, chain.from_iterable(registries)))],
        )

    def run(self, x: Tensor) -> Tensor:
        """The result for a map ``[N, C, H, W]`` that the kernels take."""
        return torch.ops.ffnet_kernels.sequence.default(x, self.tensors, self.numbers, self.eps)


def _adds_layers(kind: type) -> bool:
    """Whether a class says what its ``forward`` computes; one derived from it with another ``forward`` does not."""
    for cls in kind.__mro__:
        if "add_kernel_layers" in vars(cls):
            return True
        if "forward" in vars(cls):
            return False
    return False


def _applies(x: Any) -> bool:
    """Whether layers can run in one call on this map: CPU kernels are chosen for it and nobody looks between layers."""
    return (
        dispatch.is_plain_cpu_call("sequence", x, (), ())
        and not nn_module._global_forward_hooks
        and not nn_module._global_forward_pre_hooks
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
    )


class _Collected:
    """The layers of a module, for it alone: copies of the module collect their own."""

    layers: Layers | None = None

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


def run(module: Any, x: Tensor) -> Tensor | None:
    """What ``module.add_kernel_layers`` adds, on a map; None where that does not apply and the module is to run as
    written."""
    if not _applies(x):
        return None
    collected = module.__dict__.get(_COLLECTED)
    if collected is None:
        collected = module.__dict__[_COLLECTED] = _Collected()
    layers = collected.layers
    if layers is None or not layers.are_current():
        layers = Layers()
        layers.watch(module, called=False)
        added = module.add_kernel_layers(layers)  # which may refuse by itself
        layers.refused |= not added or not layers.numbers
        layers.remember()
        collected.layers = layers  # whole: other threads may be in the same call
    if layers.refused or not layers.takes(x):
        return None
    try:
        return layers.run(x)
    except (RuntimeError, TypeError):
        return None  # running as written says in better words what is wrong


class Sequence(nn.Sequential):
    """An ``nn.Sequential`` whose layers run in one call where they can."""

    @classmethod
    def from_sequential(cls, sequential: nn.Sequential) -> Self:
        """A module that shares the children and hooks of ``sequential``."""
        module = cls.__new__(cls)
        module.__dict__ = dict(sequential.__dict__)
        return module

    def add_kernel_layers(self, layers: Layers) -> bool:
        return all(map(layers.add, self._modules.values()))

    def forward(self, input: Tensor) -> Tensor:
        out = run(self, input)
        return super().forward(input) if out is None else out
