"""Models, and how the results of an optimised one are compared with those of its plain twin."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import ffnet
import ffnet_kernels as fk
from ffnet import layers, mixers

TOLERANCE = {
    torch.bfloat16: 0.05,
    torch.float16: 0.01,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
}
MODES = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "grad": torch.enable_grad,
}


# ---- Results ----


def outcome(call: Callable, *args, **kwargs):
    """What a call gives, or the error that it raises."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return error


def agree(fast: nn.Module, plain: nn.Module, x, mode: str = "no_grad", tolerance: float = 0.0, context=nullcontext):
    """Calls both and compares results or types of errors, the maps that were recorded in `seen`, buffers, what became
    of the input, the random numbers drawn and, with gradients, those of parameters and input.

    Args:
        x: The input, or a function that makes it.
        tolerance: Over the largest value; at least that of the data type.
        context: Entered anew around each of both calls; what the call leaves in its result is compared if it has a
            ``seen`` of its own.
    """
    found = []
    for model in (plain, fast):
        given = x() if callable(x) else copy.deepcopy(x)
        model.zero_grad()
        torch.manual_seed(5)
        with MODES[mode](), context() as entered:
            out = outcome(model, given)
        grads: dict[str, Any] = {}
        if mode == "grad" and not isinstance(out, Exception):
            grads = gradients(model, given, out)
        seen = list(vars(model).get("seen", ()))
        vars(model).get("seen", []).clear()
        found.append(
            {
                "result": out,
                "seen": seen,
                "input": given.detach() if isinstance(given, Tensor) else None,
                "gradient": grads,
                "buffers": dict(model.named_buffers()),
                "random": torch.get_rng_state(),
                "aliases": aliases(out, given),
                "context": getattr(entered, "seen", None),
            }
        )
    expected, got = found
    if isinstance(expected["result"], Exception) and isinstance(got["result"], Exception):
        expected["seen"] = got["seen"] = expected["buffers"] = got["buffers"] = None  # how far it came does not count
    for what in expected:
        compare(got[what], expected[what], what, tolerance)
    return got["result"]


def gradients(model: nn.Module, given, out) -> dict[str, Any]:
    """Of a weighted sum of all results, or the error on the way."""
    total: Any = 0
    for tensor in tensors(out):
        if tensor.requires_grad and tensor.layout is torch.strided and not tensor.is_meta:
            weights = torch.linspace(-1, 2, max(tensor.numel(), 1)).to(tensor.dtype)
            total = total + (tensor * weights[: tensor.numel()].reshape(tensor.shape)).sum().abs()
    if not isinstance(total, Tensor):
        return {}
    error = outcome(total.backward)
    if isinstance(error, Exception):
        return {"error": error}
    grads: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    if isinstance(given, Tensor) and given.is_leaf:
        grads["input"] = given.grad
    return grads


def tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    return [t for part in value for t in tensors(part)] if isinstance(value, (list, tuple, type({}.values()))) else []


def aliases(out, given) -> list[bool]:
    """Which results lie in the input's memory."""
    if not isinstance(given, Tensor):
        return []
    start = outcome(lambda: given.untyped_storage()._cdata)
    return [outcome(lambda t=t: t.untyped_storage()._cdata) == start for t in tensors(out)]


def compare(got, expected, what: str = "result", tolerance: float = 0.0) -> None:
    """Asserts that a value is another: tensors by the relative rule, and with all that code can ask of them."""
    if isinstance(expected, Exception) or isinstance(got, Exception):
        if type(got) is not type(expected):
            cause = got if isinstance(got, Exception) else expected if isinstance(expected, Exception) else None
            raise AssertionError(f"{what}: expected {short(expected)}, got {short(got)}") from cause
        return
    assert type(got) is type(expected), f"{what}: expected {short(expected)}, got {short(got)}"
    if isinstance(expected, Tensor):
        compare_tensors(got, expected, what, tolerance)
    elif isinstance(expected, Mapping):
        assert list(got) == list(expected), f"{what}: {list(got)} instead of {list(expected)}"
        floor = max([float(t.abs().max()) for t in tensors(expected) if t.numel()], default=0) if "grad" in what else 0
        for name in expected:  # a gradient that is zero but for rounding is compared with the others
            if floor and isinstance(expected[name], Tensor) and isinstance(got[name], Tensor):
                compare_tensors(got[name], expected[name], f"{what} {name}", tolerance, 0.1 * floor)
            else:
                compare(got[name], expected[name], f"{what} {name}", tolerance)
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected), f"{what}: {len(got)} values instead of {len(expected)}"
        for i, values in enumerate(zip(got, expected, strict=True)):
            compare(*values, f"{what}[{i}]", tolerance)
    else:
        assert got == expected, f"{what}: expected {expected}, got {got}"


def compare_tensors(got: Tensor, expected: Tensor, what: str, tolerance: float = 0.0, floor: float = 0.0) -> None:
    for attribute in ("shape", "dtype", "device", "layout", "requires_grad"):
        assert getattr(got, attribute) == getattr(expected, attribute), f"{what}: {attribute} of {short(got)}"
    assert got.is_inference() == expected.is_inference(), f"{what}: whether it is an inference tensor"
    got, expected = got.detach(), expected.detach()
    if expected.layout is not torch.strided:
        got, expected = got.to_dense(), expected.to_dense()
    elif expected.numel():
        strides = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (got, expected)]
        assert strides[0] == strides[1], f"{what} {list(got.shape)}: strides {got.stride()}, not {expected.stride()}"
    if not expected.numel() or expected.is_meta or hasattr(expected, "fake_mode"):
        return
    if not (expected.is_floating_point() or expected.is_complex()):
        assert torch.equal(got, expected), f"{what}: {got} instead of {expected}"
        return
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(got), finite), f"{what}: infinite or NaN elsewhere"
    size = torch.where(finite, expected, 0).abs().max().item()
    error = torch.where(finite, got.to(expected.dtype) - expected, 0).abs().max().item()
    limit = max(tolerance, TOLERANCE[expected.dtype]) * max(size, floor, 0.05)  # values are of size 1, or cancel out
    assert error <= limit, f"{what}: {error:.2g} off where the largest value is {size:.2g}"


