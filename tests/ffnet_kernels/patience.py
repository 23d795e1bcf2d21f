"""Processes that tests wait for. A busy machine is slow, not wrong: the limit only ends what hangs."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

LIMIT = 3600  # seconds: longer than all tests take


def run(command: Sequence[str | Path], **options) -> subprocess.CompletedProcess:
    """:func:`subprocess.run` with the output as text."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, **options)
    except subprocess.TimeoutExpired:
        pytest.fail(f"slow, or it hangs: no answer in {LIMIT} s from {' '.join(map(str, command))}")
