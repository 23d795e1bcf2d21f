"""FFNet image classifiers: "FFNet: MetaMixer-based Efficient Convolutional Mixer Design" (arXiv 2406.02021).

Module names follow the published checkpoints, which load unchanged (`ffnet.load_checkpoint`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from .layers import BranchedDepthwise, ConvBN, LayerNorm2d, SkipConv, norm_as_affine, widen
from .mixers import TOKEN_MIXERS, ResidualMixer, conv_ffn_mixer, token_mixer
from .registry import register_model

__all__ = ["FFNet", "FFNetTrunk", "ffnet_1", "ffnet_2", "ffnet_3", "ffnet_4"]

IMAGENET_CONFIG: dict[str, Any] = {
    "input_size": (3, 256, 256),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "patch_embed.0.c",
    "classifier": "head",
}


class Stem(nn.Sequential):
    """Two 3×3 convolutions of stride 2, GELU between: [N, I, H, W] → [N, dim, H/4, W/4]."""

    def __init__(self, in_chans: int, width: int, dim: int, **factory: Any) -> None:
        super().__init__(
            ConvBN(in_chans, width, 3, stride=2, **factory), nn.GELU(), ConvBN(width, dim, 3, stride=2, **factory)
        )


class Downsample(nn.Module):
    """Branched depthwise 7×7 of stride 2, then a pointwise skip convolution: [N, I, H, W] → [N, O, H/2, W/2]."""

    def __init__(self, in_dim: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(BranchedDepthwise(in_dim, dim, 7, stride=2, **factory), SkipConv(dim, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Block(nn.Module):
    """Token mixer, then channel mixer, each residual: [N, C, H, W] → [N, C, H, W]."""

    def __init__(
        self,
        dim: int,
        token_kernel: int,
        channel_kernel: int,
        expansion: float,
        layer_scale_init: float | None,
        drop_path: float,
        slot: bool,
        strips: bool = False,
        mixer: str = "ffnified",
        **factory: Any,
    ) -> None:
        super().__init__()
        residual = {"layer_scale_init": layer_scale_init, "drop_path": drop_path, **factory}
        self.token_mixer = nn.Sequential(
            ResidualMixer(token_mixer(mixer, dim, token_kernel, strips=strips, **factory), dim, **residual)
        )
        if slot:  # the reference's place for squeeze-and-excitation, which every published model leaves empty
            self.token_mixer.append(nn.Identity())
        self.channel_mixer = ResidualMixer(conv_ffn_mixer(dim, channel_kernel, expansion, **factory), dim, **residual)

    def forward(self, x: Tensor) -> Tensor:
        return self.channel_mixer(self.token_mixer(x))


class FFNetTrunk(nn.Module):
    """Stem and stages, common to all FFNets for images; subclasses define what is done with the maps.

    Args:
        depths: Blocks of each stage.
        dims: Channels of each stage, each a multiple of the one before.
        token_kernels: Depthwise kernel of the token mixers in each stage; 7 gets a parallel 3×3 branch.
        channel_kernel: Depthwise kernel of all channel mixers; 7 gets a parallel 3×3 branch.
        expansion: Hidden width of the channel mixers relative to C.
        stem_width: Channels inside the stem.
        layer_scale_init: Initial layer scale, or None for none.
        drop_path_rate: Stochastic depth rate of the last block; rises linearly from 0 over the blocks.
        in_chans: Channels of the input.
        strips: Whether token mixers have the branches of `ffnet.layers.StripDepthwise`.
        token_mixers: For each stage, ``"ffnified"``, ``"attention"`` (self-attention: a hybrid), or several that its
            blocks alternate between; by default ``"ffnified"``. The paper does not say which blocks of its hybrid have
            which.
        config: Preprocessing entries that override ``IMAGENET_CONFIG``; the result is ``model.config``.

    Raises:
        ValueError: If an argument is out of range, with the value received.
    """

    stem_type: type[nn.Module] = Stem
    downsample_type: type[nn.Module] = Downsample

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        token_kernels: Sequence[int] = (3, 3, 7, 7),
        channel_kernel: int = 7,
        expansion: float = 3,
        stem_width: int = 64,
        layer_scale_init: float | None = None,
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
        strips: bool = False,
        token_mixers: Sequence[str | Sequence[str]] | None = None,
        config: Mapping[str, Any] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not len(depths) == len(dims) == len(token_kernels) > 0:
            raise ValueError(
                f"expected depths, dims and token_kernels of one length, got {depths}, {dims}, {token_kernels}"
            )
        if any(dim % in_dim for in_dim, dim in itertools.pairwise(dims)):
            raise ValueError(f"expected each of dims to be a multiple of the one before, got {dims}")
        if any(kernel < 1 or kernel % 2 == 0 for kernel in (*token_kernels, channel_kernel)):
            raise ValueError(f"expected odd kernels, got {token_kernels} for tokens and {channel_kernel} for channels")
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"expected drop_path_rate in [0, 1), got {drop_path_rate}")
        if in_chans < 1:
            raise ValueError(f"expected in_chans >= 1, got {in_chans}")
        kinds = [(k,) if isinstance(k, str) else tuple(k) for k in token_mixers or ["ffnified"] * len(dims)]
        if len(kinds) != len(dims) or not all(stage and set(stage) <= set(TOKEN_MIXERS) for stage in kinds):
            raise ValueError(f"expected token_mixers of {', '.join(TOKEN_MIXERS)} for each stage, got {token_mixers}")

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.grad_checkpointing = False
        self.config = {**IMAGENET_CONFIG, **(config or {})}
        self.config["input_size"] = (in_chans, *self.config["input_size"][1:])
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]

        self.patch_embed = self.stem_type(in_chans, stem_width, dims[0], **factory)
        self.stages = nn.ModuleList()
        steps = max(sum(depths) - 1, 1)
        for i, (depth, dim, token_kernel) in enumerate(zip(depths, dims, token_kernels, strict=True)):
            first = sum(depths[:i])
            rates = [drop_path_rate * (first + j) / steps for j in range(depth)]
            shape = (dim, token_kernel, channel_kernel, expansion, layer_scale_init)
            cycle = itertools.cycle(kinds[i])
            blocks = [
                Block(*shape, rate, slot=j % 2 == 0, strips=strips, mixer=next(cycle), **factory)
                for j, rate in enumerate(rates)
            ]
            downsample = [self.downsample_type(dims[i - 1], dim, **factory)] if i > 0 else []
            self.stages.append(nn.Sequential(*downsample, *blocks))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass instead of storing its maps.

        Batch normalisation in training mode then sees every batch twice, so running statistics are updated twice.
        """
        self.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """Map of the last stage before the final norm: [N, dims[-1], H/32, W/32]."""
        x = self.patch_embed(x)
        for stage in self.stages:
            x = self._forward_stage(stage, x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of several stages, with timm's signature.

        Args:
            x: Input [N, in_chans, H, W].
            indices: Which stages, negative from the end; n for the last n; None for all.
            norm: Apply each stage's norm; in classifiers only the last stage has one.
            stop_early: Do not run the stages after the last one asked for.
            output_fmt: ``"NCHW"``, the only format.
            intermediates_only: Return the maps alone.

        Returns:
            The maps in the order of the stages (strides 4, 8, 16, 32), preceded, unless ``intermediates_only``, by what
            `forward_features` returns (with ``stop_early``, by the map of the last stage that ran).

        Raises:
            ValueError: If ``output_fmt`` is not ``"NCHW"`` or an index is out of range.
            RuntimeError: With ``norm``, if the final norm has been folded into the head.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"expected output_fmt 'NCHW', got {output_fmt!r}")
        wanted = stage_indices(indices, len(self.stages))
        norms = {i: self._stage_norm(i) for i in wanted} if norm else {}
        intermediates = []
        x = self.patch_embed(x)
        for i, stage in enumerate(self.stages):
            if stop_early and i > max(wanted, default=-1):
                break
            x = self._forward_stage(stage, x)
            if i in wanted:
                intermediates.append(norms[i](x) if norm else x)
        return intermediates if intermediates_only else (x, intermediates)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names that group layers, for timm's layer-wise learning rates."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay besides one-dimensional ones: the layer scales."""
        return {name for name, _ in self.named_parameters() if name.endswith("layer_scale")}

    def _stage_norm(self, stage: int) -> Callable[[Tensor], Tensor]:
        """The norm of a stage's map, applied on request."""
        return _as_it_is

    def _forward_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return stage(x)
        for block in stage.children():
            x = run_checkpointed(block, x, use_reentrant=False)
        return x


