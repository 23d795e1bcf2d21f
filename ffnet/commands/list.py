"""``ffnet list``: the models."""

from __future__ import annotations

import argparse
from typing import Any

from ..folding import reparameterize
from ..profile import count_macs, count_parameters
from ..registry import create_model, list_models, model_entry

HEAD = ("model", "task", "parameters", "as trained", "input", "MACs", "published", "checked here")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("list", help="the models with their parameters and multiply-adds")
    parser.add_argument("--task", choices=sorted({model_entry(name).task for name in list_models()}))
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    rows = [HEAD, *(_row(name) for name in list_models(options.task))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    for row in rows:
        cells = (
            cell.rjust(width) if 2 <= i <= 5 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
    return 0


def _row(name: str) -> tuple[str, ...]:
    entry = model_entry(name)
    model = create_model(name, device="meta")
    fused = reparameterize(model, extra_folds=False)  # the form whose parameters are published
    size = model.config["input_size"]
    return (
        name,
        entry.task,
        f"{count_parameters(fused):,}",
        f"{count_parameters(model):,}",
        "x".join(map(str, reversed(size[1:]))),
        f"{count_macs(fused, size) / 1e9:.3f} G",
        entry.published,
        entry.checked,
    )
