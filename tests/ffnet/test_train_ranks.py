"""Training in several processes: killed at any moment, sharded, on another number of them, and when one dies."""

import json
import os
import random
import subprocess
import sys
import time

import pytest
import torch
from train_testing import PLAIN, Workers, equal, make_images

from ffnet.train.models import build_model

KILLS = int(os.environ.get("TRAIN_TEST_KILLS", "2"))
DIGITS = ("digits", "--epochs", "2", "--batch", "128", "--workers", "0", "--checkpoint-every", "2", "--log-every", "5")
SMALL = ("--model", "ffnet_tiny", "--batch", "6", "--lr", "1e-3", "--workers", "0", "--log-every", "1", *PLAIN)

pytestmark = pytest.mark.long


def run(world, *arguments):
    assert Workers(world, arguments).wait() == [0] * world


@pytest.fixture(scope="module")
def imported():
    """The process that others are forked from has imported what they need."""
    Workers(1, ["--help"]).wait()


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


def flat(weights):
    return torch.cat([value.flatten() for value in weights.values() if value.is_floating_point()])


def loss(folder):
    """Of every step."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_killed_at_random_moments(tmp_path, imported):
    """As many times as TRAIN_TEST_KILLS says: the same weights, bit for bit, as those of an undisturbed run."""
    begin = time.monotonic()
    run(2, *DIGITS, "--output", tmp_path / "whole")
    took = time.monotonic() - begin
    dice, folders, killed = random.Random(7), [tmp_path / "killed0"], 0
    while killed < KILLS:
        ranks = Workers(2, [*DIGITS, "--output", folders[-1]])
        if ranks.wait(dice.uniform(0, took)) == [0, 0]:  # this one got to its end: another one
            folders.append(tmp_path / f"killed{len(folders)}")
        else:
            ranks.kill()
            killed += 1
    run(2, *DIGITS, "--output", folders[-1])
    for folder in folders:
        for name in ("last.pth", "best.pth"):
            assert equal(tmp_path / "whole" / name, folder / name)


def test_sharded_as_replicated_and_on_another_number_of_processes(tmp_path, images, imported):
    """FSDP2 trains as DDP does; what either wrote, another number of processes reads, bit for bit."""
    # Plain modules in all: their rounding is the same.
    options = (images, *SMALL, "--epochs", "1", "--clip", "1", "--no-optimize")
    runs = {"replicated": (2, []), "sharded": (2, ["--fsdp"]), "alone": (1, [])}
    for name, (world, more) in runs.items():
        run(world, *options, *more, "--output", tmp_path / name)
    replicated, sharded = (torch.load(tmp_path / n / "last.pth", weights_only=True) for n in ("replicated", "sharded"))
    torch.manual_seed(0)
    start = build_model("ffnet_tiny", 3).state_dict()
    for part in ("state_dict", "state_dict_ema"):
        assert replicated[part].keys() == sharded[part].keys() == start.keys()
        first, own, other = (flat(weights) for weights in (start, replicated[part], sharded[part]))
        # Biases before a norm have no gradient but rounding, which Adam takes for one: single weights may differ.
        assert (own - other).norm() < 1e-3 * (own - first).norm()
    losses = [loss(tmp_path / name) for name in ("replicated", "sharded")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    for name, world, more in (("sharded", 1, []), ("alone", 2, ["--fsdp"])):
        folder = tmp_path / name
        (folder / "last.pth").rename(folder / "before.pth")
        run(world, *options, *more, "--output", folder)  # nothing is left to do but to write what was read
        assert equal(folder / "before.pth", folder / "last.pth")


def torchrun(root, tmp_path, code, *arguments, restarts=0):
    """Two ranks that first run some code of the test's."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys, torch\ntorch.set_num_threads(1)\n{code}\nfrom ffnet.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts)]
    command += [str(script), "train", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_a_rank_that_dies_ends_the_others_with_its_error(root, tmp_path, images):
    code = """
from ffnet.train.sources import Folder
read, count = Folder.image, [0]
def image(self, index):
    count[0] += 1
    if os.environ["RANK"] == "1" and count[0] == 20:
        raise RuntimeError("the disk of rank 1 is gone")
    return read(self, index)
Folder.image = image
"""
    result = torchrun(root, tmp_path, code, images, *SMALL, "--epochs", "20", "--output", tmp_path / "run")
    assert result.returncode != 0
    assert "the disk of rank 1 is gone" in result.stderr
    assert "rank      : 1" in result.stderr  # what torchrun calls the root cause


def test_torchrun_starts_a_killed_run_again(root, tmp_path, images):
    code = f"""
import signal
from pathlib import Path
from ffnet.train.sources import Folder
read, count, marker = Folder.image, [0], Path({str(tmp_path)!r}) / "killed"
def image(self, index):
    count[0] += 1
    if os.environ["RANK"] == "1" and count[0] == 20 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, index)
Folder.image = image
"""
    options = (images, *SMALL, "--epochs", "2", "--checkpoint-every", "1")
    result = torchrun(root, tmp_path, code, *options, "--output", tmp_path / "run", restarts=1)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "killed").exists()
    assert "goes on from step" in result.stdout
    run(2, *options, "--output", tmp_path / "whole")
    assert equal(tmp_path / "whole" / "last.pth", tmp_path / "run" / "last.pth")
