"""Training in several processes: killed at any moment, sharded, and on another number of them."""

import os
import random
import time

import pytest
from train_testing import Workers, equal

KILLS = int(os.environ.get("TRAIN_TEST_KILLS", "3"))
DIGITS = ("digits", "--epochs", "2", "--batch", "128", "--workers", "0", "--checkpoint-every", "2", "--log-every", "5")


def run(world, *arguments):
    assert Workers(world, arguments).wait() == [0] * world


@pytest.mark.long
def test_killed_at_random_moments(tmp_path, request):
    """As many times as TRAIN_TEST_KILLS says: the same weights, bit for bit, as those of an undisturbed run."""
    begin = time.monotonic()
    run(2, *DIGITS, "--output", tmp_path / "whole")
    took = time.monotonic() - begin
    dice = random.Random(7)
    killed = 0
    for _ in range(100):
        ranks = Workers(2, [*DIGITS, "--output", tmp_path / "killed"])
        if killed == KILLS:
            assert ranks.wait() == [0, 0]
            break
        time.sleep(dice.uniform(0, took))
        killed += any(process.is_alive() for process in ranks.processes)
        ranks.kill()
    for name in ("last.pth", "best.pth"):
        assert equal(tmp_path / "whole" / name, tmp_path / "killed" / name)
