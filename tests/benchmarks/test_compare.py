"""What is called a change, on results made up with known ones; and another commit beside this one: the processes and
their conversation, in which this tree stands for both commits."""

import argparse
import math
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.cases import GROWTH_FROM, LayerCase, ModelCase, TrainingCase, parameters, suite
from benchmarks.compare import CannotBuild, Change, Group, NotComparable
from benchmarks.contenders import OURS
from benchmarks.results import Measurement, Result, Row

MACHINE = dict.fromkeys(("processor", "threads", "isa", "torch", "python", "ffnet_kernels", "commit", "runtimes"), "x")
PEERS = ("eager nchw", "eager channels-last", "torch.compile")


def result(seed, factors=(), cases=30, drift=0.3, noise=0.01, peers=PEERS):
    """Made-up times: a drift of all contenders each round, noise of each sample, and as much again of each contender
    in this run of the case, as of where its memory lies; ours of case i times factors[i]."""
    generator = random.Random(seed)
    rows = []
    for case in range(cases):
        rounds = [math.exp(generator.gauss(0, drift)) for _ in range(11)]
        measurements = []
        for number, name in enumerate((OURS, *peers)):
            factor = dict(factors).get(case, 1.0) if name == OURS else 1.0
            factor *= math.exp(generator.gauss(0, noise))
            samples = (factor * (1 + number) * r * math.exp(generator.gauss(0, noise)) for r in rounds)
            measurements.append(Measurement(name, samples_ms=tuple(samples)))
        kind = {"kind": ("layer", "model")[case % 2], "dtype": "float32"}
        rows.append(Row(f"case {case}", 1, 1, tuple(measurements), kind))
    return Result(dict(MACHINE), rows)


@pytest.mark.parametrize("seed", range(5))
def test_drift_and_noise_are_no_change(seed):
    comparison = compare.compare(result(seed), result(100 + seed))
    assert len(comparison.changes) == 30
    assert len(comparison.groups()) == 2
    assert not comparison.significant


def cases_of(changes):
    return [change.case for change in changes if isinstance(change, Change)]


@pytest.mark.parametrize("seed", range(5))
def test_a_fifth_more_time_is_found(seed):
    comparison = compare.compare(result(seed), result(100 + seed, factors=[(3, 1.2), (7, 1 / 1.2)]))
    slower, faster = comparison.significant
    assert (slower.case, faster.case) == ("case 3", "case 7")
    assert slower.size == pytest.approx(math.log(1.2), abs=0.05)
    assert faster.size == pytest.approx(-math.log(1.2), abs=0.05)


def test_all_cases_slower_at_once_are_found():
    """The baselines are what is compared with: a change of every case is no drift of the machine."""
    comparison = compare.compare(result(0), result(1, factors=[(case, 1.2) for case in range(30)]))
    assert len(cases_of(comparison.significant)) == 30
    assert [group.name for group in comparison.slower[-2:]] == ["layer float32", "model float32"]


def test_a_group_is_found_where_its_cases_drown():
    noise = 0.06
    slower = result(1, factors=[(case, 1.2) for case in range(0, 30, 2)], noise=noise)
    comparison = compare.compare(result(0, noise=noise), slower)
    assert comparison.limit > math.log(1.2) > comparison.group_limit
    assert [group.name for group in comparison.significant if isinstance(group, Group)] == ["layer float32"]
    assert not compare.compare(result(0, noise=noise), result(1, noise=noise)).significant
    few_peers = [made(seed, noise=noise, peers=PEERS[:2]) for made, seed in ((result, 0), (result, 1))]
    assert compare.compare(*few_peers).group_limit is None  # two false changes of the group say too little


def test_groups_are_of_the_same_kernels():
    cases = [replace(base, batch=batch) for base in GROWTH_FROM.values() for batch in (1, 2)]
    names = {compare.group_of(Row(case.name, 1, 1, (), parameters(case))) for case in cases}
    assert names == {f"{operator} forward float32" for operator in GROWTH_FROM}
    others = (ModelCase("ffnet_1", 1), LayerCase("ffnet_1", "patch_embed", 3, 8, 1), TrainingCase("ffnet_1", 1))
    names = [compare.group_of(Row("case", 1, 1, (), parameters(case))) for case in others]
    assert names == ["model float32", "layer float32", "training float32"]


def test_a_noisy_machine_raises_the_limit():
    quiet, noisy = (compare.compare(result(0, noise=n), result(1, noise=n)).limit for n in (0.001, 0.2))
    assert quiet == compare.LEAST_CHANGE
    assert noisy > 5 * quiet


def test_side_by_side_with_itself():
    """As `run --base` does: the former code runs twice, and what differs between those two is noise."""
    names = (OURS, "base", "base again")
    rows = result(0, factors=[(3, 1.2)], peers=names[1:]).rows
    rows = [  # the made-up contenders take 1, 2 and 3 times as long
        replace(row, measurements=tuple(replace(m, samples_ms=tuple(s / k for s in m.samples_ms)) for k, m in
                                        enumerate(row.measurements, 1)))
        for row in rows
    ]  # fmt: skip
    comparison = compare.within(rows, *names[1:])
    assert cases_of(comparison.significant) == ["case 3"]
    assert "SLOWER" in compare.report(comparison)


def test_what_cannot_be_compared():
    other = result(1)
    other.machine["threads"] = "y"
    with pytest.raises(NotComparable, match="threads is 'x' and 'y'"):
        compare.compare(result(0), other)
    with pytest.raises(NotComparable, match="only 0 measurements of baselines"):
        compare.compare(result(0, peers=PEERS[:1]), result(1, peers=PEERS[:1]))
    fewer = result(1)
    del fewer.rows[4]
    assert compare.compare(result(0), fewer).left_out == ["case 4"]


def test_the_command(tmp_path, capsys):
    paths = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    for path, made in zip(paths, (result(0), result(1), result(2, factors=[(3, 1.3)])), strict=True):
        path.write_text(made.to_json())
    a, b, c = map(str, paths)
    assert compare.main([a, b]) == 0
    assert "0 of 30 cases and 0 of 2 groups changed" in capsys.readouterr().out
    assert compare.main([a, c]) == 1
    text = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in text.splitlines() if "SLOWER" in line] == ["case 3"]
    assert compare.main([c, a]) == 0  # faster is not worse
    assert compare.main([a, str(tmp_path / "none.json")]) == 2


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
