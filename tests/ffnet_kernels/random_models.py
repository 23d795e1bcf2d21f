"""Random trees of modules, inputs and edits for the fuzz of `optimize`, the same for the same seed."""

from __future__ import annotations

import random

import torch
from contract import Block, ConvNeXt, Shared, depthwise, randomised
from torch import Tensor, nn

import ffnet
from ffnet import layers, mixers


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x) + x


class Branches(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right, self.act = left, right, nn.SiLU()

    def forward(self, x):
        return self.act(self.left(x) - self.right(x))


class Twice(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(self.body(x))


class Keeps(nn.Module):
    """Keeps an intermediate map and hands it out with the result's help."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([first, second])

    def forward(self, x):
        self.middle = self.parts[0](x)
        out = x
        for part in self.parts:
            out = part(out)
        return out + self.middle.mean()


class Cut(nn.Module):
    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x):
        return self.body[1:](self.body[:1](x).clamp(-50, 50))


class Ends(nn.Module):
    """Hands out the strides that it sees, and several maps."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        y = self.body(x)
        return y, {"sum": y.sum((-1, -2)), "shape": list(y.shape)}


def activation(r: random.Random) -> nn.Module:
    kinds = (nn.ReLU, nn.GELU, nn.SiLU, nn.ReLU6, nn.Hardswish, nn.LeakyReLU, nn.Identity, nn.Sigmoid)
    kind = r.choice([*kinds, nn.ReLU, nn.GELU, nn.GELU, "tanh", "inplace"])
    return nn.GELU("tanh") if kind == "tanh" else nn.ReLU(inplace=True) if kind == "inplace" else kind()


def norm(r: random.Random, c: int) -> nn.Module:
    options = [{}, {}, {}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}, {"momentum": None}]
    return nn.BatchNorm2d(c, **r.choice(options))


def convolution(r: random.Random, c: int) -> nn.Module:
    kernel = r.choice([1, 3, 3, 5, 7])
    bias = r.random() < 0.6
    if r.random() < 0.6:
        odd = r.choice([{}] * 6 + [{"padding_mode": "circular"}, {"dilation": 2, "padding": kernel - 1}, {"groups": 2}])
        return depthwise(c, kernel, bias=bias, **odd)
    if r.random() < 0.2:
        return nn.Conv2d(c, c, (3, 5), padding="same", groups=r.choice([1, c]), bias=bias)
    return nn.Conv2d(c, c, r.choice([1, 1, 3]), padding="same", bias=bias)


def narrowing(r: random.Random, c: int) -> nn.Module:
    """Changes the map's size."""
    return r.choice(
        [
            lambda: depthwise(c, r.choice([3, 7]), stride=2),
            lambda: nn.Conv2d(c, c, 3, stride=r.choice([1, 2]), groups=r.choice([1, c])),
            lambda: layers.BranchedDepthwise(c, c, 7, stride=2),
            lambda: nn.MaxPool2d(2, ceil_mode=True),
        ]
    )()


def leaf(r: random.Random, c: int) -> nn.Module:
    return r.choice(
        [
            *[lambda: convolution(r, c)] * 6,
            *[lambda: norm(r, c)] * 2,
            *[lambda: activation(r)] * 3,
            lambda: nn.Dropout(0.5),
            lambda: layers.LayerNorm2d(c),
            lambda: layers.SkipConv(c),
            lambda: layers.ConvBN(c, c, r.choice([1, 3]), groups=r.choice([1, c])),
            lambda: layers.BranchedDepthwise(c, c, 7),
            lambda: (
                nn.Hardswish()
            ),  # no InstanceNorm: of one image, its gradient is wrong where one comes in channels-last
            lambda: nn.AvgPool2d(3, 1, 1),
        ]
    )()


def written(r: random.Random, c: int) -> nn.Module:
    """A block as people, or this project, write it."""
    scale = r.choice([None, 0.5])
    kernel, drop = r.choice([3, 5, 7]), r.choice([0.0, 0.0, 0.3])
    return r.choice(
        [
            lambda: Block(c, kernel),
            lambda: Shared(c),
            lambda: ConvNeXt(c),
            lambda: mixers.ResidualMixer(
                mixers.ffnified_attention_mixer(c, kernel), c, layer_scale_init=scale, drop_path=drop
            ),
            lambda: mixers.ResidualMixer(
                mixers.conv_ffn_mixer(c, kernel, 2), c, layer_scale_init=scale, drop_path=drop
            ),
        ]
    )()


def row(r: random.Random, c: int) -> list[nn.Module]:
    parts = [convolution(r, c)]
    if r.random() < 0.6:
        parts.append(norm(r, c))
    return [*parts, activation(r)]


def tree(r: random.Random, c: int, depth: int, made: list[nn.Module]) -> nn.Module:
    """A module that keeps channels and, mostly, the size of the map. ``made`` is what may be used again."""
    if made and r.random() < 0.08:
        return r.choice(made)
    if depth == 0:
        module = leaf(r, c)
    else:

        def part() -> nn.Module:
            return tree(r, c, depth - 1, made)

        module = r.choice(
            [
                *[lambda: nn.Sequential(*(m for _ in range(r.randrange(1, 3)) for m in row(r, c)))] * 4,
                *[lambda: nn.Sequential(*(part() for _ in range(r.randrange(1, 4))))] * 4,
                *[lambda: written(r, c)] * 3,
                *[lambda: Residual(part())] * 2,
                lambda: Branches(part(), part()),
                lambda: Twice(part()),
                lambda: Keeps(part(), part()),
                lambda: Cut(part(), part(), *row(r, c)),
                lambda: leaf(r, c),
            ]
        )()
    made.append(module)
    return module


def model(seed: int) -> tuple[nn.Module, int]:
    """A model in eval mode, and the channels of its inputs."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    if r.random() < 0.06:
        options = {"layer_scale_init": r.choice([None, 0.5]), "norm": r.choice(["batch", "layer"])}
        whole = ffnet.FFNet((1, 1), (8, 16), (r.choice([3, 5]), 7), r.choice([3, 7]), 2, 4, num_classes=3, **options)
        return randomised(whole), 3
    c = r.choice([4, 8, 8, 12, 16])
    made: list[nn.Module] = []
    body = tree(r, c, r.randrange(1, 4), made)
    if r.random() < 0.3:
        body = nn.Sequential(nn.Conv2d(3, c, 3, r.choice([1, 2]), 1), *row(r, c), body)
    if r.random() < 0.3:
        body = nn.Sequential(body, narrowing(r, c), tree(r, c, 1, made))
    if r.random() < 0.15:
        body = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 3))
    elif r.random() < 0.1:
        body = Ends(body)
    first = next((m for m in body.modules() if isinstance(m, nn.Conv2d)), None)
    stem = isinstance(first, nn.Conv2d) and first.in_channels == 3
    return randomised(body), 3 if stem else c


def given(r: random.Random, channels: int, dtype: torch.dtype) -> Tensor:
    """A random input: any layout, mostly of the right shape."""
    size = (r.choice([1, 1, 2, 2, 3, 0]), channels, r.randrange(5, 13), r.randrange(5, 13))
    if r.random() < 0.03:
        size = (size[0], r.choice([1, channels // 2, 2 * channels]), *size[2:])
    if r.random() < 0.05:
        size = (*size[:2], r.randrange(1, 4), r.randrange(1, 4))
    x = torch.randn(size, generator=torch.Generator().manual_seed(r.randrange(1 << 30))).to(dtype)
    match r.randrange(9):
        case 0 | 1:
            x = x.contiguous(memory_format=torch.channels_last)
        case 2:
            x = x.mT.contiguous().mT
        case 3:
            x = x.repeat_interleave(2, 3)[..., ::2]
        case 4:
            x = torch.cat([x, x], 1)[:, : x.shape[1]]
        case 5 if len(x):
            x = x[0]
    return x.requires_grad_() if r.random() < 0.2 else x
