"""The tables by which calls are left to PyTorch: what their rules follow from, and that the chooser goes by them."""

import json

import pytest
import torch

import ffnet_kernels as fk
from benchmarks import crossover as measuring
from benchmarks.__main__ import main
from benchmarks.results import OURS, Measurement, Row
from benchmarks.work import laid_out
from ffnet_kernels import kernels, native
from ffnet_kernels.backends import crossover
from ffnet_kernels.backends.crossover import Rules
from ffnet_kernels.ops import batch_norm

TABLES = {path.stem: json.loads(path.read_text()) for path in sorted(crossover.FOLDER.glob("*.json"))}
every_table = pytest.mark.parametrize("isa", TABLES)
needs_native = pytest.mark.skipif(native.cpu_library_error() is not None, reason="no CPU library was built")


@pytest.fixture(autouse=True)
def as_before_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    crossover.follow(native.isa() if native.cpu_library_error() is None else crossover.DEFAULT)


def row(rule, at, ratio):
    return {"rule": rule, "at": at, "ratio": ratio, "calls": {f"{rule} {at}": ratio}}


@every_table
def test_the_rows_are_those_that_the_command_measures(isa):
    table = TABLES[isa]
    assert (table["isa"], table["threads"]) == (isa, 2)
    assert all(part in table["machine"] for part in (f"isa {isa}", "torch ", "commit "))
    expected = {}
    for probe in measuring.probes():
        expected.setdefault((probe.rule, probe.at), []).append(probe.name)
    assert {(row["rule"], row["at"]): list(row["calls"]) for row in table["rows"]} == expected


@every_table
def test_the_rules_follow_from_the_rows_and_agree_with_them(isa):
    table = TABLES[isa]
    found = json.loads(json.dumps(measuring.judged(table["rows"])))
    assert {name: table[name] for name in found} == found
    assert len(table["against"]) <= len(table["rows"]) / 10


def runs_a_program(work):
    program = work.fused()
    with torch.no_grad():
        program()
    return "a program" in {row.runs_on for row in fk.report(program.function).rows}


def gives_to_the_kernels(probe, work):
    match probe.rule:
        case "few_rows":
            return not kernels.has_few_rows(work.tensors[0])
        case "little_work":
            return runs_a_program(work)
        case "norm":
            activation = probe.name.split()[-2]
            return batch_norm.runs_natively(work.tensors[0], activation)
        case "projection":
            torch.set_num_threads(probe.threads or 2)
            return not kernels.leaves_projection(work.tensors[0])
    return fk.explain(work.operator, **laid_out(work.arguments, work.layout)).backend == "cpu"


@needs_native
@every_table
def test_the_chooser_goes_by_the_table(isa):
    """Each row, on any machine."""
    crossover.use(TABLES[isa])
    for probe in measuring.probes():
        left = crossover.is_left(crossover.now, {"rule": probe.rule, "at": probe.at})
        assert gives_to_the_kernels(probe, probe.work()) is not left, probe.name


@needs_native
def test_explain_quotes_the_closest_row():
    rows = [row("few_channels", 2, 1.5), row("few_channels", 8, 1.25), row("few_channels", 16, 0.5)]
    crossover.use({"isa": "avx2", "threads": 2, "rules": {"few_channels": 8}, "rows": rows})
    weight = torch.ones(6, 1, 3, 3)
    x = torch.ones(1, 6, 9, 9).contiguous(memory_format=torch.channels_last)
    assert fk.explain("depthwise_conv2d", x, weight).refused["cpu"] == (
        "slower on a channels-last map of up to 8 channels, mostly idle lanes of a vector "
        "(8 channels: 1.25 times PyTorch's time, avx2, 2 threads)"
    )
    assert fk.explain("depthwise_conv2d", x.contiguous(), weight).backend == "cpu"


@needs_native
def test_the_report_quotes_the_row_of_a_small_layer():
    rows = [row("little_work", 10**6, 1.75)]
    crossover.use({"isa": "avx2", "threads": 2, "rules": {"little_work": 10**6}, "rows": rows})
    model = fk.optimize(torch.nn.Conv2d(8, 8, 1).eval())
    with torch.no_grad():
        model(torch.randn(1, 8, 9, 9))
    assert str(fk.report(model)) == (
        "(model): as it is: it is so small that PyTorch takes as long "
        "(1000000 multiplications: 1.75 times PyTorch's time, avx2, 2 threads)"
    )


