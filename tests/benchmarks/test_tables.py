"""Tables and charts of README and docs are those of the results of record."""

import itertools
from xml.etree import ElementTree

import pytest

from benchmarks import tables
from benchmarks.results import OURS, Measurement, Result, Row
from benchmarks.tables import Table

MACHINE = dict.fromkeys(("processor", "threads", "isa", "torch", "python", "ffnet_kernels", "commit"), "x")


def test_the_tables_and_charts_are_what_the_results_say(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_table_is_found(tmp_path):
    row = Row("case", 1, 1, (Measurement(OURS, samples_ms=(2.0,)), Measurement("baseline", samples_ms=(1.0,))))
    (tmp_path / "demo.json").write_text(Result(MACHINE, [row]).to_json())
    known = {"demo": Table("demo.json", tables.demo)}
    readme = "before\n<!-- table: demo -->\nold\n<!-- end of table -->\nafter\n"
    text = tables.fresh(readme, known, tmp_path)
    assert text.startswith("before\n<!-- table: demo -->\nMeasured on x,")
    assert text.endswith("|\n<!-- end of table -->\nafter\n")
    assert "old" not in text
    assert "🔴 0.50×" in text
    assert tables.fresh(text, known, tmp_path) == text
    with pytest.raises(ValueError, match="a place for each of demo, got other"):
        tables.fresh(readme.replace("demo", "other"), known, tmp_path)
    with pytest.raises(ValueError, match="no end"):
        tables.fresh(readme.replace("end of table", "end"), known, tmp_path)


def timm_row(model, threads, eager_ms, ours_ms):
    measurements = (
        Measurement("eager nchw", samples_ms=(eager_ms,)),
        Measurement("optimize nchw", samples_ms=(ours_ms,)),
    )
    return Row(f"{model} {threads}", 1, 1, measurements, {"model": model, "threads": threads})


def test_the_chart_has_a_bar_a_model_at_its_height():
    rows = [timm_row("slower", 2, 1.0, 2.0), timm_row("same", 2, 1.0, 1.0), timm_row("faster", 2, 4.0, 1.0)]
    result = Result(MACHINE, [*rows, timm_row("faster", 1, 2.0, 1.0)], extra={"timm": "1"})
    for theme in (tables.LIGHT, tables.DARK):
        bars = {}
        for bar in ElementTree.fromstring(tables.svg_chart(result, theme)).iter("{http://www.w3.org/2000/svg}rect"):
            top = float(bar.get("y"))
            bars[bar[0].text] = (top, top + float(bar.get("height")))
        assert set(bars) == {"slower: 0.50×", "same: 1.00×", "faster: 4.00×"}
        line = bars["same: 1.00×"][1]
        assert bars["slower: 0.50×"] == (line, tables.BOTTOM)  # hangs from the line
        assert bars["faster: 4.00×"] == (tables.TOP, line)
        assert line == pytest.approx((2 * tables.BOTTOM + tables.TOP) / 3, abs=0.1)
    with pytest.raises(ValueError, match="of 3 threads, got none"):
        tables.svg_chart(result, tables.LIGHT, threads=3)


def test_names_of_bars_do_not_overlap():
    places = sorted(tables.places_of_names([*tables.NAMED, *"abc"]))
    assert places[0] == 0
    assert places[-1] == len(tables.NAMED) + 2
    assert all(later - earlier >= tables.APART for earlier, later in itertools.pairwise(places))


def test_the_headline_names_both_ends():
    rows = [timm_row("a", 1, 1.0, 1.0), timm_row("b", 1, 4.0, 1.0), timm_row("b", 2, 2.0, 1.0)]
    text = tables.headline(Result(MACHINE, rows))
    assert "2.00× on 1 thread (1.00× `a` to 4.00× `b`), 2.00× on 2 threads (2.00× `b` to 2.00× `b`)" in text
