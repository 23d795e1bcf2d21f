"""Small models, each of a pattern that programs have operators for, or that looks like one; and what they become."""

from collections.abc import Callable
from types import FunctionType
from typing import NamedTuple

import torch
from contract import depthwise
from torch import nn

from ffnet import layers, mixers


def of_a_library(kind):
    """The class as if timm had it, its code included: programs take those for what they are."""
    for name, value in list(vars(kind).items()):
        if isinstance(value, FunctionType):
            moved = {**value.__globals__, "__name__": "timm.layers"}
            function = FunctionType(value.__code__, moved, name, value.__defaults__, value.__closure__)
            function.__module__ = "timm.layers"
            setattr(kind, name, function)
    kind.__module__ = "timm.layers"
    return kind


@of_a_library
class Residual(nn.Module):
    def __init__(self, *branch):
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x):
        return x + self.branch(x)


@of_a_library
class Branches(nn.Module):
    """Parallel branches on one map, as in RepVGG and MobileOne."""

    def __init__(self, *branches, act=None):
        super().__init__()
        self.branches, self.act = nn.ModuleList(branches), act or nn.Identity()

    def forward(self, x):
        out = 0
        for branch in self.branches:
            out = out + branch(x)
        return self.act(out)


@of_a_library
class UsedTwice(nn.Module):
    """An activation that is not alone in reading its convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = depthwise(), nn.GELU()

    def forward(self, x):
        y = self.conv(x)
        return self.act(y) + y


@of_a_library
class Unsquare(nn.Module):
    """Decides by the size of the map."""

    def __init__(self):
        super().__init__()
        self.conv = depthwise()

    def forward(self, x):
        return self.conv(x) if x.shape[2] > x.shape[3] else -self.conv(x)


@of_a_library
class ConvNeXt(nn.Module):
    """With its layer scale before the map is channels first again, as in the original, or after, as in timm."""

    def __init__(self, scales_map=False):
        super().__init__()
        self.conv, self.norm = depthwise(8, 7), nn.LayerNorm(8)
        self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)
        self.gamma, self.scales_map = nn.Parameter(torch.rand(8)), scales_map

    def forward(self, x):
        y = self.fc2(self.act(self.fc1(self.norm(self.conv(x).permute(0, 2, 3, 1)))))
        if self.scales_map:
            return x + y.permute(0, 3, 1, 2).mul(self.gamma.reshape(1, -1, 1, 1))
        return x + (self.gamma * y).permute(0, 3, 1, 2)


@of_a_library
class ConvNeXtOfMaps(nn.Module):
    """Of 1×1 convolutions, as timm has it where maps stay channels first."""

    def __init__(self, reads_norm=False):
        super().__init__()
        self.conv, self.norm = depthwise(8, 7), nn.LayerNorm(8, eps=1e-6)
        self.fc1, self.act, self.fc2 = nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1)
        self.gamma, self.reads_norm = nn.Parameter(torch.rand(8)), reads_norm

    def forward(self, x):
        normal = self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = x + self.fc2(self.act(self.fc1(normal))).mul(self.gamma.reshape(1, -1, 1, 1))
        return y + normal if self.reads_norm else y


@of_a_library
class ScaledTokens(nn.Module):
    """Vision transformers' feed-forward network, with its layer scale."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc1, self.act, self.fc2 = depthwise(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)
        self.gamma = nn.Parameter(torch.rand(8))

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return tokens + self.fc2(self.act(self.fc1(tokens))) * self.gamma


@of_a_library
class Tokens(nn.Module):
    """A depthwise layer between linear ones, all on tokens."""

    def __init__(self):
        super().__init__()
        self.fc1, self.conv, self.act, self.fc2 = nn.Linear(8, 16), depthwise(16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x):
        images, channels, height, width = x.shape
        y = self.fc1(x.flatten(2).transpose(1, 2))
        y = self.conv(y.transpose(1, 2).reshape(images, 16, height, width))
        y = self.fc2(self.act(y.flatten(2).transpose(1, 2)))
        return y.transpose(1, 2).reshape(images, channels, height, width)