@needs_native
def test_every_instruction_set_has_a_table_or_a_neighbour():
    before = native.isa()
    try:
        for isa in native.usable_isas():
            native.select_isa(isa)
            neighbour = crossover.NEIGHBOURS.get(isa)
            table = TABLES[next(name for name in (isa, neighbour, crossover.DEFAULT) if name in TABLES)]
            assert crossover.now == crossover.rules_of(table)
    finally:
        native.select_isa(before)
    crossover.follow("neon")
    assert crossover.now == crossover.rules_of(TABLES[crossover.DEFAULT])


@pytest.mark.parametrize(
    ("ratios", "limit"),
    [
        ((0.9, 0.8, 0.7), 0),
        ((1.5, 1.2, 0.7), 2),
        ((1.5, 0.98, 1.2), 3),  # the middle one is noise
        ((1.01, 0.9, 0.8), 0),
        ((1.5, 0.5, 1.2), 1),
        ((1.2, 1.3, 1.1), 3),
    ],
)
def test_a_number_is_where_leaving_calls_gains_most(ratios, limit):
    rows = [row("few_rows", at, ratio) for at, ratio in enumerate(ratios, start=1)]
    assert measuring.rules_from(rows[::-1]).few_rows == limit


def test_a_kind_is_left_unless_the_kernels_gain():
    rows = [row("norm", "a", 1.2), row("norm", "b", 0.97), row("norm", "c", 0.8)]
    assert measuring.rules_from(rows) == Rules(norm=("a", "b"))


def test_contradictions_are_rows_that_are_clearly_slower_as_they_run():
    rows = [row("few_rows", at, ratio) for at, ratio in ((1, 0.8), (2, 0.95), (3, 1.2), (4, 1.05), (5, 1.2))]
    assert [one["at"] for one in measuring.contradictions(rows, Rules(few_rows=3))] == [1, 5]


def measured_once(probe, milliseconds, samples):
    """A row in which PyTorch takes 1 ms."""
    ours = Measurement(OURS, samples_ms=(milliseconds,) * samples, repeats=1)
    return Row(probe.name, 0, 0, (ours, Measurement(measuring.THEIRS, samples_ms=(1.0,) * samples, repeats=1)))


@needs_native
@pytest.mark.parametrize(("again", "code"), [([0.4], 0), ([1.5, 1.5], 1)])
def test_what_contradicts_is_measured_again(monkeypatch, tmp_path, capsys, again, code):
    probes = [measuring.Probe("few_rows", at, f"{at} rows", lambda: None) for at in (1, 2, 3)]
    milliseconds = {"1 rows": [1.5], "2 rows": [0.5], "3 rows": [1.5, *again]}

    def measure(chosen, passes, samples):
        return {probe.name: measured_once(probe, milliseconds[probe.name].pop(0), samples) for probe in chosen}

    monkeypatch.setattr(measuring, "measure", measure)
    monkeypatch.setattr(measuring, "probes", lambda: iter(probes))
    path = tmp_path / "table.json"
    assert main(["crossover", "--out", str(path)]) == code
    assert not any(milliseconds.values())
    table = json.loads(path.read_text())
    assert table["rules"]["few_rows"] == 1
    assert table["rows"][2]["ratio"] == pytest.approx(1.5 if code else 0.95)
    assert ("clearly slower" in capsys.readouterr().out) == bool(code)


@pytest.mark.long
@needs_native
def test_the_command_writes_a_table(monkeypatch, tmp_path, capsys):
    """Of a few calls; whatever they take."""
    chosen = {probe.rule: probe for probe in measuring.probes()}
    monkeypatch.setattr(measuring, "probes", lambda: iter(chosen.values()))
    path = tmp_path / "table.json"
    assert main(["crossover", "--samples", "1", "--out", str(path)]) == 0
    table = json.loads(path.read_text())
    assert {row["rule"] for row in table["rows"]} == set(Rules._fields)
    assert crossover.rules_of(table) == measuring.rules_from(table["rows"])
    assert table["isa"] == native.isa()
    assert f"| {table['rows'][0]['rule']} " in capsys.readouterr().out
