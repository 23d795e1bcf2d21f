"""``ffnet list``: the models."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

from ..folding import reparameterize
from ..profile import count_macs, count_parameters
from ..registry import create_model, list_models, model_entry

HEAD = ("model", "task", "parameters", "as trained", "input", "MACs", "published", "checked here")
NUMBERS = 11  # characters of the columns of numbers
#: What has no name of its own.
OTHERS = """\
Self-attention in some blocks: token_mixers=… of ffnet.create_model. Blocks on voxels: ffnet.voxels.VoxelBlock.
Scores are the paper's, for weights that are not part of this package; "checked here" is what the tests check."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("list", help="the models with their parameters and multiply-adds")
    parser.add_argument("--task", choices=sorted({model_entry(name).task for name in list_models()}))
    parser.add_argument(
        "--markdown", action="store_true", help="as a table of Markdown, such as that of docs/models.md"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    names = list_models(options.task)
    if options.markdown:
        print(f"| {' | '.join(HEAD)} |\n|{''.join('---|' if i in (0, 1, 6, 7) else '--:|' for i in range(len(HEAD)))}")
        for row in map(_row, names):
            print(f"| `{row[0]}` | {' | '.join(row[1:])} |", flush=True)
        return 0
    known = [HEAD, *((name, entry.task, *[""] * 4, entry.published) for name in names for entry in [model_entry(name)])]
    widths = {i: max(len(row[i]) for row in known) for i in (0, 1, 6)}
    for row in itertools.chain([HEAD], map(_row, names)):
        cells = (cell.ljust(widths[i]) if i in widths else cell.rjust(NUMBERS) for i, cell in enumerate(row[:-1]))
        print("  ".join((*cells, row[-1])).rstrip(), flush=True)
    if options.task is None:
        print(f"\n{OTHERS}")
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
        "x".join(map(str, reversed(size[-2:]))),
        f"{count_macs(fused, size) / 1e9:.3f} G",
        entry.published,
        entry.checked,
    )
