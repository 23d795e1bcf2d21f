"""What the examples write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["save"]


def save(folder: Path, name: str, model: nn.Module, result: dict[str, Any], figure: Any) -> None:
    """Writes ``name``.pth, .json and .png; says so."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": model.state_dict()}, folder / f"{name}.pth")
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    figure.savefig(folder / f"{name}.png", dpi=100)
    print(f"wrote {', '.join(f'{folder / name}.{end}' for end in ('pth', 'json', 'png'))}")
