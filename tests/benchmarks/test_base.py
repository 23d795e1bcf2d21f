"""Another commit beside this one: the processes and their conversation. This tree stands for both commits."""

import argparse
import os
from pathlib import Path

import pytest

from benchmarks import base, compare
from benchmarks.base import CannotBuild
from benchmarks.peers import OURS
from benchmarks.suites import suite

OPTIONS = argparse.Namespace(suite=("ops",), quick=True, threads=1)
CASE = suite("ops", "depthwise_conv2d 640x8x8 k7 b1", quick=True)[0]


@pytest.fixture
def place(tmp_path):
    for name in (*base.PACKAGES, "benchmarks"):
        (tmp_path / name).symlink_to(base.ROOT / name, target_is_directory=True)
    return tmp_path


@pytest.fixture(autouse=True)
def foreign_variables(monkeypatch):
    """None of these may reach a worker: they would lead it elsewhere."""
    monkeypatch.setenv("FFNET_KERNELS_LIBRARY_DIR", "/nowhere")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")


def test_workers_take_samples_by_turns(place):
    with base.worker(place, OPTIONS) as one, base.worker(base.ROOT, OPTIONS) as other:
        assert one("machine")["environment"] == {}
        row = base.measured(CASE, {OURS: other, base.BASE: one, base.AGAIN: one}, 2, 60)
    assert row.case == CASE.name
    assert [m.contender for m in row.measurements] == [OURS, base.BASE, base.AGAIN]
    assert all(m.passed for m in row.measurements)
    assert [len(m.samples_ms) for m in row.measurements[:1]] == [2]
    (change,) = compare.within([row], base.BASE, base.AGAIN).changes
    assert change.case == CASE.name
    assert compare.within([row], base.BASE, base.AGAIN).limit >= compare.LEAST_UNKNOWN  # one case tells little


def test_a_worker_that_imports_from_elsewhere_is_refused(place, tmp_path):
    (place / "ffnet_kernels").unlink()
    (place / "ffnet_kernels").mkdir()  # an empty package: Python goes on to the installed one, or to none
    with pytest.raises(CannotBuild), base.worker(place, OPTIONS):
        pass


def test_no_other_repository_is_built(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "ROOT", tmp_path)
    with pytest.raises(CannotBuild, match="ls-files"):
        base.prepare("HEAD")
    assert not os.listdir(tmp_path)
    assert Path(base.__file__).exists()
