"""Helpers of the tests of training: small data, and runs in processes of their own."""

import multiprocessing
import os
import socket
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ffnet.train.options import parse_train

PLAIN = ("--rand-augment", "0", "--mixup", "0", "--cutmix", "0", "--erasing", "0", "--crop", "0.9", "--drop-path", "0")


def make_images(root: Path, classes=("ape", "bee", "cow"), each=8, seed=0, **parts) -> Path:
    """Folders of classes in ``train`` and ``val``, of pictures that a mean colour tells apart."""
    generator = np.random.default_rng(seed)
    for part in parts or {"train": None, "val": None}:
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(each):
                pixels = generator.integers(0, 100, (20, 24, 3), dtype=np.uint8)
                pixels[..., label % 3] += 120
                Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return root


def options(data, output, *more):
    """Of a run of ffnet_tiny on small data; later options win."""
    small = ("--model", "ffnet_tiny", "--batch", "6", "--epochs", "2", "--lr", "1e-3", "--workers", "0")
    given = [*small, "--log-every", "1", *PLAIN, *map(str, more)]
    return parse_train([str(data), "--output", str(output), *given])


def equal(one: Path, other: Path) -> bool:
    """Whether two files of weights hold the same, bit for bit."""
    first, second = (torch.load(path, weights_only=True) for path in (one, other))
    assert first.keys() == second.keys()
    return all(
        torch.equal(value, second[part][name])
        for part in ("state_dict", "state_dict_ema")
        if part in first
        for name, value in first[part].items()
    )


class Workers:
    """Ranks of a run as processes that are forked from one that has imported everything, so that they start at once."""

    def __init__(self, world: int, arguments) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ffnet.train.loop", "ffnet.train.cli", "sklearn.datasets", "train_testing"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [
            context.Process(target=_run, args=(r, world, port, [str(a) for a in arguments])) for r in range(world)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout=None) -> list:
        """Exit codes after so many seconds, or when all have ended; None for what still runs."""
        end = None if timeout is None else time.monotonic() + timeout
        for process in self.processes:
            process.join(None if end is None else max(end - time.monotonic(), 0))
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        self.wait()


def _run(rank: int, world: int, port: int, arguments: list) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    from ffnet.train.cli import main

    raise SystemExit(main("train", arguments))
