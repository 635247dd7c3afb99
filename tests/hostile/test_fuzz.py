"""Ten thousand of the fuzzers' cases by default, and ninety thousand with the slow tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.hostile.cases import FAMILIES


def fuzz(first: int, count: int) -> None:
    """In a process of its own, whose memory is bounded."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.fuzz", "--first", str(first), "--count", str(count)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert f"{count} cases, 0 findings" in done.stdout
    for name in FAMILIES:  # a family of which nothing is accepted, or all, tests nothing
        accepted = re.search(rf"'{name}': (\d+)", done.stdout)
        assert accepted is not None and 0 < int(accepted[1]) < count / len(FAMILIES), name


def test_ten_thousand() -> None:
    fuzz(0, 10_000)


@pytest.mark.slow
def test_ninety_thousand() -> None:
    fuzz(10_000, 90_000)
