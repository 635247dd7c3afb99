"""One command, one table: ``python -m benchmarks.run --device auto``.

Runs the parts of the benchmark, each in a process of its own and for eight minutes at most, and
writes ``benchmarks/results/<device>/<part>.json`` after every case. Called again it goes on where
it stopped. What is wrong gets no time: each case compares its variants before it times them. In the
end it writes ``benchmarks/README.md`` anew. On a GPU the first part is the tests that are for one,
and ``--tune`` comes behind it.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.registry import PARTS, Row, Setting, part
from benchmarks.store import RESULTS, Results, environment, load, read
from benchmarks.verify import Mismatch
from peftfx.kernels import measured

LIMIT = 8.0  # minutes of a part's process


def measure(
    name: str, setting: Setting, root: Path, again: bool = False, minutes: float = LIMIT
) -> list[str]:
    """Runs the cases of a part that are not done yet, as long as there is time.

    Returns:
        What went wrong: cases without a row, for what they need is not here, or a variant is wrong
        or fails. The others are measured all the same, but where the device itself is in trouble.
    """
    deadline, one = time.monotonic() + 60 * minutes, part(name)
    results, wrong = Results(root, one, environment(setting), again), []
    for case, run in one.cases(setting).items():
        if results.done(case):
            continue
        if time.monotonic() > deadline:
            print(f"{name}: time is up before {case}; call again to go on", flush=True)
            break
        try:
            rows = run()
        except (Mismatch, ModuleNotFoundError) as error:
            wrong.append(f"{name}, {case}: {error}")
            print(wrong[-1], flush=True)
            continue
        except torch.AcceleratorError:
            raise
        except Exception as error:
            wrong.append(f"{name}, {case}: {type(error).__name__}")
            traceback.print_exc()
            continue
        results.add(rows)
        for row in rows:
            print(f"{name}: {line(row)}", flush=True)
        if setting.gpu:
            gc.collect()
            torch.cuda.empty_cache()
    return wrong


def line(row: Row) -> str:
    """A row in a line, as it is shown while the benchmark runs."""
    numbers = ", ".join(f"{n} {report.number(v)}" for n, v in row.values.items())
    return f"{row.case} {row.way}: {numbers} {row.unit}"


def rates(root: Path, setting: Setting) -> dict[str, float]:
    """The device's rates, if the part `figures` has found them."""
    path = root / measured.slug(environment(setting)["device"]) / "figures.json"
    if not path.exists():
        return {}
    (row,) = read(path)[1]
    return row.values


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    parser.add_argument("--part", action="append", choices=PARTS, help="only these; or several")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=600.0, help="of all parts together")
    parser.add_argument("--again", action="store_true", help="measure anew what is there already")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="of these sources, where git is not")
    parser.add_argument(
        "--tune", type=float, default=0.0, metavar="MINUTES",
        help="find the fastest forms, and tiles, unless kernels/measured has them for this device",
    )  # fmt: skip
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # a part's process
    given = parser.parse_args(arguments)
    kind = given.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    setting = Setting(
        torch.device(kind), given.size == "tiny", given.rounds, commit=given.commit
    )  # fmt: skip
    if given.inside:
        setting = replace(setting, rates=rates(given.results, setting))
        return len(measure(given.part[0], setting, given.results, given.again, given.minutes))
    if setting.tiny and given.results == RESULTS:
        parser.error("numbers of tiny sizes mean nothing: --results DIRECTORY")
    deadline, failed = time.monotonic() + 60 * given.minutes, []
    table = measured.shipped_file(environment(setting)["device"])
    tune = given.tune > 0 and (given.again or not table.exists())
    for name in given.part or [p for p in PARTS if kind in part(p).devices]:
        left = (deadline - time.monotonic()) / 60
        if tune and name != "tests" and left > 1:
            tune, minutes = False, min(given.tune, 0.75 * left)
            command = [sys.executable, "-m", "peftfx.cli", "tune", "--output", str(table),
                       "--minutes", str(minutes)]  # fmt: skip
            failed += ["tune"] * (not _run("tune", command, min(left, 2 * minutes)))
        left = min(LIMIT, (deadline - time.monotonic()) / 60)
        if left < 0.5:
            print(f"time is up before {name}; call again to go on")
            break
        command = [
            sys.executable, "-m", "benchmarks.run", "--inside", "--part", name, "--device", kind,
            "--size", given.size, "--rounds", str(given.rounds), "--minutes", str(0.75 * left),
            "--results", str(given.results), "--commit", given.commit, *["--again"] * given.again,
        ]  # fmt: skip
        failed += [name] * (not _run(name, command, left))
    if given.results == RESULTS:
        report.write(RESULTS)
    else:
        print("\n".join(report.tables(load(given.results))))
    print(f"not complete: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def _run(name: str, command: Sequence[str], minutes: float) -> bool:
    """Whether *command* ends well, or in time; what it started ends with it."""
    process = subprocess.Popen(command, process_group=0)
    try:
        return process.wait(60 * minutes) == 0
    except subprocess.TimeoutExpired:
        print(f"{name} was ended in the middle of a case; call again to go on", flush=True)
        return True
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that parts are ended too
    sys.exit(main())
