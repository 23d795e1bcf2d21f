"""Another commit beside this one: the processes and their conversation. This tree stands for both commits."""

import argparse
import os
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.cases import suite
from benchmarks.compare import CannotBuild
from benchmarks.contenders import OURS

OPTIONS = argparse.Namespace(suite=("ops",), quick=True, threads=1)
CASE = suite("ops", "depthwise_conv2d 640x8x8 k7 b1", quick=True)[0]


@pytest.fixture
def place(tmp_path):
    for name in (*compare.PACKAGES, "benchmarks"):
        (tmp_path / name).symlink_to(compare.ROOT / name, target_is_directory=True)
    return tmp_path


@pytest.fixture(autouse=True)
def foreign_variables(monkeypatch):
    """None of these may reach a worker: they would lead it elsewhere."""
    monkeypatch.setenv("FFNET_KERNELS_LIBRARY_DIR", "/nowhere")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")


def test_workers_take_samples_by_turns(place):
    with compare.worker(place, OPTIONS) as one, compare.worker(compare.ROOT, OPTIONS) as other:
        assert one("machine")["environment"] == {}
        row = compare.measured(CASE, {OURS: other, compare.BASE: one, compare.AGAIN: one}, 2, 60)
    assert row.case == CASE.name
    assert [m.contender for m in row.measurements] == [OURS, compare.BASE, compare.AGAIN]
    assert all(m.passed for m in row.measurements)
    assert [len(m.samples_ms) for m in row.measurements[:1]] == [2]
    (change,) = compare.within([row], compare.BASE, compare.AGAIN).changes
    assert change.case == CASE.name
    assert compare.within([row], compare.BASE, compare.AGAIN).limit >= compare.LEAST_UNKNOWN  # one case tells little


def test_a_worker_that_imports_from_elsewhere_is_refused(place, tmp_path):
    (place / "ffnet_kernels").unlink()
    (place / "ffnet_kernels").mkdir()  # an empty package: Python goes on to the installed one, or to none
    with pytest.raises(CannotBuild), compare.worker(place, OPTIONS):
        pass


def test_no_other_repository_is_built(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    with pytest.raises(CannotBuild, match="ls-files"):
        compare.prepare_base("HEAD")
    assert not os.listdir(tmp_path)
    assert Path(compare.__file__).exists()
