"""How time is said to grow, on rows whose growth is known."""

from dataclasses import replace

import pytest

from benchmarks import growth
from benchmarks.cases import parameters
from benchmarks.peers import OURS
from benchmarks.results import Measurement, Row
from benchmarks.suites import GROWTH_FROM, suite


def test_exponents():
    assert growth.fit([(x, 3 * x**1.7) for x in (2, 5, 40)]) == (pytest.approx(1.7), pytest.approx(0))
    exponent, deviation = growth.fit([(1, 1.0), (2, 2.2), (4, 4.0)])
    assert exponent == pytest.approx(1)
    assert 0.05 < deviation < 0.1


def test_growth_is_found_in_rows():
    cases = suite("growth", quick=True)
    rows = []
    for case in reversed(cases):
        ours = Measurement(OURS, samples_ms=(float(case.batch * case.size),))
        rows.append(Row(case.name, case.flops, 1, (ours,), parameters(case)))
    found = {(one.operator, one.dimension): one for one in growth.series(rows)}
    assert found.keys() == {(operator, name) for operator in GROWTH_FROM for name in growth.DIMENSIONS}
    pixels = found["channel_mixer", "size"]
    assert pixels.values == [64, 1024, 4096]
    assert growth.fit(pixels.times(OURS))[0] == pytest.approx(0.5)
    assert growth.table(rows).count("\n| ") == 1 + 12
    assert growth.table(rows[:2]) == ""
    assert growth.table([replace(row, parameters={}) for row in rows]) == ""
