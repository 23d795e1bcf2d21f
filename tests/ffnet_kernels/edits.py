"""What users do to a model: each edit takes the model and a source of choices, and says what it did, or None."""

from __future__ import annotations

import random
import types
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize, prune

import ffnet
from ffnet import layers, mixers

Edit = Callable[[nn.Module, random.Random], "str | None"]
EDITS: dict[str, Edit] = {}
FORGOTTEN: dict[str, Edit] = {}  # what PyTorch cannot see: `refresh` is to follow where something is folded

ACTIVATIONS = (nn.GELU, nn.ReLU, nn.SiLU, nn.LeakyReLU, nn.ReLU6, nn.Hardswish)
NORMS = nn.modules.batchnorm._BatchNorm


def edit(function: Edit) -> Edit:
    EDITS[function.__name__] = function
    return function


def forgotten(function: Edit) -> Edit:
    FORGOTTEN[function.__name__] = function
    return function


def some(model: nn.Module, r: random.Random, kind=nn.Module, where=lambda module: True) -> tuple[str, nn.Module | None]:
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, kind) and where(m)]
    return r.choice(found) if found else ("", None)


def on(kind, where: Callable = lambda module: True):
    """Makes an edit of one module into one that chooses a module of the kind."""

    def decorate(change: Callable):
        def choose(model: nn.Module, r: random.Random) -> str | None:
            name, module = some(model, r, kind, where)
            if module is None:
                return None
            did = change(module, r)
            return f"{change.__name__} of {name or 'the model'}" + (f": {did}" if did is not None else "")

        choose.__name__ = change.__name__
        return edit(choose)

    return decorate


def setter(name: str, kind, attribute: str, values: Callable[[nn.Module], list]):
    def change(module, r):
        value = r.choice(values(module))
        setattr(module, attribute, value)
        return repr(value)

    change.__name__ = name
    on(kind)(change)


def some_parameter(model: nn.Module, r: random.Random, where=lambda p: True) -> tuple[str, nn.Parameter | None]:
    found = [(n, p) for n, p in model.named_parameters() if not is_lazy(p) and where(p)]
    return r.choice(found) if found else ("", None)


def owns_weight(module: nn.Module) -> bool:
    """Whether the weight is an ordinary parameter of the module."""
    return isinstance(module._parameters.get("weight"), nn.Parameter)


# ---- Values ----


@edit
@torch.no_grad()
def value_changed(model, r):
    name, parameter = some_parameter(model, r)
    if parameter is None:
        return None
    parameter.mul_(1.4).add_(0.05)
    return f"{name} changed in place"


@edit
@torch.no_grad()
def one_value_changed(model, r):
    name, parameter = some_parameter(model, r, lambda p: p.dim() == 4)
    if parameter is None:
        return None
    parameter.view(-1)[r.randrange(parameter.numel())] += 3  # through a view, which shares its counter
    return f"one value of {name} changed through a view"


@forgotten
def data_changed(model, r):
    name, parameter = some_parameter(model, r)
    if parameter is None:
        return None
    parameter.data.mul_(1.5)
    return f"{name}.data changed"


@forgotten
def data_replaced(model, r):
    name, parameter = some_parameter(model, r)
    if parameter is None:
        return None
    parameter.data = parameter.data * 0.5
    return f"{name}.data replaced"


@forgotten
def numpy_changed(model, r):
    name, parameter = some_parameter(model, r, lambda p: p.dtype in (torch.float32, torch.float64))
    if parameter is None:
        return None
    parameter.detach().numpy()[...] *= 0.7
    return f"{name} changed through numpy"


@forgotten
def vector_to_parameters(model, r):
    parameters = [p for p in model.parameters() if not is_lazy(p)]
    if len({p.dtype for p in parameters}) != 1:
        return None
    vector = nn.utils.parameters_to_vector(parameters).detach() * 0.9
    nn.utils.vector_to_parameters(vector, parameters)
    return "vector_to_parameters"


@on(nn.Module, owns_weight)
def weight_replaced(module, r):
    module.weight = nn.Parameter(module.weight.detach() * 0.6)


