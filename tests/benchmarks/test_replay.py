"""Results of record are replayed: their numbers to the digit, and the text of their tables to the byte."""

import hashlib
import json

import pytest

from benchmarks.__main__ import main
from benchmarks.results import Result
from benchmarks.tables import RESULTS

#: Of what each command prints of results (SHA-256, its beginning). A table that is meant to change gets a new one.
TEXTS = {
    ("report", "cpu-zen5-2threads-avx2"): "4a77ec3397d93d2a",
    ("report", "cpu-zen5-2threads-demo"): "aa99ace2cb1eddc7",
    ("report", "cpu-zen5-2threads-quick"): "9c75732e12a58412",
    ("report", "cpu-zen5-2threads-record"): "92b215be2050ea96",
    ("report", "cpu-zen3-timm-2026-11-30"): "ce0e0ca5cfc48c01",
    ("report", "cpu-zen5-timm-compiled"): "a19f71b152582daf",
    ("report --goals", "cpu-zen5-2threads-avx2"): "a75b7857ed14e537",
    ("report --goals", "cpu-zen5-2threads-record"): "edbb1733cb664bc4",
}


@pytest.mark.parametrize("path", [p for p in RESULTS.glob("*.json") if "memory" not in p.name], ids=lambda p: p.stem)
def test_numbers_of_results_are_what_their_samples_say(path):
    """Medians, quartiles and rates stand in the files, too."""
    kept = json.loads(path.read_text())
    again = Result.from_plain(kept).to_plain()
    assert len(kept["rows"]) == len(again["rows"])
    for row, row_again in zip(kept["rows"], again["rows"], strict=True):
        for measured, derived in zip(row.pop("measurements"), row_again["measurements"], strict=True):
            assert {**derived, **measured} == json.loads(json.dumps(derived))
        assert row.items() <= row_again.items()


@pytest.mark.parametrize(("command", "name"), TEXTS, ids=" ".join)
def test_the_text_of_results_is_the_same(command, name, capsys):
    assert main([*command.split(), str(RESULTS / f"{name}.json")]) == 0
    assert hashlib.sha256(capsys.readouterr().out.encode()).hexdigest()[:16] == TEXTS[command, name]
