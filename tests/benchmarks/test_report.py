"""How time is said to grow, on rows whose growth is known; and the goals, their table, and memory's."""

import json
from dataclasses import replace

import pytest

from benchmarks import goals, memory
from benchmarks.cases import (
    GROWTH_FROM,
    LARGE_FILTERS,
    STAGE_DIMS,
    ModelCase,
    OperatorCase,
    TrainingCase,
    parameters,
    suite,
)
from benchmarks.contenders import CONTENDERS, EAGER, EAGER_NCHW
from benchmarks.goals import Goal, goal
from benchmarks.report import DIMENSIONS, fit, growth_table, main, series
from benchmarks.results import OURS, Measurement, Result, Row


def test_exponents():
    assert fit([(x, 3 * x**1.7) for x in (2, 5, 40)]) == (pytest.approx(1.7), pytest.approx(0))
    exponent, deviation = fit([(1, 1.0), (2, 2.2), (4, 4.0)])
    assert exponent == pytest.approx(1)
    assert 0.05 < deviation < 0.1


def test_growth_is_found_in_rows():
    cases = suite("growth", quick=True)
    rows = []
    for case in reversed(cases):
        ours = Measurement(OURS, samples_ms=(float(case.batch * case.size),))
        rows.append(Row(case.name, case.flops, 1, (ours,), parameters(case)))
    found = {(one.operator, one.dimension): one for one in series(rows)}
    assert found.keys() == {(operator, name) for operator in GROWTH_FROM for name in DIMENSIONS}
    pixels = found["channel_mixer", "size"]
    assert pixels.values == [64, 1024, 4096]
    assert fit(pixels.times(OURS))[0] == pytest.approx(0.5)
    assert growth_table(rows).count("\n| ") == 1 + 12
    assert growth_table(rows[:2]) == ""
    assert growth_table([replace(row, parameters={}) for row in rows]) == ""


CASE = OperatorCase("depthwise_conv2d", 8, 320, 16, 7)
MACHINE = {
    **dict.fromkeys(("processor", "isa", "torch", "python", "ffnet_kernels", "commit"), "x"), "threads": 2
}  # fmt: skip


def row(case=CASE, passed=True, **milliseconds):
    names = {"eager": "eager channels-last", "nchw": "eager nchw"}
    return Row(
        case.name, 10**6, 10**6,
        tuple(Measurement(names.get(n, n), samples_ms=(ms,), passed=passed) for n, ms in milliseconds.items()),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (CASE, Goal(1.4, 1.8)),
        (OperatorCase("ffnified_attention", 1, 80, 64, 3), Goal(1.5, 2)),
        (OperatorCase("ffnified_attention", 1, 80, 64, 3, dtype="bfloat16"), Goal(2, 3)),
        (OperatorCase("ffnified_attention", 1, 80, 64, 3, direction="backward"), Goal(6, 15, EAGER)),
        (OperatorCase("channel_mixer", 1, 96, 64, 7), Goal(1.1, None)),
        (OperatorCase("channel_mixer", 1, 160, 32, 3, dtype="bfloat16"), Goal(1.1, None)),
        (OperatorCase("channel_mixer", 1, 160, 32, 3, direction="backward"), None),
        (OperatorCase("depthwise_conv2d", 1, *LARGE_FILTERS[0], direction="backward"), Goal(10, 40)),
        (ModelCase("ffnet_1", 1), Goal(1.05, 1.12)),
        (ModelCase("ffnet_1", 1, dtype="bfloat16"), Goal(1.2, 1.35)),
        (TrainingCase("ffnet_1", 4), Goal(1.6, 2.2, EAGER)),
        (TrainingCase("ffnet_1", 4, autocast=True), Goal(1.5, None)),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else "",
)
def test_goals(case, expected):
    assert goal(case) == expected


