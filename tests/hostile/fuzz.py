"""Fuzzers of all that peftfx reads from files.

    python -m tests.hostile.fuzz --count 1000000

Each case has its own random numbers, made of the seed, the family and the case's number, so that
`--only specs --seed 3 --first 1234 --count 1` runs one again. A finding is whatever is raised but
peftfx's own errors, more than a second of computing, more than 256 MiB of memory, a model or a
file that is not as it was.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.hostile.cases import FAMILIES, Family

SECONDS, MEMORY = 1.0, 256 * 2**20
THOROUGH = 25  # one case in so many is loaded, bound and released


class TooSlow(BaseException):
    """Not an Exception: nothing that is tested may catch it."""


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raises :class:`TooSlow` inside the block after so much time of this process's computing."""

    def late(number: int, frame: Any) -> None:
        raise TooSlow(f"more than {seconds} s")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def limit_memory() -> None:
    """No more than :data:`MEMORY` beyond what the process has now; allocations fail, and tell."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run(families: dict[str, Family], seed: int, first: int, count: int) -> dict[str, int]:
    """Runs so many cases; gives how many of each family were accepted.

    Raises:
        AssertionError: a finding, with what runs it again.
    """
    names = list(families)
    accepted = dict.fromkeys(names, 0)
    for number in range(first, first + count):
        name = names[number % len(names)]
        random = Random(f"{seed} {name} {number}")
        family = families[name]
        family.change(random)
        try:
            with bounded(SECONDS):
                accepted[name] += family.run(thorough=random.randrange(THOROUGH) == 0)
        except (Exception, TooSlow) as error:
            again = f"--only {' '.join(names)} --seed {seed} --first {number} --count 1"
            raise AssertionError(f"{type(error).__name__}: {error}\nagain: {again}") from error
    return accepted


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.hostile.fuzz")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", choices=FAMILIES, nargs="+", default=list(FAMILIES))
    parser.add_argument("--go-on", action="store_true", help="collect findings, do not stop")
    chosen = parser.parse_args(arguments)
    logging.disable()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        families = {}
        for name in chosen.only:
            root = Path(directory) / name
            root.mkdir()
            families[name] = FAMILIES[name](root)
        run(families, chosen.seed - 1, 0, 200)  # imports and caches are no case's own
        limit_memory()
        accepted = dict.fromkeys(families, 0)
        findings, first, last = 0, chosen.first, chosen.first + chosen.count
        while first < last:
            step = min(1 if chosen.go_on else 1000, last - first)
            try:
                found = run(families, chosen.seed, first, step)
            except AssertionError as error:
                findings += 1
                shown = traceback.format_exception(error.__cause__)
                print(error, *shown[-6:], sep="\n", flush=True)
                if not chosen.go_on:
                    return 1
                found = {}
            first += step
            accepted = {n: accepted[n] + found.get(n, 0) for n in accepted}
    print(f"{chosen.count} cases, {findings} findings, accepted: {accepted}")
    return findings > 0


if __name__ == "__main__":
    sys.exit(main())
