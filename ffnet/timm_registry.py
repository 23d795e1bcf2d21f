"""FFNet under ``timm.create_model``.

``import ffnet`` registers the models if timm is already imported, and otherwise installs a one-shot import hook that
registers them once timm is imported. So both import orders work, and ``import ffnet`` alone never imports timm.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn

from .registry import create_model, list_models

__all__ = ["register_timm"]


def register_timm() -> None:
    """Registers every classifier of `ffnet.list_models` with timm, which it imports; may be called repeatedly.

    ``timm.create_model(name, features_only=True, out_indices=…)`` returns the backbone ``<name>_features``.
    """
    from timm.models import register_model

    for name in list_models("classification"):
        register_model(_entrypoint(name))


def _entrypoint(name: str) -> Any:
    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Mapping[str, Any] | None = None,
        cache_dir: Any = None,
        features_only: bool = False,
        **kwargs: Any,
    ) -> nn.Module:
        if pretrained or pretrained_cfg:
            raise RuntimeError(f"no weights of {name} are registered with timm; use ffnet.load_checkpoint")
        model = create_model(f"{name}_features" if features_only else name, **kwargs)
        # Read by timm.data.resolve_model_data_config.
        model.pretrained_cfg = model.default_cfg = {
            **model.config,
            "architecture": name,
            **(pretrained_cfg_overlay or {}),
        }
        return model

    build.__name__ = build.__qualname__ = name
    build.__module__ = __package__  # timm lists the models under their module's name
    return build


class TimmHook(importlib.abc.MetaPathFinder):
    """Import hook: lets timm be found as usual, then registers the models once it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        finders = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in finders)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            register_timm()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Registers now if timm is already imported, otherwise as soon as it is."""
    if sys.modules.get("timm") is not None:
        register_timm()
    else:
        sys.meta_path.insert(0, TimmHook())
