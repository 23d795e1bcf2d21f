"""Models whose layers run in one call, and what such a call did."""

import pytest
import torch
from torch import nn

import ffnet
import ffnet_kernels as fk
from ffnet_kernels import sequence
from ffnet_kernels.sequence import Sequence

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TINY = {"depths": (1, 2), "dims": (24, 48), "token_kernels": (3, 7), "stem_width": 10, "num_classes": 21}


def tiny(dtype=torch.float32, **options):
    """A small FFNet whose parameters and statistics all matter."""
    model = ffnet.FFNet(**{**TINY, **options}).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if "var" in name else tensor.normal_(std=0.3)
    return model.to(dtype)


def layers_of_a_sequential(**options):
    conv = nn.Conv2d(6, 16, 1)
    return nn.Sequential(
        conv, nn.GELU(), nn.Identity(), nn.Conv2d(16, 32, 5, stride=2, padding=2, groups=16), nn.Dropout(0.5),
        nn.Sequential(nn.Conv2d(32, 8, 1), nn.ReLU()), fk.ChannelMixer(8, 3), nn.Sequential(), **options,
    ).eval()  # fmt: skip


def optimized_sequential():
    model = fk.optimize(layers_of_a_sequential())
    assert type(model) is Sequence
    return model


def calls(model, x):
    """The operators of this package that a forward pass calls, and its result."""
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = model(x)
    prefix = "ffnet_kernels::"
    return [event.name.removeprefix(prefix) for event in profile.events() if event.name.startswith(prefix)], out


def one_by_one(model, x):
    """What the layers compute, called one after the other."""
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequence, "_applies", lambda x: False)
        return model(x)