class FFNet(FFNetTrunk):
    """FFNet classifier: [N, in_chans, H, W] → [N, num_classes], any H and W.

    Args:
        depths, dims, token_kernels, channel_kernel, expansion, stem_width: As for `FFNetTrunk`.
        layer_scale_init, drop_path_rate, in_chans, token_mixers, config: As for `FFNetTrunk`.
        drop_rate: Dropout rate before the head.
        num_classes: Outputs of the head; 0 for pooled features [N, dims[-1]].
        norm: Final normalisation, ``"batch"`` or ``"layer"``.

    Raises:
        ValueError: If an argument is out of range, with the value received.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        token_kernels: Sequence[int] = (3, 3, 7, 7),
        channel_kernel: int = 7,
        expansion: float = 3,
        stem_width: int = 64,
        layer_scale_init: float | None = None,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        norm: str = "batch",
        token_mixers: Sequence[str | Sequence[str]] | None = None,
        config: Mapping[str, Any] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            depths, dims, token_kernels, channel_kernel, expansion, stem_width, layer_scale_init, drop_path_rate,
            in_chans, token_mixers=token_mixers, config=config, device=device, dtype=dtype,
        )  # fmt: skip
        if norm not in ("batch", "layer"):
            raise ValueError(f"expected norm 'batch' or 'layer', got {norm!r}")
        self.norm_folded = False
        make_norm = nn.BatchNorm2d if norm == "batch" else LayerNorm2d
        self.norm: nn.Module = make_norm(dims[-1], device=device, dtype=dtype)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        self.apply(init_weights)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a new one with ``num_classes`` outputs; 0 for no head.

        Raises:
            ValueError: If ``num_classes`` is negative, or ``global_pool``, timm's argument, is not ``"avg"``.
            RuntimeError: If the final norm has been folded into the current head.
        """
        self._require_norm("a new head")
        self.head = new_classifier(self.num_features, num_classes, global_pool, next(self.parameters()))
        self.num_classes = self.config["num_classes"] = num_classes

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Norm, global average pool and head: map of the last stage → [N, num_classes].

        With ``pre_logits``, stops before the head: [N, dims[-1]].

        Raises:
            RuntimeError: With ``pre_logits``, if the final norm has been folded into the head.
        """
        if pre_logits:
            self._require_norm("pre_logits")
        x = self.head_drop(self.norm(x).mean((2, 3)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.no_grad()
    def fold_norm(self) -> None:
        """Folds the final batch norm, in place, into the head: being affine, it commutes with the average pool."""
        if not isinstance(self.norm, nn.modules.batchnorm._BatchNorm) or not isinstance(self.head, nn.Linear):
            return
        scale, shift = norm_as_affine(self.norm)
        weight = widen(self.head.weight)
        self.head.bias.copy_(widen(self.head.bias) + weight @ shift)
        self.head.weight.copy_(weight * scale)
        self.norm = nn.Identity().train(self.training)
        self.norm_folded = True

    def _stage_norm(self, stage: int) -> Callable[[Tensor], Tensor]:
        if stage < len(self.stages) - 1:
            return super()._stage_norm(stage)
        self._require_norm("norm=True")
        return self.norm

    def _require_norm(self, request: str) -> None:
        if self.norm_folded:
            raise RuntimeError(
                f"{request} needs the final norm, which reparameterize() folded into the head; "
                "reparameterize(model, extra_folds=False) keeps it"
            )


def _as_it_is(x: Tensor) -> Tensor:
    return x


def new_classifier(features: int, num_classes: int, global_pool: str | None, like: Tensor) -> nn.Module:
    """Returns an initialised linear classifier, [N, features] → [N, num_classes], with the device and dtype of
    ``like``; an identity for 0 classes.

    Raises:
        ValueError: If ``num_classes`` is negative, or ``global_pool``, timm's argument, is not ``"avg"``.
    """
    if num_classes < 0:
        raise ValueError(f"expected num_classes >= 0, got {num_classes}")
    if global_pool not in (None, "avg"):
        raise ValueError(f"expected global_pool 'avg', got {global_pool!r}")
    if num_classes == 0:
        return nn.Identity()
    classifier = nn.Linear(features, num_classes, device=like.device, dtype=like.dtype)
    init_weights(classifier)
    return classifier


def init_weights(module: nn.Module) -> None:
    """Fills a convolution or a linear layer: weight truncated normal of standard deviation .02, bias zero."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def stage_indices(indices: int | Sequence[int] | None, stages: int) -> set[int]:
    """Stages counted from 0: the last n, those named (negative from the end), or all for None."""
    if indices is None:
        return set(range(stages))
    if isinstance(indices, int):
        if not 0 < indices <= stages:
            raise ValueError(f"expected 1 to {stages} stages, got {indices}")
        return set(range(stages - indices, stages))
    if any(not -stages <= i < stages for i in indices):
        raise ValueError(f"expected stage indices from {-stages} to {stages - 1}, got {list(indices)}")
    return {i % stages for i in indices}


