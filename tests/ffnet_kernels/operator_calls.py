"""One tiny call of every operator, those of training steps included, beside the same in plain PyTorch's layers."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from examples import example
from torch import Tensor, nn

import ffnet_kernels as fk
from ffnet_kernels.backends import choice


class Call(NamedTuple):
    """``ours`` and ``plain`` take the same tensors; the map is the first. ``training`` marks operators of training."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    tensors: list[Tensor]
    training: bool = False


def random(*size: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def calls() -> dict[str, Call]:
    """By name; maps are dense channels-last, as the kernels for gradients take them."""
    found = {}
    for name in ("depthwise_conv2d", "ffnified_attention", "channel_mixer"):
        case = example(name, shape=(2, 4, 3, 3), kernel=(3, 3), layout="channels_last")
        found[name] = _operator(name, case.checked())
    x, weight, bias = channels_last(random(2, 4, 3, 3)), random(7, 4, 3, 3, seed=1), random(7, seed=2)
    found["conv2d"] = _operator("conv2d", fk.ops.conv2d.checked(x, weight, bias, 2, "same", "silu", None, None))
    pointwise = (x, random(7, 4, 1, 1, seed=1), bias, 1, "same", "none", bias, random(2, 7, 3, 3, seed=3))
    found["conv2d of pixels"] = _operator("conv2d", fk.ops.conv2d.checked(*pointwise))
    strided = example("depthwise_conv2d", shape=(2, 4, 3, 3), kernel=(4, 3), stride=2, multiplier=2)
    found["depthwise_conv2d, stride 2"] = _operator("depthwise_conv2d", strided.checked())
    mixer = example("channel_mixer", shape=(2, 4, 3, 3), kernel=(3, 3)).checked()
    found["feed_forward"] = Call(
        lambda *t: fk.training.feed_forward(*t[:5], scale=t[5], residual=t[6]),
        lambda *t: fk.ops.OPERATORS["feed_forward"].reference(*t[:5], "gelu", *t[5:]),
        [mixer[0], *mixer[3:7], *mixer[8:]],
        training=True,
    )
    norms = [nn.BatchNorm2d(4, track_running_stats=False) for _ in range(2)]  # which transforms could not change
    convs = [nn.Conv2d(4, 4, k, padding=k // 2, groups=4, bias=False) for k in (5, 3)]

    def plain_branches(t: Tensor) -> Tensor:
        return nn.functional.gelu(norms[0](convs[0](t)) + norms[1](convs[1](t)))

    weights, own = [conv.weight for conv in convs], [fk.training.Norm.of(norm) for norm in norms]
    found["branched_depthwise"] = Call(
        lambda t: fk.training.branched_depthwise(t, weights, own, activation="gelu"), plain_branches, [x], True
    )
    found["batch_norm"] = Call(
        lambda t: fk.training.batch_norm(t, own[0], "gelu"), lambda t: nn.functional.gelu(norms[0](t)), [x], True
    )
    return found


def _operator(name: str, args: tuple) -> Call:
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]

    def with_tensors(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*tensors: Tensor) -> Tensor:
            call = list(args)
            for i, tensor in zip(places, tensors, strict=True):
                call[i] = tensor
            return function(*call)

        return run

    operator = fk.ops.OPERATORS[name]

    def ours(*call):
        return operator.on(choice.select(name, call).NAME, *call)

    return Call(with_tensors(ours), with_tensors(operator.reference), [args[i] for i in places])


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
