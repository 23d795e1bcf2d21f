"""FFNet-1 to 4 as backbones for dense prediction: the maps of the four stages, each with its own norm.

State-dict keys are those of the classifiers without ``norm`` and ``head``, plus ``norm0`` to ``norm3``. Normalised maps
are only returned; the next stage reads the map without the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from .layers import LayerNorm2d
from .model import PRESETS, FFNetTrunk, init_weights, stage_indices
from .registry import register_model

__all__ = [
    "FFNetBackbone",
    "FeatureInfo",
    "ffnet_1_features",
    "ffnet_2_features",
    "ffnet_3_features",
    "ffnet_4_features",
]

#: Inputs of 512×512, as for UPerNet, normalised like ImageNet's.
DENSE_CONFIG = {"input_size": (3, 512, 512), "crop_pct": 1.0}
CHECKED = "keys, folds, kernels"


class FeatureInfo:
    """Describes the maps of a backbone, with the methods of timm's class of the same name.

    Args:
        info: For every stage: ``num_chs``, ``reduction`` (its stride) and ``module``.
        out_indices: The stages whose maps are returned.
    """

    def __init__(self, info: Sequence[dict[str, Any]], out_indices: Sequence[int]) -> None:
        self.info = [{**entry, "index": i} for i, entry in enumerate(info)]
        self.out_indices = tuple(out_indices)

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """A property of the stage ``idx``, of several stages, or by default of all whose maps are returned."""
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[i][key] for i in (self.out_indices if idx is None else idx)]

    def get_dicts(
        self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Several properties of the same stages, by default all properties."""

        def chosen(i: int) -> dict[str, Any]:
            return {key: self.info[i][key] for key in (keys or self.info[i])}

        return chosen(idx) if isinstance(idx, int) else [chosen(i) for i in (self.out_indices if idx is None else idx)]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("module", idx)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.info[item]

    def __len__(self) -> int:
        return len(self.info)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.info)


class FFNetBackbone(FFNetTrunk):
    """Maps of the stages, normed: [N, in_chans, H, W] → [N, dims[i], ⌈H/s⌉, ⌈W/s⌉] for s = 4, 8, 16, 32; any H and W.

    Args:
        depths, dims: As of `ffnet.model.FFNetTrunk`.
        out_indices: Stages whose maps are returned, first to last; n for the last n. The model ends with the last of
            them.
        norms: Whether each map gets a channels-first LayerNorm (eps 1e-6), ``norm0`` to ``norm3``.
        **trunk: Further arguments of `ffnet.model.FFNetTrunk`.

    Raises:
        ValueError: If an argument is out of range, with the value received.
    """

    feature_info: Any

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        *,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        norms: bool = True,
        **trunk: Any,
    ) -> None:
        super().__init__(depths, dims, **trunk)
        self.out_indices = tuple(sorted(stage_indices(out_indices, len(dims))))
        if not self.out_indices:
            raise ValueError(f"expected out_indices of one stage or more, got {out_indices}")
        self.norms = norms
        self.feature_info = FeatureInfo(self.feature_info, self.out_indices)
        del self.stages[self.out_indices[-1] + 1 :]
        if norms:
            for i in self.out_indices:
                norm = LayerNorm2d(dims[i], device=trunk.get("device"), dtype=trunk.get("dtype"))
                self.add_module(f"norm{i}", norm)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: Any = self.forward_intermediates(x, self.out_indices, norm=self.norms, intermediates_only=True)
        return maps

    def _stage_norm(self, stage: int) -> Callable[[Tensor], Tensor]:
        return self.get_submodule(f"norm{stage}")


def _backbone(name: str, kwargs: dict[str, Any]) -> FFNetBackbone:
    return FFNetBackbone(**{**PRESETS[name], "config": DENSE_CONFIG, **kwargs})


@register_model(task="features", published="-", checked="keys, folds, kernels, training, torchvision's detectors")
def ffnet_1_features(**kwargs: Any) -> FFNetBackbone:
    """FFNet-1 as a backbone; no score has been published."""
    return _backbone("ffnet_1", kwargs)


@register_model(task="features", published="51.8 / 44.9 box / mask AP, Cascade Mask R-CNN", checked=CHECKED)
def ffnet_2_features(**kwargs: Any) -> FFNetBackbone:
    """FFNet-2 as a backbone: 51.8 box and 44.9 mask AP on COCO with Cascade Mask R-CNN as published."""
    return _backbone("ffnet_2", kwargs)


@register_model(task="features", published="52.8 / 45.6 box / mask AP, Cascade Mask R-CNN", checked=CHECKED)
def ffnet_3_features(**kwargs: Any) -> FFNetBackbone:
    """FFNet-3 as a backbone: 52.8 box and 45.6 mask AP on COCO with Cascade Mask R-CNN as published."""
    return _backbone("ffnet_3", kwargs)


@register_model(task="features", published="53.4 / 45.9 box / mask AP, Cascade Mask R-CNN", checked=CHECKED)
def ffnet_4_features(**kwargs: Any) -> FFNetBackbone:
    """FFNet-4 as a backbone: 53.4 box and 45.9 mask AP on COCO with Cascade Mask R-CNN as published."""
    return _backbone("ffnet_4", kwargs)
