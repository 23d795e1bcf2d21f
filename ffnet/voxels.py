"""A block of FFNet for point clouds (arXiv 2406.02021): the same two mixers with 3×3×3 convolutions on voxels.

On dense voxels [N, C, D, H, W] they are ``nn.Conv3d``, on sparse ones spconv's submanifold convolutions. Both mix
channels, so kernels for depthwise convolutions do not apply. `ffnet.reparameterize` folds the batch normalisations of
dense blocks into their convolutions; spconv's stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .layers import OnFeatures
from .mixers import MetaMixer

__all__ = ["VoxelBlock"]


def _spatial(dim: int, kernel_size: int, sparse: bool, key: str, **factory: Any) -> nn.Module:
    if not sparse:
        return nn.Conv3d(dim, dim, kernel_size, padding=kernel_size // 2, bias=False, **factory)
    try:
        import spconv.pytorch as spconv
    except ImportError as error:
        raise ImportError("sparse voxels need the package spconv (pip install spconv, or spconv-cu...)") from error
    # One key for all blocks of a resolution, so that pairs of neighbours are found only once.
    conv = spconv.SubMConv3d(dim, dim, kernel_size, padding=kernel_size // 2, bias=False, indice_key=key)
    return conv.to(**factory)


class VoxelBlock(nn.Module):
    """Token mixer, then channel mixer, each residual and after a layer normalisation: voxels of C channels → the same.

    Args:
        dim: C.
        kernel_size: Odd size of the convolutions.
        expansion: Hidden width of the channel mixer relative to C.
        sparse: Whether voxels are a ``spconv.SparseConvTensor``; otherwise they are a tensor [N, C, D, H, W].
        key: With ``sparse``: the ``indice_key``, shared by all blocks on the same points.

    Raises:
        ImportError: With ``sparse``, if spconv is not installed.
        ValueError: If the kernel is even.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        expansion: float = 4,
        *,
        sparse: bool = False,
        key: str = "ffnet",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"expected an odd kernel, got {kernel_size}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(expansion * dim)

        def spatial(name: str) -> list[tuple[str, nn.Module]]:
            conv = _spatial(dim, kernel_size, sparse, f"{key}.{kernel_size}", **factory)
            return [(name, conv), (f"{name}_norm", OnFeatures(nn.BatchNorm1d(dim, **factory)))]

        def norm() -> tuple[str, nn.Module]:
            return "norm", OnFeatures(nn.LayerNorm(dim, **factory))

        def linear(name: str, inputs: int, outputs: int) -> tuple[str, nn.Module]:
            return name, OnFeatures(nn.Linear(inputs, outputs, **factory))

        self.token_mixer = MetaMixer(
            query=[norm(), linear("fc", dim, dim)],
            interaction=spatial("conv1"),
            activation=("act", OnFeatures(nn.GELU())),
            aggregation=spatial("conv2"),
        )
        self.channel_mixer = MetaMixer(
            query=[norm(), *spatial("conv")],
            interaction=linear("fc1", dim, hidden),
            activation=("act", OnFeatures(nn.GELU())),
            aggregation=linear("fc2", hidden, dim),
        )

    def forward(self, x: Any) -> Any:
        x = self._added(x, self.token_mixer(x))
        return self._added(x, self.channel_mixer(x))

    @staticmethod
    def _added(x: Any, y: Any) -> Any:
        return x + y if isinstance(x, Tensor) else x.replace_feature(x.features + y.features)
