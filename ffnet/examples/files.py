"""What examples write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..commands.common import new_file

__all__ = ["save"]


def save(folder: Path, name: str, model: nn.Module, result: dict[str, Any], figure: Any) -> None:
    """Writes ``name``.pth, .json and .png into a folder that is there; says so."""
    with new_file(folder / f"{name}.pth") as file:
        torch.save({"state_dict": model.state_dict()}, file)
    with new_file(folder / f"{name}.json") as file:
        file.write(f"{json.dumps(result, indent=2)}\n".encode())
    with new_file(folder / f"{name}.png") as file:
        figure.savefig(file, dpi=80, format="png")
    print(f"wrote {name}.pth, {name}.json and {name}.png to {folder}")
