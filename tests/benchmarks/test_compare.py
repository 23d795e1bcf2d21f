"""What is called a change, on rows made up with known ones; and another commit beside this one: the processes and their
conversation, in which this tree stands for both commits."""

import argparse
import math
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.cases import GROWTH_FROM, LayerCase, ModelCase, TrainingCase, parameters, suite
from benchmarks.compare import AGAIN, BASE, CannotBuild, Comparison
from benchmarks.results import OURS, Measurement, Row

KINDS = ("layer", "model", "training")


def comparison(seed, factors=(), cases=30, drift=0.3, noise=0.01):
    """Of made-up times: a drift of all processes each round, noise of each sample, and as much again of each process in
    this case, as of where its memory lies; ours of case i times factors[i]."""
    generator = random.Random(seed)
    rows = []
    for case in range(cases):
        rounds = [math.exp(generator.gauss(0, drift)) for _ in range(11)]
        measurements = []
        for name in (OURS, BASE, AGAIN):
            factor = dict(factors).get(case, 1.0) if name == OURS else 1.0
            factor *= math.exp(generator.gauss(0, noise))
            samples = (factor * r * math.exp(generator.gauss(0, noise)) for r in rounds)
            measurements.append(Measurement(name, samples_ms=tuple(samples)))
        rows.append(Row(f"case {case}", 1, 1, tuple(measurements), {"kind": KINDS[case % 3], "dtype": "float32"}))
    return Comparison.of(rows)


def cases_of(changes):
    return [change.name for change in changes if change.name != change.group]


@pytest.mark.parametrize("seed", range(5))
def test_drift_and_noise_are_no_change(seed):
    found = comparison(seed)
    assert len(found.changes) == 30
    assert len(found.groups()) == 3
    assert not found.significant
    assert "0 of 30 cases and 0 of 3 groups changed" in compare.report(found)


@pytest.mark.parametrize("seed", range(5))
def test_a_fifth_more_time_is_found(seed):
    found = comparison(seed, factors=[(3, 1.2), (7, 1 / 1.2)])
    slower, faster = found.significant
    assert (slower.name, faster.name) == ("case 3", "case 7")
    assert slower.size == pytest.approx(math.log(1.2), abs=0.05)
    assert faster.size == pytest.approx(-math.log(1.2), abs=0.05)
    assert found.slower == [slower]
    lines = [line.split("|")[1].strip() for line in compare.report(found).splitlines() if "SLOWER" in line]
    assert lines == ["case 3"]


def test_all_cases_slower_at_once_are_found():
    found = comparison(0, factors=[(case, 1.2) for case in range(30)])
    assert len(cases_of(found.significant)) == 30
    assert [group.name for group in found.slower[-3:]] == [f"{kind} float32" for kind in KINDS]


def test_a_group_is_found_where_its_cases_drown():
    noise = 0.06
    found = comparison(1, factors=[(case, 1.2) for case in range(0, 30, 3)], noise=noise)
    assert found.limit > math.log(1.2) > found.group_limit
    assert [change.name for change in found.significant if change.name == change.group] == ["layer float32"]
    assert not comparison(1, noise=noise).significant
    assert comparison(1, cases=5).group_limit is None  # no group has enough cases


def test_groups_are_of_the_same_kernels():
    cases = [replace(base, batch=batch) for base in GROWTH_FROM.values() for batch in (1, 2)]
    names = {compare.group_of(Row(case.name, 1, 1, (), parameters(case))) for case in cases}
    assert names == {f"{operator} forward float32" for operator in GROWTH_FROM}
    others = (ModelCase("ffnet_1", 1), LayerCase("ffnet_1", "patch_embed", 3, 8, 1), TrainingCase("ffnet_1", 1))
    names = [compare.group_of(Row("case", 1, 1, (), parameters(case))) for case in others]
    assert names == ["model float32", "layer float32", "training float32"]


def test_a_noisy_machine_raises_the_limit():
    assert comparison(0, noise=0.001).limit == compare.LEAST_CHANGE
    assert comparison(0, noise=0.2).limit > 5 * compare.LEAST_CHANGE


def test_a_case_that_did_not_run_in_both_is_left_out():
    row = Row("case", 1, 1, (Measurement(OURS, samples_ms=(1.0,)), Measurement(BASE, reason="failed")))
    assert Comparison.of([row]) == Comparison([], [])


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
        row = compare.measured(CASE, {OURS: other, BASE: one, AGAIN: one}, 2, 60)
    assert row.case == CASE.name
    assert [m.contender for m in row.measurements] == [OURS, BASE, AGAIN]
    assert all(m.passed for m in row.measurements)
    assert [len(m.samples_ms) for m in row.measurements[:1]] == [2]
    found = Comparison.of([row])
    assert cases_of(found.changes) == [CASE.name]
    assert found.limit >= compare.LEAST_UNKNOWN  # one case tells little


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
