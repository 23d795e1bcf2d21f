"""``ffnet COMMAND``, or ``python -m ffnet COMMAND``."""

from __future__ import annotations

import argparse
import sys

from ffnet_kernels import suite

from .commands import classify, export, forecast, profile, segment, upscale
from .commands import list as list_models
from .commands.common import CommandError

COMMANDS = (
    list_models,
    classify,
    segment,
    upscale,
    forecast,
    export,
    profile,
)


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 with one line on stderr where the options ask for something that is not there."""
    arguments = sys.argv[1:] if argv is None else argv
    return suite.interruptible("ffnet", lambda: _run(arguments, may_restart=argv is None))


def _run(arguments: list[str], may_restart: bool) -> int:
    if arguments[:1] == ["demo"]:
        return suite.run("ffnet demo", arguments, may_restart=may_restart)
    if arguments[:1] in (["train"], ["eval"]):
        return _train_or_eval(arguments)
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except CommandError as error:
        print(f"ffnet {options.command}: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):  # PyTorch's words
            raise
        hint = next((f"; a smaller --{name} needs less" for name in ("tile", "size") if hasattr(options, name)), "")
        print(f"ffnet {options.command}: not enough memory{hint}", file=sys.stderr)
        return 2


def _train_or_eval(arguments: list[str]) -> int:
    try:
        from .train.cli import main as train_main

        return train_main(arguments[0], arguments[1:])
    except ModuleNotFoundError as error:
        print(
            f"ffnet {arguments[0]}: {error} (pip install 'ffnet-kernels[train]' brings what it needs)", file=sys.stderr
        )
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ffnet", description="FFNet models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    commands.add_parser("demo", help="classify photographs with every way to run a model, and time them side by side")
    commands.add_parser("train", help="train a classifier, on one process or under torchrun (train --help)")
    commands.add_parser("eval", help="accuracy, confusion and speed of a checkpoint (eval --help)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