@of_a_library
class Ghost(nn.Module):
    """As GhostNet's: half of the channels from the other half, and fewer of them than there are."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.second = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6))
        self.last = nn.Sequential(nn.Conv2d(10, 10, 5, 2, 2, groups=10, bias=False), nn.BatchNorm2d(10), nn.ReLU6())

    def forward(self, x):
        y = self.first(x)
        y = torch.cat([y, self.second(y)], 1)[:, :10]
        return self.last(y)


@of_a_library
class Draws(nn.Module):
    """Adds noise that it draws by the size of the map."""

    def __init__(self):
        super().__init__()
        self.conv = depthwise()

    def forward(self, x):
        return self.conv(x) + torch.rand(1, 8, *x.shape[2:])


@of_a_library
class Keeps(nn.Module):
    """Keeps what it computed of a parameter, until it is trained."""

    def __init__(self):
        super().__init__()
        self.conv, self.bias, self.kept = depthwise(), nn.Parameter(torch.randn(8, 1, 1)), {"maps": [{}]}

    def train(self, mode=True):
        if mode:
            self.kept["maps"][0].clear()
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return self.conv(x) + 2 * self.bias
        if "bias" not in self.kept["maps"][0]:
            self.kept["maps"][0]["bias"] = 2 * self.bias
        return self.conv(x) + self.kept["maps"][0]["bias"]


def conv_norm(*conv, act=None, **options):
    outputs = conv[1]
    return [nn.Conv2d(*conv, bias=False, **options), nn.BatchNorm2d(outputs), *([act] if act else [])]


def depthwise_norm(kernel=3, act=None, **options):
    return conv_norm(8, 8, kernel, padding=kernel // 2, groups=8, act=act, **options)


def inverted_residual():
    return Residual(
        *conv_norm(8, 24, 1, act=nn.ReLU6(inplace=True)),
        *conv_norm(24, 24, 3, padding=1, groups=24, act=nn.SiLU(inplace=True)),
        *conv_norm(24, 8, 1),
    )


def attention(key, value, act=None):
    return nn.Sequential(key, act or nn.GELU(), value)


class Pattern(NamedTuple):
    """A model of maps of 8 channels, and the steps of its program."""

    make: Callable[[], nn.Module]
    steps: list[str]
    training: list[str] | None = None  # those of the program with gradients, in training mode; None for no program


PATTERNS = {
    "a convolution": Pattern(depthwise, ["depthwise_conv2d"], ["depthwise_conv2d"]),
    "an activation": Pattern(
        lambda: nn.Sequential(depthwise(8, 7, stride=2), nn.SiLU(inplace=True)),
        ["depthwise_conv2d"],
        ["depthwise_conv2d"],
    ),
    "two channels a group": Pattern(
        lambda: nn.Sequential(nn.Conv2d(8, 16, 5, padding=2, groups=8), nn.GELU("tanh")),
        ["depthwise_conv2d"],
        ["depthwise_conv2d"],
    ),
    "a norm and an activation": Pattern(
        lambda: nn.Sequential(*depthwise_norm(act=nn.ReLU())), ["depthwise_conv2d"], ["branched_depthwise"]
    ),
    "a pointwise layer": Pattern(
        lambda: nn.Sequential(*conv_norm(8, 12, 1, act=nn.GELU())), ["conv2d"], ["projection", "batch_norm_training"]
    ),
    "a dense layer": Pattern(
        lambda: nn.Sequential(*conv_norm(8, 12, 3, act=nn.ReLU())),
        ["torch: convolution", "torch: relu"],
        ["torch: convolution", "batch_norm_training"],
    ),
    "a norm without weights": Pattern(
        lambda: nn.Sequential(depthwise(), nn.BatchNorm2d(8, affine=False)),
        ["depthwise_conv2d"],
        ["depthwise_conv2d", "batch_norm_training"],
    ),
    "a norm ahead": Pattern(lambda: layers.BNConv(8, 12), ["conv2d"], ["batch_norm_training", "projection"]),
    "a norm ahead of taps": Pattern(
        lambda: nn.Sequential(nn.BatchNorm2d(8), depthwise()),
        ["torch: batch_norm", "depthwise_conv2d"],
        ["batch_norm_training", "depthwise_conv2d"],
    ),
    "two branches": Pattern(
        lambda: layers.BranchedDepthwise(8, 16, 7, stride=2), ["depthwise_conv2d"], ["branched_depthwise"]
    ),
    "an identity branch": Pattern(
        lambda: Branches(
            nn.Sequential(*depthwise_norm(5)), nn.Sequential(*depthwise_norm(1)), nn.BatchNorm2d(8), act=nn.ReLU()
        ),
        ["depthwise_conv2d"],
        ["branched_depthwise", "batch_norm_training", "torch: add", "torch: relu"],
    ),
    "a pointwise layer and its map": Pattern(
        lambda: layers.SkipConv(8), ["conv2d"], ["batch_norm_training", "projection", "torch: add"]
    ),
    "an inverted residual": Pattern(
        inverted_residual,
        ["conv2d", "depthwise_conv2d", "conv2d"],
        ["projection", "batch_norm_training", "branched_depthwise", "projection", "batch_norm_training",
         "torch: add"],
    ),
    "a token mixer": Pattern(
        lambda: mixers.ResidualMixer(mixers.ffnified_attention_mixer(8, 7), 8, layer_scale_init=0.5),
        ["conv2d", "ffnified_attention"],
        ["projection", "batch_norm_training", "branched_depthwise", "branched_depthwise", "torch: mul", "torch: add"],
    ),
    "a token mixer of plain layers": Pattern(
        lambda: mixers.ResidualMixer(mixers.ffnified_attention_mixer(8, 3), 8, layer_scale_init=0.5),
        ["conv2d", "ffnified_attention"],
        ["projection", "batch_norm_training", "ffnified_attention"],
    ),
    "a channel mixer": Pattern(
        lambda: mixers.ResidualMixer(mixers.conv_ffn_mixer(8, 7, 2), 8, layer_scale_init=0.5),
        ["channel_mixer"],
        ["branched_depthwise", "feed_forward"],
    ),
    "a channel mixer of one branch": Pattern(
        lambda: mixers.ResidualMixer(mixers.conv_ffn_mixer(8, 3, 2), 8), ["channel_mixer"],
        ["branched_depthwise", "feed_forward"],
    ),
    "keys and values of two sizes": Pattern(
        lambda: attention(depthwise(8, 3), depthwise(8, 5)), ["depthwise_conv2d"] * 2, ["depthwise_conv2d"] * 2
    ),
    "dilated values": Pattern(
        lambda: attention(depthwise(), depthwise(padding=2, dilation=2)),
        ["depthwise_conv2d", "torch: convolution"],
        ["depthwise_conv2d", "torch: convolution"],
    ),
    "a mixer of another activation": Pattern(
        lambda: attention(depthwise(), depthwise(), nn.LeakyReLU(0.2)),
        ["depthwise_conv2d", "torch: leaky_relu", "depthwise_conv2d"],
        ["depthwise_conv2d", "torch: leaky_relu", "depthwise_conv2d"],
    ),
    "a leaky mixer": Pattern(
        lambda: attention(depthwise(), depthwise(), nn.LeakyReLU(inplace=True)),
        ["ffnified_attention"],
        ["ffnified_attention"],
    ),
    "a hard sigmoid": Pattern(
        lambda: nn.Sequential(depthwise(), nn.Hardsigmoid(), nn.Conv2d(8, 8, 1), nn.Hardsigmoid(inplace=True)),
        ["depthwise_conv2d", "conv2d"],
        ["depthwise_conv2d", "projection", "torch: hardsigmoid"],
    ),
    "a grouped projection": Pattern(
        lambda: nn.Sequential(depthwise(), nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1, groups=4)),
        ["depthwise_conv2d", "conv2d", "torch: convolution"],
        ["depthwise_conv2d", "projection", "torch: gelu", "torch: convolution"],
    ),
    "an activation with a companion": Pattern(
        UsedTwice, ["depthwise_conv2d", "torch: gelu", "torch: add"], ["depthwise_conv2d", "torch: gelu", "torch: add"]
    ),
    "a norm ahead of the head": Pattern(
        lambda: nn.Sequential(
            depthwise(), nn.ReLU(), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        ),
        ["depthwise_conv2d", "torch: adaptive_avg_pool2d", "torch: flatten", "torch: linear"],
        ["depthwise_conv2d", "batch_norm_training", "torch: adaptive_avg_pool2d", "torch: flatten", "torch: linear"],
    ),
    "ConvNeXt": Pattern(
        ConvNeXt,
        ["norm_mixer"],
        ["depthwise_conv2d", "torch: permute", "torch: layer_norm", "torch: linear", "torch: gelu", "torch: linear",
         "torch: mul", "torch: permute", "torch: add"],
    ),
    "timm's ConvNeXt": Pattern(
        lambda: ConvNeXt(scales_map=True),
        ["norm_mixer"],
        ["depthwise_conv2d", "torch: permute", "torch: layer_norm", "torch: linear", "torch: gelu", "torch: linear",
         "torch: permute", "torch: reshape", "torch: mul", "torch: add"],
    ),
    "ConvNeXt of 1×1 convolutions": Pattern(
        ConvNeXtOfMaps, ["norm_mixer"],
        ["depthwise_conv2d", "torch: permute", "torch: layer_norm", "torch: permute", "torch: reshape", "feed_forward"],
    ),
    "ConvNeXt with a companion of its norm": Pattern(
        lambda: ConvNeXtOfMaps(reads_norm=True),
        ["depthwise_conv2d", "torch: permute", "torch: layer_norm", "torch: permute", "conv2d", "conv2d", "torch: add"],
        ["depthwise_conv2d", "torch: permute", "torch: layer_norm", "torch: permute", "torch: reshape", "feed_forward",
         "torch: add"],
    ),
    "scaled tokens": Pattern(
        ScaledTokens,
        ["depthwise_conv2d", "torch: flatten", "torch: transpose", "linear", "linear"],
        ["depthwise_conv2d", "torch: flatten", "torch: transpose", "torch: linear", "torch: relu", "torch: linear",
         "torch: mul", "torch: add"],
    ),
    "circular padding": Pattern(
        lambda: depthwise(padding_mode="circular"),
        ["torch: pad", "depthwise_conv2d"],
        ["torch: pad", "depthwise_conv2d"],
    ),
    "tokens": Pattern(
        Tokens,
        ["torch: flatten", "torch: transpose", "linear", "torch: transpose", "torch: reshape", "depthwise_conv2d",
         "torch: flatten", "torch: transpose", "linear", "torch: transpose", "torch: reshape"],
        ["torch: flatten", "torch: transpose", "torch: linear", "torch: transpose", "torch: reshape",
         "depthwise_conv2d", "torch: flatten", "torch: transpose", "torch: linear", "torch: transpose",
         "torch: reshape"],
    ),
    "a ghost": Pattern(
        Ghost,
        ["conv2d", "depthwise_conv2d", "torch: cat", "depthwise_conv2d"],
        ["projection", "batch_norm_training", "branched_depthwise", "torch: cat", "branched_depthwise"],
    ),
    "by the size of the map": Pattern(Unsquare, ["depthwise_conv2d"], ["depthwise_conv2d"]),
}  # fmt: skip
