"""The README's tables are those of the results of record."""

import pytest

from benchmarks import tables
from benchmarks.peers import OURS
from benchmarks.results import Measurement, Result, Row
from benchmarks.tables import Table

MACHINE = dict.fromkeys(("processor", "threads", "isa", "torch", "python", "ffnet_kernels", "commit"), "x")


def test_the_tables_are_what_the_results_say(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_table_is_found(tmp_path):
    row = Row("case", 1, 1, (Measurement(OURS, samples_ms=(2.0,)), Measurement("peer", samples_ms=(1.0,))))
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
