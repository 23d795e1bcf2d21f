"""One representative call of every operator, in any layout, dtype and size, and a model of their modules."""

import torch
from parity import Case, laid_out

import ffnet_kernels as fk


def example(
    operator: str,
    *,
    shape: tuple[int, int, int, int] = (2, 19, 9, 11),
    kernel: tuple[int, int] = (7, 7),
    layout: str = "nchw",
    activation: str = "gelu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options,
) -> Case:
    """With every optional tensor.

    ``options``: ``stride``, ``padding``, ``multiplier`` of depthwise_conv2d, ``value_kernel`` of ffnified_attention,
    ``hidden`` and ``outputs`` of channel_mixer.
    """
    generator = torch.Generator().manual_seed(seed)
    channels, gain = shape[1], (kernel[0] * kernel[1]) ** -0.5

    def values(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * scale).to(dtype)

    x = laid_out(shape, layout, generator, dtype=dtype)
    weight = values(channels * options.pop("multiplier", 1), 1, *kernel, scale=gain)
    if operator == "depthwise_conv2d":
        return Case(operator, (x, weight, values(weight.shape[0])), {"activation": activation, **options})
    outputs = options.pop("outputs", channels)
    kwargs = {"activation": activation, "scale": values(outputs)}
    if operator == "ffnified_attention":
        value_kernel = options.pop("value_kernel", kernel)
        value = values(channels, 1, *value_kernel, scale=(value_kernel[0] * value_kernel[1]) ** -0.5)
        args = (x, weight, values(channels), value, values(channels))
    else:
        hidden = options.pop("hidden", 2 * channels + 1)
        expand, project = values(hidden, channels, scale=channels**-0.5), values(outputs, hidden, scale=hidden**-0.5)
        args = (x, weight, values(channels), expand, values(hidden), project, values(outputs))
    residual = laid_out((shape[0], outputs, *shape[2:]), layout, generator, dtype=dtype)
    return Case(operator, args, {**kwargs, "residual": residual, **options})


class Mixers(torch.nn.Module):
    """Of 8 channels."""

    def __init__(self):
        super().__init__()
        self.conv = fk.DepthwiseConv2d(8, 7, activation="gelu")
        self.attention = fk.FFNifiedAttention(8, 5, layer_scale=0.5)
        self.mixer = fk.ChannelMixer(8, 3, layer_scale=0.5)

    def forward(self, x):
        x = self.attention(self.conv(x), x)
        return self.mixer(x, x)
