"""Layers in a row as one call: what eager inference on the CPU spends between operators is Python.

A small model calls an operator every 0.2 ms, and some 30 µs of modules, attributes and arguments lie between two calls.
`Sequence` collects its layers anew in each call, so it sees every change that was made to them, and hands all of them to
one native operator.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from . import checks, dispatch

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

# csrc/bindings/torch_cpu_sequence.cpp has the same order.
_CONV2D, _DEPTHWISE_CONV2D, _FFNIFIED_ATTENTION, _CHANNEL_MIXER = range(4)
_ACTIVATION = {name: index for index, name in enumerate(checks.ACTIVATIONS)}
_NO_GEOMETRY = (0,) * 6
_SKIPPED = (nn.Identity, nn.Dropout, nn.Dropout2d)


class Layers:
    """Operators in the order in which they run, each on the result of the one before.

    The methods take the tensors of the functions of the same name as they are; nothing is checked before `run`.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor | None] = []
        self.numbers: list[int] = []

    def __len__(self) -> int:
        return len(self.numbers) // (3 + len(_NO_GEOMETRY))

    def conv2d(self, weight, bias, stride=1, padding=0, activation: str = "none") -> None:
        self._convolution(_CONV2D, weight, bias, stride, padding, activation)

    def depthwise_conv2d(self, weight, bias, stride=1, padding=0, activation: str = "none") -> None:
        self._convolution(_DEPTHWISE_CONV2D, weight, bias, stride, padding, activation)

    def _convolution(self, operator: int, weight, bias, stride, padding, activation: str) -> None:
        strides, pads = checks.strides_and_padding(weight.shape[2:], stride, padding)
        self.tensors += (weight, bias)
        self.numbers += (operator, _ACTIVATION[activation], False, *strides, *pads)

    def ffnified_attention(
        self, key, key_bias, value, value_bias, activation, scale, *, query=None, query_bias=None, residual: bool
    ) -> None:
        """``query``: the weight ``[C, C, 1, 1]`` of the projection; None where the layer begins behind it.
        ``residual``: whether the layer adds what came into it."""
        self.tensors += (query, query_bias, key, key_bias, value, value_bias, scale)
        self.numbers += (_FFNIFIED_ATTENTION, _ACTIVATION[activation], residual, *_NO_GEOMETRY)

    def channel_mixer(
        self, weight, bias, expand_weight, expand_bias, project_weight, project_bias, activation, scale, *,
        residual: bool,
    ) -> None:  # fmt: skip
        self.tensors += (weight, bias, expand_weight, expand_bias, project_weight, project_bias, scale)
        self.numbers += (_CHANNEL_MIXER, _ACTIVATION[activation], residual, *_NO_GEOMETRY)

    def add(self, module: nn.Module | None) -> bool:
        """Whether ``module`` could add what it computes. One that is called for its hooks cannot.

        Modules that can define ``add_layers(layers) -> bool``, which stands for ``forward`` of one map.
        """
        if (
            module is None
            or module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return False
        kind = type(module)
        if _adds_layers(kind):
            return module.add_layers(self)  # type: ignore[operator]
        if kind is nn.Sequential:
            return all(map(self.add, module._modules.values()))
        return kind in _SKIPPED and not module.training

    def run(self, x: Tensor) -> Tensor:
        """The result for a map that `applies` to."""
        return torch.ops.ffnet_kernels.sequence.default(x, self.tensors, self.numbers)


@functools.cache
def _adds_layers(kind: type) -> bool:
    """Whether a class says what its ``forward`` computes; one derived from it with a ``forward`` of its own does not."""
    for cls in kind.__mro__:
        if "add_layers" in vars(cls):
            return True
        if "forward" in vars(cls):
            return False
    return False


def applies(x: Any) -> bool:
    """Whether layers can run in one call on this map: CPU kernels are chosen for it and nobody looks between layers."""
    return (
        dispatch.is_plain_cpu_call("sequence", x, (), ())
        and not nn_module._global_forward_hooks
        and not nn_module._global_forward_pre_hooks
        and not nn_module._global_backward_hooks
        and not nn_module._global_backward_pre_hooks
    )


def run(module: Any, x: Tensor) -> Tensor | None:
    """What ``module.add_layers`` adds, on a map; None where it does not apply and the module is to run as written."""
    if not applies(x):
        return None
    layers = Layers()
    if not module.add_layers(layers):
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

    def add_layers(self, layers: Layers) -> bool:
        return all(map(layers.add, self._modules.values()))

    def forward(self, input: Tensor) -> Tensor:
        out = run(self, input)
        return super().forward(input) if out is None else out
