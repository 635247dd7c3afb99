"""Saves that are killed at every step.

    python -m tests.hostile.kills --count 1000

A forked child saves, and kills itself with SIGKILL at the n-th step: Python's profiler tells of
each call and return, of functions in C too, so that there are several steps to each system call.
What is found afterwards is the version before or the one after, whole, and the next save sweeps
what was left.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftfx import files

OLD, NEW = {"a": b"old" * 3000, "b": b"old"}, {"a": b"new" * 3000, "b": b"new"}
FOREIGN = {"optimizer.pt": b"state"}


def no_exchange(source: Path, target: Path, flag: int) -> None:
    """A file system that knows no exchange."""
    if flag != files._NOREPLACE:
        raise OSError(22, "Invalid argument")
    os.rename(source, target)


def content(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir()}


def steps_of(save: Callable[[], None], stop: int | None = None) -> int:
    """Runs *save*; gives the number of its steps, or ends the process at the one given."""
    count = 0

    def step(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += 1
        if count == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(step)
    try:
        save()
    finally:
        sys.setprofile(None)
    return count


class Situation:
    """What is on the disk before a save, and what may be found once it was killed."""

    def __init__(self, name: str, before: dict[str, bytes], exchange: bool = True) -> None:
        self.name, self.before, self.exchange = name, before, exchange
        old = {n: data for n, data in before.items() if n not in NEW}
        self.after = {**NEW, **old}

    def save(self, target: Path) -> None:
        real = files._rename
        if not self.exchange:
            files._rename = no_exchange
        try:
            files.write_directory(target, NEW)
        finally:
            files._rename = real

    def lay(self, parent: Path) -> Path:
        """The directory as it is before; nothing else."""
        shutil.rmtree(parent)
        parent.mkdir()
        if self.before:
            files.write_directory(parent / "adapter", self.before)
        return parent / "adapter"

    def check(self, target: Path) -> bool:
        """Whether the new version is there; raises :class:`AssertionError` for anything else."""
        files.recover(target)
        found = content(target) if target.exists() else {}
        assert found in (self.before, self.after), f"{self.name}: {sorted(found)}"
        files.write_directory(target, OLD)
        left = [f.name for f in target.parent.iterdir()]
        assert left == [target.name], f"{self.name}: {left} stays"
        assert content(target).items() >= OLD.items()
        return found == self.after


SITUATIONS = (
    Situation("first", {}),
    Situation("over another", OLD),
    Situation("beside foreign files", {**OLD, **FOREIGN}),
    Situation("first, without an exchange", {}, exchange=False),
    Situation("over another, without an exchange", OLD, exchange=False),
    Situation("without an exchange", {**OLD, **FOREIGN}, exchange=False),
)


def killed(situation: Situation, target: Path, step: int) -> None:
    """A child that is killed at a step of its save."""
    child = os.fork()
    if child == 0:
        try:
            steps_of(lambda: situation.save(target), step)
        finally:
            os._exit(1)  # it was not killed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "the save ended first"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.hostile.kills")
    parser.add_argument("--count", type=int, default=100)
    count: int = parser.parse_args(arguments).count
    with tempfile.TemporaryDirectory() as directory:
        parent = Path(directory) / "saves"
        parent.mkdir()
        lengths = []
        for situation in (*SITUATIONS, *SITUATIONS):  # the first time, modules are imported
            target = situation.lay(parent)
            lengths.append(steps_of(lambda: situation.save(target)))  # noqa: B023
            assert situation.check(target), "a save that is not killed saves"
        lengths = lengths[len(SITUATIONS) :]
        new = 0
        for i in range(count):
            situation, last = SITUATIONS[i % len(SITUATIONS)], lengths[i % len(SITUATIONS)]
            step = 1 + i // len(SITUATIONS) * len(SITUATIONS) * (last - 1) // count
            target = situation.lay(parent)
            killed(situation, target, step)
            new += situation.check(target)
    assert 0 < new < count, "some were killed before the exchange, and some after it"
    print(f"{count} saves killed, at steps among {lengths}: {new} new, {count - new} old, 0 broken")
    return 0


if __name__ == "__main__":
    sys.exit(main())
