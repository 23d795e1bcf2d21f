"""``ffnet-kernels bench --shape``: operators on maps of the user's own."""

import json

import pytest

from benchmarks import cases as own_shape
from benchmarks import runner
from benchmarks.__main__ import main
from benchmarks.cases import OperatorCase, parameters, suite
from benchmarks.contenders import OURS
from benchmarks.report import growth_table
from benchmarks.results import Measurement, Roofs, Row
from benchmarks.work import build
from ffnet_kernels.__main__ import main as ffnet_kernels


@pytest.fixture(autouse=True)
def known_roofs(monkeypatch):
    monkeypatch.setattr(runner, "measure_roofs", lambda: Roofs({"float32": 100.0}, ((2**16, 50.0),)))


def names(capsys, *options):
    assert main(["run", *options, "--list"]) == 0
    return capsys.readouterr().out.splitlines()


def test_one_command_makes_table_and_chart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["bench", "--shape", "32x6x10", "--kernel", "5", "--peers", "eager nchw", "--samples", "2"]
    assert ffnet_kernels(command) == 0
    text = capsys.readouterr().out
    for operator in own_shape.OPERATORS:
        assert f"| {operator}" in text
    folder = tmp_path / own_shape.FOLDER
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["case"].partition(" ")[2] for row in rows] == ["32x6x10 k5 b1 float32 channels_last"] * 3
    assert all(m["passed"] for row in rows for m in row["measurements"])
    assert (folder / "speedup-operator.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_every_combination_is_a_case(capsys):
    assert names(capsys, "--shape", "320x16x16") == [
        f"{operator} 320x16x16 k7 b1 float32 channels_last" for operator in own_shape.OPERATORS
    ]
    options = ("--kernel", "3,31", "--batch", "1,8", "--operator", "depthwise_conv2d", "--dtype", "all")
    found = names(capsys, "--shape", "8x4x4,16X8x4".lower(), *options, "--layout", "nchw", "--direction", "all")
    assert len(found) == len(set(found)) == 2 * 2 * 2 * 3 * 2
    assert "depthwise_conv2d 16x8x4 k31 b8 float16 nchw backward" in found
    assert names(capsys, "--shape", "8x4x4", "--filter", "mixer") == ["channel_mixer 8x4x4 k7 b1 float32 channels_last"]


@pytest.mark.parametrize("operator", own_shape.OPERATORS)
@pytest.mark.parametrize("kernel", [4, 5])
def test_maps_need_not_be_square(operator, kernel):
    case = OperatorCase(operator, 2, 8, 3, kernel, width=9)
    work = build(case)
    (result,), (ours,), expected = work.plain("nchw").results(), work.fused().results(), work.expected()
    assert ours.shape == result.shape == case.shape == (2, 8, 3, 9)
    assert (ours.double() - expected).abs().max() <= work.error_limit(expected, result)


def test_counts_are_those_of_the_map():
    wide, square = OperatorCase("channel_mixer", 1, 8, 4, 3, width=9), OperatorCase("channel_mixer", 1, 8, 6, 3)
    assert (wide.flops, wide.bytes) == (square.flops, square.bytes)  # 36 pixels both
    assert parameters(wide)["width"] == 9
    assert "width" not in parameters(square)  # as results of record have it


def test_other_widths_are_no_growth():
    cases = suite("growth", quick=True)
    rows = [Row(c.name, c.flops, 1, (Measurement(OURS, samples_ms=(1.0,)),), parameters(c)) for c in cases]
    wide = OperatorCase("depthwise_conv2d", 4, 160, 32, 7, width=64)
    rows.append(Row(wide.name, wide.flops, 1, (Measurement(OURS, samples_ms=(9.0,)),), parameters(wide)))
    assert growth_table(rows) == growth_table(rows[:-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kernel", "7", "--dtype", "float32"], "expected --shape with --kernel, --dtype, such as --shape 320x16x16"),
        (["--shape", "8x4x4", "--suite", "ops"], "expected --shape or --suite, got both"),
        (["--shape", "8x4x4", "--base", "HEAD"], "expected --shape or --base, got both"),
        (["--shape", "8x4x4", "--filter", "none"], "no case of --shape has 'none' in its name"),
    ],
)
def test_options_that_make_no_sense(options, message, capsys):
    assert main(["run", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "320x16"], "expected channels x height x width, such as 320x16x16, got '320x16'"),
        (["--shape", "0x16x16"], "such as 320x16x16, got '0x16x16'"),
        (["--shape", "8x4x4", "--kernel", "0"], "expected a positive integer, got '0'"),
        (["--shape", "8x4x4", "--dtype", "float64"], "expected some of float32, bfloat16, float16, got 'float64'"),
    ],
)
def test_wrong_values(options, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["run", *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
