"""docs/features.md: the tests that it names are there, and every row names one."""

import ast
import re

import pytest

CELL = re.compile(r"`(test_\w+)::(test_\w+)`")


@pytest.fixture(scope="module")
def rows(root):
    lines = [line for line in (root / "docs" / "features.md").read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture(scope="module")
def tests(root):
    """The names of tests by file."""
    return {
        path.stem: {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
        for path in (root / "tests").rglob("test_*.py")
    }


def test_the_named_tests_are_there(rows, tests):
    named = [found for row in rows for cell in row for found in CELL.findall(cell)]
    assert len(named) > 50
    assert [f"{file}::{test}" for file, test in named if test not in tests.get(file, ())] == []


def test_every_cell_names_tests_or_is_a_dash(rows):
    body = [row for row in rows if row[0] != "feature" and not set(row[0]) <= set("-")]
    for row in body:
        assert CELL.search(row[1]), row
        for cell in row[1:]:
            assert cell == "–" or CELL.sub("", cell).strip() == "", cell


def test_a_name_that_is_not_there_is_found(tests):
    assert "test_of_nothing" not in tests["test_export"]
    assert "test_aotinductor" in tests["test_export"]
