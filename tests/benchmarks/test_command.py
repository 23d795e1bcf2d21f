"""``python -m benchmarks`` and its charts."""

import json
import sys

import pytest

from benchmarks import chart
from benchmarks.__main__ import main
from benchmarks.results import Measurement, Result, Row

PNG = b"\x89PNG\r\n"


def rows():
    def row(case, **milliseconds):
        return Row(case, 10**6, 10**6, tuple(Measurement(n, samples_ms=(ms,)) for n, ms in milliseconds.items()))

    return [row("first b1 float32", ours=1.0, peer=2.0), row("second b1 float32", ours=1.0, peer=0.5)]


def test_runs_a_suite_and_writes_its_files(tmp_path, capsys):
    options = ["--filter", "640x8x8 k7 b1", "--peers", "eager nchw", "--samples", "2"]
    files = ["--json", str(tmp_path / "out.json"), "--chart", str(tmp_path / "out.png")]
    assert main([*options, *files]) == 0
    text = capsys.readouterr().out
    assert "| eager nchw " in text
    assert "torch.compile" not in text.split("|", 1)[1]
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 2
    assert (tmp_path / "out.png").read_bytes().startswith(PNG)


def test_list(capsys):
    assert main(["--suite", "models", "--list"]) == 0
    assert "ffnet_4 256x256 b8 float32" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--filter", "nothing"], "nothing"), (["--json", "/no/such/folder/out.json"], "/no/such/folder")],
)
def test_options_that_make_no_sense(options, message, capsys):
    assert main(options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--samples", "0"], ["--peers", "nobody"], ["--suite", "none"]])
def test_wrong_options(options):
    with pytest.raises(SystemExit) as exit_:
        main(options)
    assert exit_.value.code == 2


def test_charts(tmp_path):
    chart.latency_chart(rows()[0], tmp_path / "latency.png", "title")
    chart.ratio_chart(Result({}, rows()), tmp_path / "ratio.png", "title")
    assert all(path.read_bytes().startswith(PNG) for path in tmp_path.iterdir())
    assert chart._short_names(rows()) == ["first", "second"]


def test_charts_say_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(chart.ChartError, match="nothing was measured"):
        chart.latency_chart(Row("case", 1, 1, (Measurement("ours", reason="absent"),)), tmp_path / "a.png", "title")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(chart.ChartError, match="matplotlib"):
        chart.latency_chart(rows()[0], tmp_path / "a.png", "title")
