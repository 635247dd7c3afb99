"""Some of the fuzzers' cases by default, and a hundred thousand with the slow tests."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from random import Random

import pytest

from tests.hostile.cases import FAMILIES
from tests.hostile.fuzz import main, run


def fuzz(first: int, count: int) -> None:
    """In a process of its own, whose memory is bounded."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.fuzz", "--jobs", "1",
         "--first", str(first), "--count", str(count)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert f"{count} cases, 0 findings" in done.stdout
    rows = {row[0]: row[1:] for line in done.stdout.splitlines() if (row := line.split())}
    for name in FAMILIES:  # a family of which nothing is accepted, or all, tests nothing
        _, counted, accepted, *_ = map(int, rows[name][:3])
        assert 0 < accepted < counted and counted > count / len(FAMILIES) / 2, name


def test_some() -> None:
    fuzz(0, 3_000)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_a_hundred_thousand(part: int) -> None:
    fuzz(50_000 * (part + 1), 12_500)  # with room for those that are not counted


class Bad:
    """A family whose cases are findings."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.does = run

    def change(self, random: Random) -> bytes:
        return random.randbytes(8)

    def run(self, thorough: bool) -> bool:
        return bool(self.does())


def _forever() -> None:
    while True:
        with contextlib.suppress(Exception):
            sum(range(1000))


@pytest.mark.parametrize("what", [lambda: {}["missing"], _forever], ids=["KeyError", "TooSlow"])
def test_the_harness_finds(what: Callable[[], object], request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id
    (found,) = run({"bad": Bad(what)}, 0, 7, 1).findings
    assert re.match(rf"{name}(.|\n)*again: --only bad --seed 0 --first 7", found)


def test_cases_are_counted_once() -> None:
    """A run of another part comes to other inputs; of the same part, to the same."""
    one, same, other = (
        run({"bad": Bad(lambda: True)}, 0, n, 20).tallies["bad"] for n in (0, 0, 20)
    )
    one.add(same)
    assert (one.run, one.accepted, len(one.inputs)) == (40, 40, 20)
    assert one.inputs.isdisjoint(other.inputs)


def _dies(names: list[str], seed: int, to: Connection) -> None:
    to.recv()
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_process_that_dies_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.hostile.fuzz.work", _dies)
    assert main(["--jobs", "1", "--count", "600", "--first", "5"]) == 1
    told = capsys.readouterr().out
    assert "the process died: -11\nin one of: --seed 0 --first 5 --count 500" in told
    assert "0 cases, 1 findings" in told


def test_memory_is_bounded() -> None:
    code = "from tests.hostile.fuzz import limit_memory as limit; limit(); bytearray(%d * 2**20)"
    for size, fits in ((200, True), (260, False)):
        done = subprocess.run(
            [sys.executable, "-c", code % size],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode == 0) == fits and ("MemoryError" in done.stderr) != fits