@on(nn.Conv2d, owns_weight)
def weight_laid_out(module, r):
    module.weight = nn.Parameter(module.weight.detach().to(memory_format=torch.channels_last))


@on(nn.Conv2d, owns_weight)
def weight_of_another_kernel(module, r):
    module.weight = nn.Parameter(module.weight.detach()[..., :1, :1].clone())


@on(nn.Conv2d, owns_weight)
def bias_toggled(module, r):
    bias = (
        None if module.bias is not None else nn.Parameter(torch.linspace(-1, 1, len(module.weight)).to(module.weight))
    )
    module.bias = bias
    return "none" if bias is None else "new"


@edit
def weights_tied(model, r):
    convs = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and owns_weight(m)]
    r.shuffle(convs)
    for name, conv in convs[1:]:
        if conv.weight.shape == convs[0][1].weight.shape:
            conv.weight = convs[0][1].weight
            return f"weight of {name} tied to that of {convs[0][0]}"
    return None


@on(nn.Module)
def frozen(module, r):
    module.requires_grad_(r.random() < 0.3)


@edit
def loaded(model, r):
    assign = r.random() < 0.5
    values = {k: v * 0.8 if v.is_floating_point() else v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(values, assign=assign)
    return f"load_state_dict(assign={assign})"


@edit
def stepped(model, r):
    parameters = [p for p in model.parameters() if p.requires_grad and not is_lazy(p)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.5)
    if parameters:
        r.choice([torch.optim.SGD, torch.optim.Adam])(parameters, lr=0.1).step()
    model.zero_grad()
    return "a step of an optimiser"


# ---- Normalisation and modes ----


@on(NORMS, lambda m: m.running_mean is not None)
@torch.no_grad()
def statistics_changed(module, r):
    module.running_mean.add_(0.5)
    module.running_var.mul_(1.8)


@on(NORMS, lambda m: m.running_mean is not None)
def statistics_replaced(module, r):
    module.running_mean = torch.full_like(module.running_mean, 0.3)
    module.running_var = torch.full_like(module.running_var, 0.4)


@on(NORMS, lambda m: m.running_mean is not None)
def statistics_dropped(module, r):
    module.running_mean = module.running_var = None
    module.track_running_stats = r.random() < 0.5


setter("eps_changed", NORMS, "eps", lambda m: [0.1, 1.0, np.float64(0.5)])
setter("training_of_one", nn.Module, "training", lambda m: [True, False])
setter("dropout_changed", nn.Dropout, "p", lambda m: [0.0, 0.7])
setter("drop_path_changed", layers.DropPath, "rate", lambda m: [0.0, 0.6])


@on(NORMS)
def norm_trained(module, r):
    module.train()


@on(nn.Module)
def part_trained(module, r):
    module.train()


@edit
def trained(model, r):
    model.train()
    return "model.train()"


@edit
def evaluated(model, r):
    model.eval()
    return "model.eval()"


@on(NORMS, lambda m: m.affine)
def norm_parameter_dropped(module, r):
    name = r.choice(["weight", "bias"])
    setattr(module, name, None)
    return name


# ---- Geometry ----

setter("stride_changed", nn.Conv2d, "stride", lambda m: [(2, 2), 2, (3, 3), (1, 2), (np.int64(2), np.int64(2))])
setter("padding_changed", nn.Conv2d, "padding", lambda m: [0, (0, 0), (2, 0), (2, 2), "valid", "same", np.int64(1)])
setter("dilation_changed", nn.Conv2d, "dilation", lambda m: [(2, 2), 2, 1, (1, 2), [1, 1]])
setter("groups_changed", nn.Conv2d, "groups", lambda m: [1, 2, m.groups, np.int64(m.groups), max(m.groups // 2, 1)])
setter("channels_changed", nn.Conv2d, "in_channels", lambda m: [1, 3])  # which nobody reads


@on(nn.Conv2d)
def padding_mode_changed(module, r):
    module.padding_mode = r.choice(["circular", "reflect", "replicate"])
    module._reversed_padding_repeated_twice = [1, 1, 1, 1]
    return module.padding_mode


# ---- Modules ----


@on(nn.Module, lambda m: any(isinstance(c, ACTIVATIONS) for c in m.children()))
def activation_swapped(module, r):
    name = r.choice([n for n, c in module.named_children() if isinstance(c, ACTIVATIONS)])
    new = r.choice([nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Identity, nn.Softplus])()
    setattr(module, name, new)
    return f"{name} becomes {new}"


@on(nn.Module, lambda m: any(isinstance(c, NORMS) for c in m.children()))
def norm_swapped(module, r):
    name = r.choice([n for n, c in module.named_children() if isinstance(c, NORMS)])
    # No InstanceNorm, see random_models.py, and no GroupNorm: of channels-last maps that need no gradient, its backward
    # crashes in torch 2.13.
    setattr(module, name, nn.Identity() if r.random() < 0.5 else nn.Hardswish())
    return name


setter("approximation_changed", nn.GELU, "approximate", lambda m: ["tanh", "none"])
setter("inplace_changed", (nn.ReLU, nn.SiLU), "inplace", lambda m: [True, False])
setter("slope_changed", nn.LeakyReLU, "negative_slope", lambda m: [0.5])
setter("roles_changed", mixers.MetaMixer, "roles", lambda m: [dict(list(m.roles.items())[:-1])])
setter("layer_scale_changed", mixers.ResidualMixer, "layer_scale", lambda m: [None])


def plain_sequential(module: nn.Module) -> bool:
    return len(module) > 0  # type: ignore[arg-type]


@on(nn.Sequential)
def appended(module, r):
    module.append(r.choice([nn.ReLU, nn.Sigmoid])())


@on(nn.Sequential, plain_sequential)
def inserted(module, r):
    module.insert(r.randrange(len(module)), nn.Tanh())


@on(nn.Sequential, plain_sequential)
def deleted(module, r):
    del module[r.randrange(len(module))]


@on(nn.Sequential, plain_sequential)
def assigned(module, r):
    module[r.randrange(len(module))] = nn.Hardtanh()


class TwiceGELU(nn.GELU):
    def forward(self, input):
        return 2 * super().forward(input)


class TwiceConv(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return 2 * super()._conv_forward(input, weight, bias)


class TwiceSequential(nn.Sequential):
    def forward(self, input):
        return 2 * super().forward(input)


class TwiceNorm(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


CLASSES = {
    nn.GELU: TwiceGELU,
    nn.Conv2d: TwiceConv,
    nn.Sequential: TwiceSequential,
    nn.BatchNorm2d: TwiceNorm,
    nn.SiLU: nn.Tanh,
    nn.ReLU: nn.Sigmoid,
}


@on(nn.Module, lambda m: type(m) in CLASSES)
def class_changed(module, r):
    module.__class__ = CLASSES[type(module)]


@on(nn.Module, lambda m: hasattr(m, "factor"))
def attribute_changed(module, r):
    module.factor, module.skip = r.choice([(2.0, True), (1.0, False), (np.float32(0.5), True)])


class LoRA(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.base = conv
        self.down = nn.Conv2d(conv.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@on(nn.Module, lambda m: any(type(c) is nn.Conv2d and owns_weight(c) for c in m.children()))
def adapted(module, r):
    name = r.choice([n for n, c in module.named_children() if type(c) is nn.Conv2d and owns_weight(c)])
    conv = module.get_submodule(name)
    setattr(module, name, LoRA(conv).to(conv.weight.dtype).train(conv.training))
    return name


@on(ffnet.FFNet)
def head_replaced(module, r):
    module.reset_classifier(r.choice([0, 3]))


# ---- Methods and hooks ----


@on(nn.Module)
def method_patched(module, r):
    forward = module.forward

    def patched(self, *args, **kwargs):
        return forward(*args, **kwargs) * 1.5

    module.forward = types.MethodType(patched, module)


@on(nn.Conv2d)
def convolution_patched(module, r):
    module._conv_forward = lambda x, weight, bias: nn.Conv2d._conv_forward(module, x, weight, bias) + 1


def hooked(name: str, register: Callable, kind=nn.Module):
    def change(module, r):
        register(module, r)

    change.__name__ = name
    on(kind)(change)


def plus_half(module, inputs, out):
    return out + 0.5 if isinstance(out, Tensor) else None


def halved_input(module, inputs):
    return (inputs[0] * 0.5, *inputs[1:])


def doubled_in_place(module, inputs, out):
    out.mul_(2)


def kwargs_hook(module, args, kwargs, out):
    return out - 0.25


def doubled_gradient(module, grads_in, grads_out):
    return tuple(None if g is None else 2 * g for g in grads_in)


def raising(module, inputs, out):
    if out.shape[0] == 2:
        raise LookupError("two maps")


hooked("forward_hook", lambda m, r: m.register_forward_hook(plus_half, prepend=r.random() < 0.5))
hooked("forward_pre_hook", lambda m, r: m.register_forward_pre_hook(halved_input))
hooked("in_place_hook", lambda m, r: m.register_forward_hook(doubled_in_place))
hooked("kwargs_hook", lambda m, r: m.register_forward_hook(kwargs_hook, with_kwargs=True))
hooked("always_hook", lambda m, r: m.register_forward_hook(plus_half, always_call=True))
hooked("backward_hook", lambda m, r: m.register_full_backward_hook(doubled_gradient))
hooked("raising_hook", lambda m, r: m.register_forward_hook(raising))


@edit
def recorded(model, r):
    name, module = some(model, r)
    seen = vars(model).setdefault("seen", [])
    module.register_forward_hook(lambda module, inputs, out: seen.append(out))
    return f"results of {name or 'the model'} recorded"


@on(nn.Module, lambda m: m._forward_hooks or m._forward_pre_hooks)
def unhooked(module, r):
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()


@on(nn.Module, lambda m: "forward" in vars(m) or "_conv_forward" in vars(m))
def unpatched(module, r):
    for name in ("forward", "_conv_forward"):
        vars(module).pop(name, None)


@edit
def gradient_hooked(model, r):
    name, parameter = some_parameter(model, r, lambda p: p.requires_grad)
    if parameter is None:
        return None
    parameter.register_hook(lambda grad: grad * 3)
    return f"hook on the gradient of {name}"


# ---- torch.nn.utils ----


@on(nn.Conv2d, owns_weight)
def pruned(module, r):
    prune.l1_unstructured(module, "weight", amount=0.4)
    if r.random() < 0.4:
        prune.remove(module, "weight")


class Flipped(nn.Module):
    def forward(self, weight):
        return -weight


@on(nn.Module, owns_weight)
def parametrised(module, r):
    parametrize.register_parametrization(module, "weight", Flipped())


@on(nn.Conv2d, owns_weight)
def weight_normalised(module, r):
    if r.random() < 0.5:
        parametrizations.weight_norm(module)
        return "new"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(module)
    return "old"


@on(nn.Conv2d, owns_weight)
def spectrally_normalised(module, r):
    parametrizations.spectral_norm(module)


@on(nn.Module, parametrize.is_parametrized)
def unparametrised(module, r):
    for name in list(module.parametrizations):
        parametrize.remove_parametrizations(module, name, leave_parametrized=r.random() < 0.5)


# ---- Conversions ----


def converted(name: str, change: Callable):
    def convert(model, r):
        change(model)
        return name

    EDITS[name] = convert


converted("double", lambda m: m.double())
converted("float", lambda m: m.float())
converted("half_and_back", lambda m: m.half().float())
converted("bfloat16", lambda m: m.bfloat16())
converted("channels_last", lambda m: m.to(memory_format=torch.channels_last))
converted("contiguous", lambda m: m.to(memory_format=torch.contiguous_format))


def apply(change: Edit, model: nn.Module, seed: int) -> str | None:
    """The edit with its own random numbers, so that two models get the same one. What it raises is what it did."""
    torch.manual_seed(seed)
    try:
        return change(model, random.Random(seed))
    except Exception as error:
        return f"{change.__name__} raised {type(error).__name__}"
