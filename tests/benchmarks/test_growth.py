"""How time is said to grow, on rows whose growth is known."""

from dataclasses import replace

import pytest

from benchmarks.cases import GROWTH_FROM, parameters, suite
from benchmarks.contenders import OURS
from benchmarks.report import growth_table
from benchmarks.results import DIMENSIONS, Measurement, Row, fit, series


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
