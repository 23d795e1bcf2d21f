"""Reparameterisation: turns a training-time model into an equivalent one of plain convolutions."""

from __future__ import annotations

import copy
from typing import TypeVar, overload

import torch
from torch import nn

from .layers import FoldableConv
from .mixers import MetaMixer, ResidualMixer
from .model import FFNet

__all__ = ["reparameterize"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@overload
def reparameterize(model: FoldableConv, *, extra_folds: bool = True) -> nn.Conv2d: ...
@overload
def reparameterize(model: ModuleT, *, extra_folds: bool = True) -> ModuleT: ...
@torch.no_grad()
def reparameterize(model: nn.Module, *, extra_folds: bool = True) -> nn.Module:
    """Returns a new model in which every foldable layer is one biased ``Conv2d`` of the same name (arXiv 2406.02021).

    Batch normalisation goes into its convolution, the parallel branches of a depthwise layer into one kernel, and
    ``conv(x) + x`` into the convolution. The folds are exact: they are computed in float64 and rounded once to the
    parameters' dtype. The bias of the query projection is not moved through the zero-padded depthwise convolution, as
    that would be wrong at the borders.

    All folds use running statistics, so the result equals what ``model`` computes in eval mode. Each module keeps its
    training flag: a model in training mode comes back with drop path active and without batch statistics.
    Device, dtype and ``requires_grad`` are kept (a fused bias follows the weight of its convolution); hooks on the
    replaced layers are not. ``model`` is untouched, and a second application changes nothing.

    Args:
        model: Any module tree that contains layers of `ffnet.layers`.
        extra_folds: Also fold each layer scale into the last convolution of its mixer, and the final batch norm into
            the head. The model then still classifies as before, but cannot return normalised features or change its
            head.

    Returns:
        The new model; a single foldable layer gives a single ``Conv2d``.
    """
    fused = _fused(copy.deepcopy(model))
    for module in fused.modules():
        if isinstance(module, MetaMixer):
            module.fold_norms()
        elif extra_folds and isinstance(module, ResidualMixer):
            module.fold_layer_scale()
        elif extra_folds and isinstance(module, FFNet):
            module.fold_norm()
    return fused


def _fused(module: nn.Module) -> nn.Module:
    if isinstance(module, FoldableConv):
        return module.fused()
    for name, child in module.named_children():
        setattr(module, name, _fused(child))
    return module
