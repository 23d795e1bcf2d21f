"""``ffnet list | demo``, or ``python -m ffnet``."""

from __future__ import annotations

import argparse
import sys

from ffnet_kernels import suite

from . import count_macs, count_parameters, create_model, list_models, reparameterize
from .registry import model_entry


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 with one line on stderr where the options ask for something that is not there."""
    arguments = sys.argv[1:] if argv is None else argv
    return suite.interruptible("ffnet", lambda: _run(arguments, may_restart=argv is None))


def _run(arguments: list[str], may_restart: bool) -> int:
    if arguments[:1] == ["demo"]:
        return suite.run("ffnet demo", arguments, may_restart=may_restart)
    _parser().parse_args(arguments)
    _list()
    return 0


def _list() -> None:
    print(f"{'model':10}{'task':>16}{'parameters':>14}{'as trained':>14}{'input':>10}{'MACs':>12}  published")
    for name in list_models():
        entry = model_entry(name)
        model = create_model(name, device="meta")
        fused = reparameterize(model, extra_folds=False)  # the form whose parameters are published
        size = model.config["input_size"]
        print(
            f"{name:10}{entry.task:>16}{count_parameters(fused):14,}{count_parameters(model):14,}"
            f"{size[-1]:>6}x{size[-2]}{count_macs(fused, size) / 1e9:10.3f} G  {entry.published}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ffnet", description="FFNet image classifiers.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the models with their parameters and multiply-adds")
    commands.add_parser("demo", help="classify photographs with every way to run a model, and time them side by side")
    return parser


if __name__ == "__main__":
    sys.exit(main())
