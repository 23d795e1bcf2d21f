"""FFNet for time series: "FFNet: MetaMixer-based Efficient Convolutional Mixer Design" (arXiv 2406.02021).

A series of M variables becomes a map of one row with M·D channels, in the order (variable, feature). Names follow the
published checkpoints below ``model.``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import widen
from .mixers import MetaMixer
from .registry import register_model
from .rows import BranchedRow, RegroupedConv, RowConv, RowConvBN, RowNorm

__all__ = ["ForecastFFNet", "RevIN", "ffnet_ts", "forecast_arguments"]


class RevIN(nn.Module):
    """Reversible instance normalisation (Kim et al., ICLR 2022): normalises each variable by its own look-back window.

    Args:
        variables: M.
        affine: Whether each variable also has a learnt scale and shift.
    """

    def __init__(
        self,
        variables: int,
        affine: bool = False,
        eps: float = 1e-5,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.affine_weight: nn.Parameter | None
        self.affine_bias: nn.Parameter | None
        if affine:
            self.affine_weight = nn.Parameter(torch.ones(variables, device=device, dtype=dtype))
            self.affine_bias = nn.Parameter(torch.zeros(variables, device=device, dtype=dtype))
        else:
            self.register_parameter("affine_weight", None)
            self.register_parameter("affine_bias", None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Windows [N, L, M] → normalised windows, and the mean and standard deviation [N, 1, M] to undo it with."""
        mean = x.mean(1, keepdim=True)
        deviation = (x.var(1, keepdim=True, unbiased=False) + self.eps).sqrt()
        y = (x - mean) / deviation
        if self.affine_weight is not None and self.affine_bias is not None:
            y = y * self.affine_weight + self.affine_bias
        return y, mean, deviation

    def undo(self, y: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
        """Converts normalised values [N, H, M] back to the units of the series."""
        if self.affine_weight is not None and self.affine_bias is not None:
            y = (y - self.affine_bias) / (self.affine_weight + self.eps**2)
        return y * deviation + mean


class SeriesBlock(nn.Module):
    """Token mixer, then channel mixer, each residual: [N, M·D, 1, L] → the same.

    The query of the token mixer mixes variables within each feature, then features within each variable; the channel
    mixer uses the reverse order.
    """

    def __init__(
        self, variables: int, dim: int, kernel_size: int, small_kernel: int, expansion: int, **factory: Any
    ) -> None:
        super().__init__()
        channels = variables * dim

        def depthwise() -> RowConv:
            return RowConv(channels, channels, kernel_size, 1, kernel_size // 2, groups=channels, **factory)

        self.token_mixer = MetaMixer(
            query=[
                ("ffnpw1", RegroupedConv(channels, 2 * channels, variables, dim, **factory)),
                ("ffnact", nn.GELU()),
                ("ffnpw2", RegroupedConv(2 * channels, channels, dim, variables, **factory)),
                ("norm", RowNorm(dim, variables, **factory)),
            ],
            interaction=("dw1", depthwise()),
            activation=("act", nn.GELU()),
            aggregation=("dw2", depthwise()),
        )
        hidden = expansion * channels
        self.channel_mixer = MetaMixer(
            query=[
                ("dw", BranchedRow(channels, kernel_size, small_kernel, **factory)),
                ("norm", RowNorm(dim, variables, **factory)),
            ],
            interaction=("ffnpw1", RowConv(channels, hidden, 1, groups=variables, **factory)),
            activation=("act", nn.GELU()),
            aggregation=("ffnpw2", RegroupedConv(hidden, channels, variables, dim, restore=True, **factory)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mixer(x)
        return x + self.channel_mixer(x)


class SeriesStage(nn.Module):
    """A sequence of blocks."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class ForecastHead(nn.Module):
    """Maps all features of a variable to its horizon, with one matrix for all variables: [N, M, D·L] → [N, M,
    horizon]."""

    def __init__(self, features: int, horizon: int, drop_rate: float, **factory: Any) -> None:
        super().__init__()
        self.dropout = nn.Dropout(drop_rate)
        self.linear = nn.Linear(features, horizon, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear(x))


class SeriesNet(nn.Module):
    """The network between normalisation and its inverse: windows [N, L, M] → [N, horizon, M]."""

    def __init__(self, *, variables: int, lookback: int, horizon: int, dim: int, patch: int, stride: int,
                 depth: int, kernel_size: int, small_kernel: int, expansion: int, affine: bool, drop_rate: float,
                 **factory: Any) -> None:  # fmt: skip
        super().__init__()
        self.variables, self.overhang = variables, patch - stride
        self.revin_layer = RevIN(variables, affine, **factory)
        embed = RowConvBN(1, dim, patch, stride, bias=True, names=("0", "1"), **factory)
        self.downsample_layers = nn.ModuleList([embed])
        blocks: list[nn.Module] = [
            SeriesBlock(variables, dim, kernel_size, small_kernel, expansion, **factory) for _ in range(depth)
        ]
        self.stages = nn.ModuleList([SeriesStage(blocks)])
        self.head = ForecastHead(dim * (lookback // stride), horizon, drop_rate, **factory)

    def forward(self, x: Tensor) -> Tensor:
        y, mean, deviation = self.revin_layer(x)
        y = F.pad(y.transpose(1, 2), (0, self.overhang), mode="replicate")
        y = self.downsample_layers[0](y.flatten(0, 1)[:, None, None])  # [N·M, D, 1, L]
        y = y.unflatten(0, (-1, self.variables)).flatten(1, 2)
        for stage in self.stages:
            y = stage(y)
        y = self.head(y.unflatten(1, (self.variables, -1)).flatten(2)).transpose(1, 2)
        return self.revin_layer.undo(y, mean, deviation)


class ForecastFFNet(nn.Module):
    """FFNet for forecasting: windows of a series [N, lookback, M] → the following steps [N, horizon, M], in the same
    units.

    Args:
        variables: M.
        lookback: Steps read, a multiple of ``stride``.
        horizon: Steps forecast.
        dim: D, features per variable.
        patch: Steps per patch.
        stride: Steps between patches; the series is padded with its last value for the last patch.
        depth: Blocks.
        kernel_size: Odd length of the depthwise kernels, in patches.
        small_kernel: Odd length of the parallel branch in the channel mixers.
        expansion: Hidden width of the channel mixers relative to D.
        affine: Whether the normalisation of each window also has learnt parameters.
        drop_rate: Dropout rate after the head.

    Raises:
        ValueError: If an argument is out of range, or windows have another number of variables or another length. Their
            values are not looked at: a NaN makes its window's forecasts NaN. `forecast` does look.
    """

    def __init__(
        self,
        variables: int = 7,
        lookback: int = 96,
        horizon: int = 96,
        dim: int = 64,
        patch: int = 4,
        stride: int = 2,
        depth: int = 1,
        kernel_size: int = 51,
        small_kernel: int = 5,
        expansion: int = 1,
        affine: bool = False,
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "variables": variables, "lookback": lookback, "horizon": horizon, "dim": dim, "patch": patch,
            "stride": stride, "depth": depth, "expansion": expansion,
        }  # fmt: skip
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}")
        if patch < stride or lookback % stride:
            raise ValueError(
                f"expected a stride of at most the patch that divides lookback, got a stride of {stride}, a patch of "
                f"{patch} and a lookback of {lookback}"
            )
        self.variables, self.lookback, self.horizon = variables, lookback, horizon
        self.config: dict[str, Any] = {"input_size": (lookback, variables)}
        self.model = SeriesNet(
            **sizes, kernel_size=kernel_size, small_kernel=small_kernel, affine=affine, drop_rate=drop_rate,
            device=device, dtype=dtype,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[1] != self.lookback or x.shape[2] != self.variables:
            raise ValueError(
                f"expected windows [N, {self.lookback}, {self.variables}] (look-back, variables), got the shape "
                f"{list(x.shape)}"
            )
        return self.model(x)

    @torch.no_grad()
    def forecast(self, series: Tensor) -> Tensor:
        """Forecasts a series [L, M] of at least ``lookback`` steps, of which the last are read: [horizon, M].

        Runs in eval mode, whatever mode the model is in. The mean of the look-back is set aside in float64, so that
        series far from zero, in comparison to how much they move, lose nothing in the model's dtype. The result has the
        series' device and the wider of both dtypes.

        Raises:
            ValueError: If the series is too short, has a wrong number of variables, or a value read is not finite.
        """
        if series.dim() != 2 or series.shape[1] != self.variables:
            raise ValueError(f"expected a series [steps, {self.variables}], got the shape {list(series.shape)}")
        if len(series) < self.lookback:
            raise ValueError(f"expected at least the {self.lookback} steps of the look-back, got {len(series)}")
        window = widen(series[-self.lookback :])
        mean, like = window.mean(0), next(self.parameters())
        near = (window - mean)[None].to(like)
        if not near.isfinite().all():
            raise ValueError(f"expected finite values of {like.dtype}, got NaN or infinity in the look-back")
        training = self.training
        self.eval()
        try:
            forecast = widen(self(near)[0]).to(mean.device) + mean
        finally:
            self.train(training)
        return forecast.to(series.device, torch.promote_types(series.dtype, like.dtype))


def forecast_arguments(state: Mapping[str, Tensor], lookback: int | None = None) -> dict[str, Any]:
    """The arguments of the `ForecastFFNet` that a state dict, as trained or folded, belongs to.

    Weights do not tell the stride of the patches. It follows from the look-back; without one, patches are taken to
    overlap by half, as published.

    Raises:
        ValueError: If it belongs to another kind of model, or to one of another look-back.
    """
    block = "model.stages.0.blocks.0"
    try:
        outputs, variables, _ = state[f"{block}.token_mixer.ffnpw1.weight"].shape
        dim = outputs // (2 * variables)
        embed, folded = (f"model.downsample_layers.0.{name}weight" for name in ("0.", ""))
        patch = state[embed if embed in state else folded].shape[2]
        horizon, features = state["model.head.linear.weight"].shape
        small = f"{block}.channel_mixer.dw.small_conv.conv.weight"  # in no folded model
        found = {
            "kernel_size": state[f"{block}.token_mixer.dw1.weight"].shape[2],
            "small_kernel": state[small].shape[2] if small in state else 1,
            "expansion": state[f"{block}.channel_mixer.ffnpw1.weight"].shape[0] // (variables * dim),
        }
        prefix = "model.stages.0.blocks."
        depth = 1 + max(int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix))
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"no weights of FFNet for time series: something is missing or odd: {error}") from error
    patches = features // dim
    stride = max(patch // 2, 1) if lookback is None else max(lookback // patches, 1)
    if lookback not in (None, patches * stride) or stride > patch:
        raise ValueError(
            f"expected a look-back of {patches} patches of {patch} steps, 1 to {patch} steps apart, got {lookback}"
        )
    return {
        "variables": variables, "lookback": patches * stride, "horizon": horizon, "dim": dim, "patch": patch,
        "stride": stride, "depth": depth, **found, "affine": "model.revin_layer.affine_weight" in state,
    }  # fmt: skip


@register_model(
    task="forecasting",
    published="MSE/MAE: ETT .376/.390, ECL .184/.278, Exchange .343/.392, Traffic .517/.338, Weather .244/.274",
    checked="keys, folds, kernels, training",
)
def ffnet_ts(**kwargs: Any) -> ForecastFFNet:
    """FFNet for time series: 7 variables, look-back 96, D = 64, kernel 51; published errors are means of the horizons
    96, 192, 336 and 720."""
    return ForecastFFNet(**kwargs)
