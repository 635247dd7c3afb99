"""Ten thousand of the fuzzers' cases by default, and ninety thousand with the slow tests."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from random import Random

import pytest

from tests.hostile.cases import FAMILIES
from tests.hostile.fuzz import run


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


@pytest.mark.sweep
def test_ninety_thousand() -> None:
    fuzz(10_000, 90_000)


class Bad:
    """A family whose cases are findings."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.does = run

    def change(self, random: Random) -> None:
        pass

    def run(self, thorough: bool) -> bool:
        return bool(self.does())


def _forever() -> None:
    while True:
        with contextlib.suppress(Exception):
            sum(range(1000))


@pytest.mark.parametrize("what", [lambda: {}["missing"], _forever], ids=["KeyError", "TooSlow"])
def test_the_harness_finds(what: Callable[[], object], request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id
    with pytest.raises(AssertionError, match=rf"{name}(.|\n)*again: --only bad --seed 0 --first 7"):
        run({"bad": Bad(what)}, 0, 7, 1)


def test_memory_is_bounded() -> None:
    code = "from tests.hostile.fuzz import limit_memory as limit; limit(); bytearray(%d * 2**20)"
    for size, fits in ((200, True), (260, False)):
        done = subprocess.run(
            [sys.executable, "-c", code % size],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode == 0) == fits and ("MemoryError" in done.stderr) != fits
