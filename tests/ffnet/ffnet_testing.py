"""Helpers of the tests of ffnet."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

import ffnet


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Gives every parameter and statistic a value at which dropping or misplacing it shows in the output."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.5)
            module.running_mean.normal_(std=0.5)
            module.running_var.uniform_(0.5, 2.0)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            module.weight.normal_(std=fan_in**-0.5)
            if module.bias is not None:
                module.bias.normal_(std=0.5)
        elif isinstance(module, nn.LayerNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.5)
        if getattr(module, "layer_scale", None) is not None:
            module.layer_scale.normal_(mean=0.5, std=0.2)
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def small_ffnet(**kwargs) -> ffnet.FFNet:
    """All of the family's structure, at a size for tests."""
    defaults = {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64), "stem_width": 8, "num_classes": 10}
    return ffnet.FFNet(**{**defaults, **kwargs})


def steps_side_by_side(models: tuple[nn.Module, nn.Module], inputs: Iterable[torch.Tensor]) -> Iterator[None]:
    """A training step of both on each input, by gradient descent; their losses have to be the same."""
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in models]
    for x in inputs:
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
        yield
