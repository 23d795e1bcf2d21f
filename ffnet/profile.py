"""Size of a model: parameters and multiply–adds."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["count_macs", "count_parameters"]


def count_parameters(model: nn.Module) -> int:
    """Number of elements in the parameters of ``model``, buffers excluded."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_size: tuple[int, ...] = (3, 256, 256)) -> int:
    """Multiply–adds of the convolutions and linear layers for one input, [C, H, W] say, in eval mode.

    Published figures are for the reparameterised model. Other operations, such as the two products of self-attention,
    are not counted. A copy of the model runs on the meta device, without arithmetic or memory for maps and parameters.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    dtype = next((p.dtype for p in itertools.chain(model.parameters(), model.buffers())), None)
    # A deepcopy that finds its tensors in the memo: the structure is copied, the storage is not.
    model = copy.deepcopy(model, memo).eval()

    macs = 0

    def add_macs(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        macs += output.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear)):
            module.register_forward_hook(add_macs)
    with torch.no_grad():
        model(torch.empty(1, *input_size, dtype=dtype, device="meta"))
    return macs
