"""Seconds of the first step of the training above, binding left out: each variant in a process
and with caches of its own.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

import torch

from benchmarks.parts.train_step import NAMES, adapted, batch, llama, stepper
from benchmarks.peers import why_no_peft
from benchmarks.registry import Measure, Row, Setting, short

TARGET = "≤1.2 of frozen"
DEVICES = ("cpu", "cuda")


def cases(setting: Setting) -> Mapping[str, Measure]:
    names = [short(dtype) for dtype in setting.dtypes[::-1][: 1 if setting.tiny else 2]]
    return {name: functools.partial(_row, setting, name) for name in names}


def _row(setting: Setting, dtype: str) -> list[Row]:
    why = why_no_peft()
    if why is not None:
        raise ModuleNotFoundError(why)
    values = {}
    for name in NAMES[:2] if setting.tiny else NAMES:
        with tempfile.TemporaryDirectory() as cache:
            done = subprocess.run(
                [sys.executable, "-m", __name__, setting.device.type, dtype, name,
                 "tiny" if setting.tiny else "full"],
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}, check=True,
                capture_output=True, text=True,
            )  # fmt: skip
            values[name] = float(done.stdout.split()[-1])
    return [Row(dtype, values, unit="s")]


def main(device: str, dtype: str, name: str, size: str) -> None:
    setting = Setting(torch.device(device), size == "tiny")
    base, ids = llama(setting, getattr(torch, dtype)), batch(setting)
    step = stepper(adapted(name, base, setting), ids)
    start = time.perf_counter()
    float(step())  # a number: the device is done
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