def short(value) -> str:
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)[:300]


def twins(make: Callable[[], nn.Module], *before: Callable) -> tuple[nn.Module, nn.Module]:
    """An optimised model and its plain twin, both changed ``before`` the one was optimised."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make())
        for change in before:
            torch.manual_seed(1)
            change(models[-1])
    return fk.optimize(models[0]), models[1]


@contextmanager
def autocast(dtype: torch.dtype = torch.bfloat16):
    with torch.autocast("cpu", dtype):
        yield


# ---- Models ----


def depthwise(channels: int = 8, kernel: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, **{"padding": kernel // 2, "groups": channels, **options})


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """The model with values of size 1 everywhere, in eval mode."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor) or not tensor.is_floating_point() or tensor.is_meta:
            continue
        if "running_var" in name or (tensor.dim() == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 2)
        elif tensor.dim() > 1 and "layer_scale" not in name:
            tensor.normal_(0, tensor[0].numel() ** -0.5)
        else:
            tensor.normal_(0.1, 0.4)
    return model.eval()


class Block(nn.Module):
    """Depthwise, normalisation, activation, pointwise, as people write them."""

    def __init__(self, channels: int = 8, kernel: int = 3) -> None:
        super().__init__()
        self.conv, self.bn, self.act = depthwise(channels, kernel, bias=False), nn.BatchNorm2d(channels), nn.GELU()
        self.proj = nn.Conv2d(channels, channels, 1)
        self.factor, self.skip = 1.0, True

    def forward(self, x):
        y = self.proj(self.act(self.bn(self.conv(x)))) * self.factor
        return x + y if self.skip else y


class ConvNeXt(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.dwconv, self.norm = depthwise(channels, 7), nn.LayerNorm(channels)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(channels, 16), nn.GELU(), nn.Linear(16, channels)
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.pwconv2(self.act(self.pwconv1(y)))).permute(0, 3, 1, 2)


class Shared(nn.Module):
    """One convolution under two names, with different activations behind it."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv, self.relu, self.silu = depthwise(channels), nn.ReLU(), nn.SiLU()
        self.body = nn.Sequential(self.conv, self.silu, self.conv)

    def forward(self, x):
        return self.relu(self.conv(x)) + self.body(x) - self.silu(self.conv(x))


class Zoo(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


def _stack() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(depthwise(), nn.BatchNorm2d(8), nn.SiLU(), nn.Dropout(0.3)),
        *(nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.GELU("tanh")),
        *(depthwise(12, 5, stride=2), nn.LeakyReLU(0.2)),
    )


def _mixers() -> nn.Module:
    return nn.Sequential(
        mixers.ResidualMixer(mixers.ffnified_attention_mixer(8, 5), 8, layer_scale_init=0.5, drop_path=0.2),
        mixers.ResidualMixer(mixers.conv_ffn_mixer(8, 7, 2), 8),
        layers.BranchedDepthwise(8, 16, 7, stride=2),
        layers.SkipConv(16),
    )


def _ffnet() -> nn.Module:
    return ffnet.FFNet((1, 1), (16, 32), token_kernels=(3, 7), stem_width=8, num_classes=5, layer_scale_init=0.5)


IMAGE, MAP = (2, 3, 32, 32), (2, 8, 9, 9)
ZOO = {
    "one depthwise layer": Zoo(lambda: randomised(depthwise()), MAP),
    "depthwise layers": Zoo(lambda: randomised(nn.Sequential(depthwise(), nn.ReLU(), depthwise())), MAP),
    "normalised layers": Zoo(lambda: randomised(_stack()), MAP),
    "blocks": Zoo(lambda: randomised(nn.Sequential(Block(), nn.Sequential(Block(8, 5), nn.ReLU6()))), MAP),
    "ConvNeXt": Zoo(lambda: randomised(nn.Sequential(ConvNeXt(), ConvNeXt())), MAP),
    "shared": Zoo(lambda: randomised(nn.Sequential(Shared(), Block())), MAP),
    "mixers": Zoo(lambda: randomised(_mixers()), MAP),
    "FFNet": Zoo(lambda: randomised(_ffnet()), IMAGE),
}

#: All of them; those of the quick lane have every kind of layer.
every_model = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("normalised layers", "shared", "FFNet") else pytest.mark.long)
        for name in ZOO
    ],
)


def sample(name: str, seed: int = 0) -> Tensor:
    """An input for a model of the zoo."""
    return torch.randn(ZOO[name].shape, generator=torch.Generator().manual_seed(seed))


def used(name: str) -> tuple[nn.Module, nn.Module]:
    """A pair of the zoo whose optimised model has already run."""
    fast, plain = twins(ZOO[name].make)
    agree(fast, plain, sample(name))
    return fast, plain


@contextmanager
def quiet():
    """Deprecations of torch are not this project's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
