"""Dropout's kernel on the CPU: the mask by a C loop, compiled at first use.

Inductor turns the definition's ten rounds into ten times ten nested expressions, its own generator
is scalar on the CPU, and plain torch has no 32-bit high product. The loop takes 2 to 3 ns for an
element on one thread where they take 2,400 and 60; it makes the mask, and Inductor applies that in
its own loops. Without a C compiler the definition serves: the same masks, slowly.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from peftfx.kernels.measured import cache_directory
from peftfx.kernels.philox.op import keep_mask, library, stream
from peftfx.log import logger

SOURCE = Path(__file__).with_name("philox.c")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-pthread")


@functools.cache
def compiled() -> Callable[[int, int, int, float, int], None] | None:
    """The loop ``(out, count, key, p, threads)``; None, said in the log, without a compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        logger.warning("no C compiler: dropout on the CPU is slow")
        return None
    digest = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, FLAGS, _cpu())).encode())
    built = cache_directory() / f"philox-{digest.hexdigest()[:16]}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as fresh:
            made = Path(fresh) / built.name
            done = subprocess.run(
                [*compiler.split(), *FLAGS, "-o", str(made), str(SOURCE)],
                capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                logger.warning(
                    "dropout on the CPU is slow, for %s fails: %s", compiler, done.stderr
                )
                return None
            made.replace(built)
    loop = ctypes.CDLL(str(built)).keep
    loop.argtypes = (
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32, ctypes.c_float, ctypes.c_int,
    )  # fmt: skip
    loop.restype = None
    return loop


def _cpu() -> str:
    """What ``-march=native`` depends on: a cache directory may be shared by several machines."""
    return torch.backends.cpu.get_cpu_capability() + str(os.uname().machine)


def _keep_mask(like: Tensor, seed: Tensor, p: float, site: int) -> Tensor:
    loop = compiled()
    if loop is None:
        return keep_mask(like, seed, p, site)
    keep = torch.empty(like.shape, dtype=torch.bool)
    key = int(stream(seed, site))
    loop(keep.data_ptr(), keep.numel(), key, p, torch.get_num_threads())
    return keep


library.impl("keep_mask", _keep_mask, "CPU")
