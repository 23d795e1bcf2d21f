"""``ffnet train`` and ``ffnet eval``: errors that the user can fix are printed in one line, on each rank that meets
them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import torch
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

__all__ = ["main"]

MEMORY_HINT = (
    "out of memory: {error}. Take a larger --accumulate (same batch, less at a time), --amp bf16, "
    "--grad-checkpointing, --fsdp with more ranks, or a smaller --batch or --size"
)


def main(command: str, arguments: Sequence[str]) -> int:
    """Runs a command; returns 2, with one line on stderr, for an error that the user can fix."""
    from .checkpoints import DamagedCheckpoint

    try:
        return _COMMANDS[command](arguments)
    except (ValueError, OSError, ImportError, FloatingPointError, DamagedCheckpoint) as error:
        return _failed(command, error, str(error))
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            first = str(error).splitlines()[0]
            return _failed(command, error, MEMORY_HINT.format(error=first))
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # so that torchrun shows it as the cause
            get_error_handler().record_exception(error)
        raise


def _train(arguments: Sequence[str]) -> int:
    from .distributed import join_ranks
    from .loop import train
    from .options import parse_train

    options = parse_train(arguments)
    with join_ranks(options.device, options.timeout) as ranks:
        train(options, ranks)
    return 0


def _eval(arguments: Sequence[str]) -> int:
    from .evaluate import main as evaluate_main

    return evaluate_main(arguments)


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"train": _train, "eval": _eval}


def _failed(command: str, error: Exception, text: str) -> int:
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if many:
        get_error_handler().record_exception(error)
    rank = f"rank {os.environ.get('RANK', '0')}: " if many else ""
    text = "; ".join(line.strip() for line in text.splitlines())
    print(f"ffnet {command}: {rank}{text}", file=sys.stderr, flush=True)
    return 2