def test_the_suite_covers_what_goals_are_about():
    cases = suite("record")
    assert all(goal(case) for case in cases)
    stages = {
        (c.operator, c.batch, c.channels, c.dtype, c.direction)
        for c in cases
        if isinstance(c, OperatorCase) and c.kernel <= 7
    }
    channels = {dim for dims in STAGE_DIMS.values() for dim in dims}
    kinds = {("depthwise_conv2d", "forward"), ("ffnified_attention", "forward"), ("channel_mixer", "forward")}
    kinds |= {("depthwise_conv2d", "backward"), ("ffnified_attention", "backward")}
    assert stages == {
        (op, b, c, d, way) for op, way in kinds for b in (1, 8) for c in channels for d in ("float32", "bfloat16")
    }
    assert {name for case in cases for name in goals.baselines(case)} <= set(CONTENDERS)


def test_the_best_baseline_is_the_fastest_or_the_one_named():
    measured = row(ours=1.0, nchw=2.0, eager=3.0)
    assert measured.best_baseline() == EAGER_NCHW
    assert measured.best_baseline(EAGER) == EAGER
    assert row(ours=1.0).best_baseline() is row(ours=1.0, nchw=2.0).best_baseline(EAGER) is None


def test_report():
    backward = OperatorCase("depthwise_conv2d", 8, 320, 16, 7, direction="backward")
    result = Result(MACHINE, [row(ours=1.0, eager=1.5, nchw=2.0), row(backward, passed=False, ours=1.0, eager=20.0)])
    lines = [line.split("|") for line in goals.report(result).splitlines() if line.startswith("| depthwise")]
    forward, back, *sums = [[cell.strip() for cell in line[1:-1]] for line in lines]
    assert forward[3:6] == ["eager channels-last", "1.500", "1.50x"]
    assert forward[8:] == ["1.4x", "holds", "1.8x", "no"]
    assert back[3:6] == ["eager channels-last *", "20.000", "20.00x"]
    assert back[8:] == ["6x", "holds", "15x", "holds"]
    assert sums == [
        ["depthwise_conv2d forward float32", "1 of 1", "0 of 1", *["1.50x"] * 3],
        ["depthwise_conv2d backward float32", "1 of 1", "1 of 1", *["20.00x"] * 3],
    ]
    text = goals.report(result)
    assert f"{backward.name}: ours has an error of nan, over the limit" in text
    assert f"{len(suite('record')) - 2} of {len(suite('record'))} cases of the suite are not in these results" in text


def test_parts_are_merged(tmp_path, capsys):
    parts = [tmp_path / "1.json", tmp_path / "2.json"]
    other = ModelCase("ffnet_1", 1)
    machine = {**MACHINE, "runtimes": {"openvino": "1"}}
    for path, measured in zip(parts, (row(ours=1.0, eager=2.0), row(other, ours=1.0, openvino=1.1)), strict=True):
        path.write_text(Result(machine, [measured]).to_json())
    assert main(["--goals", *map(str, parts), "--json", str(tmp_path / "all.json")]) == 0
    assert "openvino" in capsys.readouterr().out
    assert [r["case"] for r in json.loads((tmp_path / "all.json").read_text())["rows"]] == [CASE.name, other.name]
    assert main([str(tmp_path / "none.json")]) == 2


def test_memory_table():
    mib = memory.MIB
    rows = [
        {"case": "c", "contender": OURS, "before": 10 * mib, "peak": 30 * mib},
        {"case": "c", "contender": "eager", "before": 10 * mib, "peak": 50 * mib},
        {"case": "c", "contender": "other", "error": "no such thing"},
    ]
    ours, eager, other = memory.table(rows).splitlines()[2:]
    assert ours.split("|")[5:7] == ["        20 ", "        1.00x "]
    assert "2.00x" in eager
    assert "no such thing" in other


def test_peak_memory_of_this_process():
    try:
        memory.reset_peak()
    except memory.MemoryUnknown as reason:
        pytest.skip(str(reason))
    before = memory.resident("VmRSS")
    block = bytearray(b"x" * (64 * memory.MIB))
    del block
    assert memory.resident("VmHWM") - before > 60 * memory.MIB
    assert memory.peak_during(lambda: bytearray(b"x" * (64 * memory.MIB))) > 60 * memory.MIB
    assert memory.peak_during(lambda: None) < memory.MIB
    with pytest.raises(memory.MemoryUnknown):
        memory.resident("NoSuchField")