#: Arguments that classifiers share with the backbones of the same name.
PRESETS: dict[str, dict[str, Any]] = {
    "ffnet_1": {"depths": (2, 2, 8, 2), "dims": (80, 160, 320, 640), "channel_kernel": 3, "drop_path_rate": 0.1},
    "ffnet_2": {"depths": (3, 3, 15, 3), "dims": (88, 176, 352, 704), "drop_path_rate": 0.15},
    "ffnet_3": {
        "depths": (4, 4, 22, 5), "dims": (96, 192, 384, 768), "drop_path_rate": 0.35, "layer_scale_init": 1e-6
    },
    "ffnet_4": {
        "depths": (4, 4, 27, 3), "dims": (128, 256, 512, 1024), "drop_path_rate": 0.4, "layer_scale_init": 1e-6
    },
}  # fmt: skip
LARGE_CONFIG = {"crop_pct": 0.95}
CHECKED = "sizes, keys, folds, kernels, training"


@register_model(task="classification", published="81.3 % ImageNet-1K top-1", checked=CHECKED)
def ffnet_1(**kwargs: Any) -> FFNet:
    """FFNet-1: 13.7 M parameters, 3.0 G multiply–adds, 81.3 % ImageNet-1K top-1 as published."""
    return FFNet(**{**PRESETS["ffnet_1"], **kwargs})


@register_model(task="classification", published="82.9 % ImageNet-1K top-1", checked=CHECKED)
def ffnet_2(**kwargs: Any) -> FFNet:
    """FFNet-2: 26.9 M parameters, 6.0 G multiply–adds, 82.9 % ImageNet-1K top-1 as published."""
    return FFNet(**{**PRESETS["ffnet_2"], **kwargs})


@register_model(task="classification", published="83.9 % ImageNet-1K top-1", checked=CHECKED)
def ffnet_3(**kwargs: Any) -> FFNet:
    """FFNet-3: 48.3 M parameters, 10.1 G multiply–adds, 83.9 % ImageNet-1K top-1 as published."""
    return FFNet(**{**PRESETS["ffnet_3"], "config": LARGE_CONFIG, **kwargs})


@register_model(task="classification", published="85.3 % ImageNet-1K top-1 at 384²", checked=CHECKED)
def ffnet_4(**kwargs: Any) -> FFNet:
    """FFNet-4: 79.2 M parameters, 19.2 G multiply–adds; 43.1 G and 85.3 % ImageNet-1K top-1 at 384² as published."""
    return FFNet(**{**PRESETS["ffnet_4"], "config": LARGE_CONFIG, **kwargs})
