"""The tests that are for a GPU, file by file: times of kernels that fail them would mean nothing.
`test_checked` runs every kernel under NVIDIA's compute-sanitizer, where it is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.registry import Measure, Row, Setting
from benchmarks.verify import Mismatch

TARGET = ""
DEVICES = ("cuda",)
ROOT = Path(__file__).parents[2]
FILES = (  # of tests/kernels
    "test_low_rank_kernels", "test_fused", "test_shrink", "test_in_use", "test_checked",
    "test_linear_cross_entropy", "test_prefix_attention", "test_sparse_add",
)  # fmt: skip
WORKERS = 4  # most of the time goes into compiling


def cases(setting: Setting) -> Mapping[str, Measure]:
    files = ("test_timing",) if setting.tiny else FILES
    return {name: functools.partial(_file, setting, name) for name in files}


def _file(setting: Setting, name: str) -> list[Row]:
    missing = [n for n in ("pytest", "hypothesis") if importlib.util.find_spec(n) is None]
    if missing:
        raise ModuleNotFoundError(f"{' and '.join(missing)} not installed")
    many = not setting.tiny and importlib.util.find_spec("xdist") is not None
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         "-m", "not gpu" if setting.tiny else "gpu", *(["-n", str(WORKERS)] if many else []),
         f"tests/kernels/{name}.py"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise Mismatch(done.stdout[-6000:] + done.stderr[-2000:])
    last = done.stdout.splitlines()[-1]
    found = {word: float(count) for count, word in re.findall(r"(\d+) (passed|skipped)", last)}
    return [Row(name, found, unit="tests", over=None)]
