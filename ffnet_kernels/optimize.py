"""Puts an existing model on the operators."""

from __future__ import annotations

import copy
import inspect
import logging
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from .dispatch import available_backends
from .modules import ChannelMixer, Conv2d, DepthwiseConv2d, FFNifiedAttention
from .sequence import Layers, Sequence

logger = logging.getLogger("ffnet_kernels")

_ACTIVATION_NAMES = {nn.ReLU: "relu", nn.SiLU: "silu"}


class Replacement(NamedTuple):
    """One layer that now runs on an operator."""

    path: str
    operator: str


def optimize(model: nn.Module) -> nn.Module:
    """Returns a copy of ``model`` whose matching layers run on the operators; the model itself is untouched.

    - Depthwise ``nn.Conv2d`` layers become :class:`DepthwiseConv2d`; where an activation module provably follows (the
      modules around it can be traced, in both modes, and nothing in the model reads the convolution by itself), it is
      fused: a hook that is put on the convolution later sees the activated map. In eval mode the same holds for 1×1
      convolutions and those of images, which become :class:`Conv2d`.
    - A module that defines ``kernel_ready()`` supplies its copy itself (an FFNet in eval mode: reparameterised), and
      one that defines ``enable_kernels()`` puts itself on an operator and answers its name, or None. Of a model in
      training mode, one that defines ``enable_training_kernels()`` does the same for its training steps.

    In eval mode the weights of 2-D convolutions become channels-last, and with them the maps; depthwise filters are
    stored channels innermost where kernels read them. Strides change; values, shapes and the state dict do not.
    The result trains, saves and loads as the original does. What was replaced is logged at INFO and kept in
    ``result.kernel_replacements``.

    Raises:
        TypeError: if ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: expected an nn.Module, got {type(model).__name__}")
    model = _ready(copy.deepcopy(model))
    alone = _class_for(model, model.training)
    if alone is not None:
        model = alone.from_conv(model)  # type: ignore[arg-type]
        replacements = [Replacement("", alone.operator)]
    else:
        replacements = _replace(model)
    if not model.training:
        _lay_out(model)
        model = _join(model, {})
    for replacement in replacements:
        logger.info("optimize: %s -> %s", replacement.path or "(model)", replacement.operator)
    model.kernel_replacements = tuple(replacements)  # type: ignore[assignment]
    return model


def _ready(module: nn.Module) -> nn.Module:
    """The module with every part that can prepare itself replaced by what it prepares."""
    if hasattr(type(module), "kernel_ready"):  # of its class: a wrapper may hand on what it is asked for
        return module.kernel_ready()  # type: ignore[operator]
    for name, child in module.named_children():
        if (ready := _ready(child)) is not child:
            module.register_module(name, ready)
    return module


def _replace(model: nn.Module) -> list[Replacement]:
    replacements = []
    on_operators: set[nn.Module] = set()  # their children are parameters' homes, never called
    for path, module in model.named_modules():
        if module in on_operators:
            continue
        operator = module.enable_kernels() if hasattr(type(module), "enable_kernels") else None
        if operator is not None:
            replacements.append(Replacement(path, operator))
            on_operators.update(module.modules())
    for path, module in model.named_modules():
        enabled = model.training and hasattr(type(module), "enable_training_kernels")
        operator = module.enable_training_kernels() if enabled else None
        if operator is not None:
            replacements.append(Replacement(path, operator))
    homes = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    replaced: dict[nn.Module, nn.Conv2d] = {}  # a layer with several homes stays one layer
    for path, module in list(model.named_modules()):
        if module in on_operators:
            continue
        classes = {name: _class_for(child, model.training) for name, child in module._modules.items()}
        convolutions: dict[str, nn.Conv2d] = {
            name: child for name, child in module._modules.items() if child is not None and classes[name] is not None
        }
        alone = {name: conv for name, conv in convolutions.items() if homes[id(conv)] == 1}
        fused = _following_activations(model, path, alone) if alone else {}
        for name, conv in convolutions.items():
            activation, follower = fused.get(name, ("none", None))
            if follower is not None and homes[id(module._modules[follower])] > 1:
                activation, follower = "none", None
            operated = classes[name]
            assert operated is not None
            if conv not in replaced:
                replaced[conv] = operated.from_conv(conv, activation)
            module.register_module(name, replaced[conv])
            if follower is not None:
                module.register_module(follower, nn.Identity())
            suffix = "" if follower is None else f" + {activation}"
            replacements.append(Replacement(f"{path}.{name}".lstrip("."), f"{operated.operator}{suffix}"))
    return replacements


def _join(module: nn.Module, joined: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module with every outermost ``nn.Sequential`` whose layers can run in one call as a `Sequence`."""
    if type(module) is nn.Sequential:
        layers = Layers()
        if layers.add(module) and len(layers) > 1:
            return joined.setdefault(module, Sequence.from_sequential(module))
    for name, child in list(module._modules.items()):
        if child is not None and (other := _join(child, joined)) is not child:
            module.register_module(name, other)
    return module


