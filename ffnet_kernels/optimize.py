"""Puts an existing model on the operators."""

from __future__ import annotations

import copy
import logging
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from .modules import ChannelMixer, DepthwiseConv2d, FFNifiedAttention

logger = logging.getLogger("ffnet_kernels")

_ACTIVATION_NAMES = {nn.ReLU: "relu", nn.SiLU: "silu"}


class Replacement(NamedTuple):
    """One layer that now runs on an operator."""

    path: str
    operator: str


def optimize(model: nn.Module) -> nn.Module:
    """Returns a copy of ``model`` whose matching layers run on the operators; the model itself is untouched.

    - Depthwise ``nn.Conv2d`` layers become :class:`DepthwiseConv2d`; where an activation module provably follows (the
      enclosing module can be traced and nothing else reads the convolution), it is fused.
    - A module that defines ``kernel_ready()`` supplies the copy itself (an FFNet in eval mode: reparameterised), and
      one that defines ``enable_kernels()`` puts itself on an operator and answers its name, or None.

    In eval mode maps and weights become channels-last and depthwise filters are stored channels innermost, as the CPU
    kernels read them: strides change, values, shapes and the state dict do not. The result trains, saves and loads as
    the original does. What was replaced is logged at INFO and kept in ``result.kernel_replacements``.

    Raises:
        TypeError: if ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: expected an nn.Module, got {type(model).__name__}")
    kernel_ready = getattr(model, "kernel_ready", None)
    model = kernel_ready() if callable(kernel_ready) else copy.deepcopy(model)
    if DepthwiseConv2d.takes(model):
        model = DepthwiseConv2d.from_conv(model)  # type: ignore[arg-type]
        replacements = [Replacement("", "depthwise_conv2d")]
    else:
        replacements = _replace(model)
    if not model.training:
        _lay_out(model)
    for replacement in replacements:
        logger.info("optimize: %s -> %s", replacement.path or "(model)", replacement.operator)
    model.kernel_replacements = tuple(replacements)  # type: ignore[assignment]
    return model


def _replace(model: nn.Module) -> list[Replacement]:
    replacements = []
    on_operators: set[nn.Module] = set()  # their children are parameters' homes, never called
    for path, module in model.named_modules():
        if module in on_operators:
            continue
        enable = getattr(module, "enable_kernels", None)
        operator = enable() if callable(enable) else None
        if operator is not None:
            replacements.append(Replacement(path, operator))
            on_operators.update(module.modules())
    for path, module in list(model.named_modules()):
        if module in on_operators:
            continue
        convolutions = {name: m for name, m in module.named_children() if DepthwiseConv2d.takes(m)}
        if not convolutions:
            continue
        fused = _following_activations(module, convolutions)
        for name, conv in convolutions.items():
            activation, follower = fused.get(name, ("none", None))
            module.register_module(name, DepthwiseConv2d.from_conv(conv, activation))
            if follower is not None:
                module.register_module(follower, nn.Identity())
            suffix = "" if follower is None else f" + {activation}"
            replacements.append(Replacement(f"{path}.{name}".lstrip("."), f"depthwise_conv2d{suffix}"))
    return replacements


def _activation_name(module: nn.Module | None) -> str | None:
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _ACTIVATION_NAMES.get(type(module))  # type: ignore[arg-type]


class _Shallow(fx.Tracer):
    """Traces one module and takes its children as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _following_activations(module: nn.Module, convolutions: dict[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Convolution child -> (activation, its child), where tracing shows that the one feeds only the other."""
    children = dict(module.named_children())
    if not any(_activation_name(child) for child in children.values()):
        return {}
    try:
        graph = _Shallow().trace(module)
    except Exception as error:  # tracing runs user code on proxies: whatever it raises means "cannot tell"
        logger.debug("optimize: %s cannot be traced, its activations stay: %s", type(module).__name__, error)
        return {}
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    shared = {id(child) for child in children.values() if sum(child is other for other in children.values()) > 1}
    found = {}
    for name, conv in convolutions.items():
        if len(calls.get(name, ())) != 1 or id(conv) in shared or _observes_output(conv):
            continue
        (call,) = calls[name]
        users = list(call.users)
        if len(users) != 1 or users[0].op != "call_module" or users[0].args != (call,):
            continue
        follower = str(users[0].target)
        activation = _activation_name(children.get(follower))
        if activation is None or len(calls[follower]) != 1 or id(children[follower]) in shared:
            continue
        if not _observes_output(children[follower]) and not children[follower]._forward_pre_hooks:
            found[name] = (activation, follower)
    return found


def _observes_output(module: nn.Module) -> bool:
    """Whether a hook sees the module's result or its gradient, which fusing would change or never make."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def _lay_out(model: nn.Module) -> None:
    """Channels-last weights, and depthwise filters with their channels next to each other."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in model.modules():
        filters: list[Tensor] = []
        if isinstance(module, DepthwiseConv2d) or (isinstance(module, nn.Conv2d) and module.weight.shape[1] == 1):
            filters = [module.weight]
        elif isinstance(module, FFNifiedAttention):
            filters = [module.key, module.value]
        elif isinstance(module, ChannelMixer):
            filters = [module.weight]
        for weight in filters:
            weight.data = weight.data.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
