"""``python -m benchmarks COMMAND``: the kernel benchmark suite."""

from __future__ import annotations

import importlib
import sys

from . import options
from .memory import restart_with_plain_heap

#: What each command does, and the module whose ``main(arguments)`` runs it.
COMMANDS = {
    "demo": ("classify photographs with every way to run a model, and time them side by side", "demo"),
    "run": ("measure a suite, or operators on a shape of yours, beside baselines", "run"),
    "report": ("tables and charts of results", "report"),
    "memory": ("peak memory of whole models, each in a fresh process", "memory"),
    "timm": ("models of timm, plain and optimised, in both layouts", "timm_models"),
    "crossover": ("measure what PyTorch computes faster, for the chooser's table", "crossover"),
    "tables": ("write the tables of README and docs from the results of record, or check them", "tables"),
    "gpu": ("everything there is to check and measure on a GPU", "gpu"),
}


def main(argv: list[str] | None = None, program: str = f"python -m {__package__}") -> int:
    """Returns what the command returns; 2 for an unknown one."""
    options.program = program
    arguments = sys.argv[1:] if argv is None else argv
    usage = f"usage: {program} COMMAND [OPTION ...]\n\n" + "\n".join(
        f"  {name:9} {text}" for name, (text, _) in COMMANDS.items()
    )
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage)
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        print(usage, file=sys.stderr)
        return 2
    return importlib.import_module(f".{COMMANDS[arguments[0]][1]}", __package__).main(arguments[1:])


if __name__ == "__main__":
    restart_with_plain_heap()
    sys.exit(main())