def _class_for(module: nn.Module | None, training: bool) -> type[DepthwiseConv2d] | type[Conv2d] | None:
    """The class on an operator that takes the place of a layer, if there is one."""
    if module is None:
        return None
    if DepthwiseConv2d.takes(module):
        return DepthwiseConv2d
    return Conv2d if not training and Conv2d.takes(module) else None


def _activation_name(module: nn.Module | None) -> str | None:
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _ACTIVATION_NAMES.get(type(module))  # type: ignore[arg-type]


class _Shallow(fx.Tracer):
    """Traces one module and takes all modules it calls as they are."""

    proxy_buffer_attributes = True  # forward must not count on real ones

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _calls(module: nn.Module) -> dict[str, list[fx.Node]] | None:
    """The modules that ``module.forward`` calls, by path below it; None where tracing cannot tell."""
    shadow = copy.copy(module)  # tracing runs the user's forward, which may assign attributes
    for registry in ("_modules", "_parameters", "_buffers"):
        shadow.__dict__[registry] = dict(module.__dict__[registry])
    traces = []
    for training in (False, True):
        shadow.training = training
        try:
            graph = _Shallow().trace(shadow)
        except Exception as error:  # whatever user code raises on proxies means "cannot tell"
            logger.debug("optimize: %s cannot be traced, activations in it stay: %s", type(module).__name__, error)
            return None
        traces.append(graph)
    if str(traces[0]) != str(traces[1]):
        return None
    calls: dict[str, list[fx.Node]] = {}
    for node in traces[0].nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    return calls


def _named_elsewhere(module: nn.Module, name: str) -> bool:
    """Whether a method of the module's class other than its constructor and ``forward`` mentions the attribute."""
    functions = (f for cls in type(module).__mro__ if issubclass(cls, nn.Module) for f in vars(cls).items())
    return any(
        name in function.__code__.co_names
        for method, function in functions
        if method not in ("__init__", "forward") and inspect.isfunction(function)
    )


def _called_whole(model: nn.Module, path: str) -> bool:
    """Whether every module around ``path`` calls it, if at all, as a whole and none reaches for its children."""
    names = path.split(".") if path else []
    for depth in range(len(names)):
        calls = _calls(model.get_submodule(".".join(names[:depth])))
        inside = ".".join(names[depth:]) + "."
        if calls is None or any(target.startswith(inside) for target in calls):
            return False
    return True


def _following_activations(
    model: nn.Module, path: str, convolutions: dict[str, nn.Conv2d]
) -> dict[str, tuple[str, str]]:
    """Convolution child of the module at ``path`` -> (activation, its child), where tracing shows that in the whole
    model the one feeds only the other."""
    module = model.get_submodule(path)
    children = dict(module.named_children())
    if not any(_activation_name(child) for child in children.values()):
        return {}
    calls = _calls(module)
    if calls is None or not _called_whole(model, path):
        return {}
    found = {}
    for name, conv in convolutions.items():
        if len(calls.get(name, ())) != 1 or _observes_output(conv):
            continue
        (call,) = calls[name]
        users = list(call.users)
        if len(users) != 1 or users[0].op != "call_module" or users[0].args != (call,):
            continue
        follower = str(users[0].target)
        activation = _activation_name(children.get(follower))
        if activation is None or len(calls[follower]) != 1:
            continue
        if _named_elsewhere(module, name) or _named_elsewhere(module, follower):
            continue
        if not _observes_output(children[follower]) and not children[follower]._forward_pre_hooks:
            found[name] = (activation, follower)
    return found


def _observes_output(module: nn.Module) -> bool:
    """Whether a hook sees the module's result or its gradient, which fusing would change or never make."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def _lay_out(model: nn.Module) -> None:
    """Channels-last weights of convolutions and, for kernels, depthwise filters with their channels innermost.

    Other parameters are left alone: users may view them.
    """
    innermost = available_backends() != ("reference",)
    for module in model.modules():
        filters: list[Tensor] = []
        if isinstance(module, nn.Conv2d) and is_lazy(module.weight):
            continue
        if isinstance(module, nn.Conv2d) and innermost and module.weight.shape[1] == 1:
            filters = [module.weight]
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
        elif isinstance(module, FFNifiedAttention) and innermost:
            filters = [module.key, module.value]
        elif isinstance(module, ChannelMixer) and innermost:
            filters = [module.weight]
        for weight in filters:
            weight.data = weight.data.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
