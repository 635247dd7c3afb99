"""Fuzzers of all that peftfx reads from files.

    python -m tests.hostile.fuzz --count 1000000 --jobs 2

Each case has its own random numbers, made of the seed, the family and the case's number, so that
``--only specs --seed 3 --first 1234 --count 1`` runs one again, and ``--first`` goes on where a run
was stopped. A finding is whatever is raised but peftfx's own errors, more than a second of
computing, more than 256 MiB of memory, a model or a file that is not as it was, a process that
dies.
Inputs that came before in the run, or are what was changed, are run and not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.hostile.cases import FAMILIES, Family

SECONDS, MEMORY = 1.0, 256 * 2**20
THOROUGH = 25  # one case in so many is loaded, bound and released
BLOCK = 500  # cases between two reports of a process
PATIENCE = 600.0  # seconds for a block, after which a process is taken for hanging


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


def resident() -> int:
    """The most bytes that this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Tally:
    """What cases of one family came to."""

    run: int = 0
    accepted: int = 0
    worst: float = 0.0  # seconds of computing
    inputs: set[bytes] = field(default_factory=set)  # digests

    def add(self, other: Tally) -> None:
        self.run += other.run
        self.accepted += other.accepted
        self.worst = max(self.worst, other.worst)
        self.inputs |= other.inputs


@dataclass
class Report:
    """A block of cases: what they came to, what was found, and the memory above the start's."""

    first: int
    tallies: dict[str, Tally]
    findings: list[str]
    memory: int = 0


def run(families: Mapping[str, Family], seed: int, first: int, count: int) -> Report:
    """Runs so many cases of the families in turn."""
    names = list(families)
    report = Report(first, {name: Tally() for name in names}, [])
    for number in range(first, first + count):
        name = names[number % len(names)]
        random = Random(f"{seed} {name} {number}")
        family, tally = families[name], report.tallies[name]
        digest = family.change(random)
        start = time.process_time()
        try:
            with bounded(SECONDS):
                tally.accepted += family.run(thorough=random.randrange(THOROUGH) == 0)
        except (Exception, TooSlow) as error:
            again = f"--only {' '.join(names)} --seed {seed} --first {number} --count 1"
            shown = "".join(traceback.format_exception(error)[-6:])
            report.findings.append(
                f"{type(error).__name__}: {error}\nagain: {again} --jobs 1\n{shown}"
            )
        tally.worst = max(tally.worst, time.process_time() - start)
        tally.run += 1
        if digest is not None:
            tally.inputs.add(digest)
    return report


def work(names: list[str], seed: int, to: Connection) -> None:
    """A process: runs the blocks that it is told, in memory's file system where there is one."""
    logging.disable()
    torch.set_num_threads(1)
    memory = Path("/dev/shm")
    root = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=root) as directory:
        families = {}
        for name in names:
            (Path(directory) / name).mkdir()
            families[name] = FAMILIES[name](Path(directory) / name)
        run(families, seed - 1, 0, 50 * len(names))  # imports and caches are no case's own
        limit_memory()
        start = resident()
        while True:
            told = to.recv()
            if told is None:
                return
            report = run(families, seed, *told)
            report.memory = resident() - start
            to.send(report)


class Workers:
    """Processes that run blocks; one that dies or hangs is a finding, and is replaced."""

    def __init__(self, names: list[str], seed: int, jobs: int) -> None:
        self.names, self.seed, self.jobs = names, seed, jobs
        self.context = multiprocessing.get_context("spawn")
        self.busy: dict[Connection, tuple[Any, int, int]] = {}
        self.idle: list[tuple[Any, Connection]] = []

    def start(self, first: int, count: int) -> None:
        """Runs a block in a process that has nothing to do, a new one if need be."""
        if self.idle:
            process, ours = self.idle.pop()
        else:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=work, args=(self.names, self.seed, theirs))
            process.start()
            theirs.close()
        ours.send((first, count))
        self.busy[ours] = (process, first, count)

    def reports(self) -> Iterator[Report]:
        """At least one block that ended."""
        ended = wait(list(self.busy), PATIENCE)
        for ours in ended or list(self.busy):
            assert isinstance(ours, Connection)
            process, first, count = self.busy.pop(ours)
            try:
                if not ended:
                    raise TimeoutError(f"no end within {PATIENCE} s")
                yield ours.recv()
                self.idle.append((process, ours))
            except (EOFError, OSError) as error:
                process.kill()
                process.join()
                how = str(error) or f"the process died: {process.exitcode}"
                told = f"{how}\nin one of: --seed {self.seed} --first {first} --count {count}"
                yield Report(first, {}, [told])

    def stop(self) -> None:
        for process, ours in self.idle:
            ours.send(None)
            process.join()
        for process, _, _ in self.busy.values():
            process.kill()
            process.join()


def table(tallies: Mapping[str, Tally]) -> str:
    """A line for each family, and the sums."""
    rows = [("family", "run", "counted", "accepted", "worst")]
    for name, t in tallies.items():
        rows.append((name, f"{t.run}", f"{len(t.inputs)}", f"{t.accepted}", f"{t.worst:.3f} s"))
    sums = [sum(int(row[i]) for row in rows[1:]) for i in (1, 2, 3)]
    worst = max(t.worst for t in tallies.values())
    rows.append(("all", *map(str, sums), f"{worst:.3f} s"))
    return "\n".join(f"{r[0]:<12}" + "".join(f"{cell:>12}" for cell in r[1:]) for r in rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.hostile.fuzz")
    parser.add_argument("--count", type=int, default=10_000, help="of different inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--only", choices=FAMILIES, nargs="+", default=list(FAMILIES))
    parser.add_argument("--go-on", action="store_true", help="collect findings, do not stop")
    chosen = parser.parse_args(arguments)
    tallies = {name: Tally() for name in chosen.only}
    workers = Workers(chosen.only, chosen.seed, chosen.jobs)
    begun, told = time.monotonic(), 0
    first, counted, findings, memory = chosen.first, 0, 0, 0
    upto = chosen.first
    try:
        while workers.busy or (counted < chosen.count and (chosen.go_on or not findings)):
            wanted = chosen.count - counted - sum(n for _, _, n in workers.busy.values())
            if len(workers.busy) < chosen.jobs and wanted > 0 and (chosen.go_on or not findings):
                workers.start(first, min(BLOCK, wanted))
                first += min(BLOCK, wanted)
                continue
            for report in workers.reports():
                for name, tally in report.tallies.items():
                    tallies[name].add(tally)
                for finding in report.findings:
                    print(finding, flush=True)
                findings += len(report.findings)
                memory = max(memory, report.memory)
            counted = sum(len(t.inputs) for t in tallies.values())
            upto = min([first, *(f for _, f, _ in workers.busy.values())])
            if counted - told >= 10_000:
                told = counted
                minutes = (time.monotonic() - begun) / 60
                print(f"{counted} in {minutes:.1f} min; to go on: --first {upto}", flush=True)
    finally:
        workers.stop()
    print(table(tallies))
    print(
        f"{counted} cases, {findings} findings, {memory / 2**20:.0f} MiB above the start, "
        f"seed {chosen.seed}, cases {chosen.first} to {upto - 1}, {chosen.jobs} processes, "
        f"{(time.monotonic() - begun) / 60:.1f} min"
    )
    return findings > 0


if __name__ == "__main__":
    sys.exit(main())
