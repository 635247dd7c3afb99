"""Every kernel under NVIDIA's checker: memory out of bounds, races, reads of what nobody wrote."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels import checked

CHECKER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


@pytest.mark.gpu
@pytest.mark.skipif(not Path(CHECKER).exists(), reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_checked(tool: str) -> None:
    """At odd sizes, each tensor an allocation of its own: what lies behind it is nobody's."""
    # who wrote what is known of kernels that are watched: to judge reads, all of them are
    watched = [] if tool == "initcheck" else ["--kernel-name", "kns=low_rank"]
    done = subprocess.run(
        [CHECKER, "--tool", tool, "--error-exitcode", "9", *watched,
         sys.executable, "-m", "tests.kernels.checked"],
        capture_output=True, text=True, timeout=400,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not work on this machine")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "launched 9 kernels" in done.stdout


def test_the_program_that_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    """By the interpreter: it launches every kernel, and nothing is wrong with any."""
    checked.main("cpu", [checked.CALLS[0], checked.CALLS[4]], [torch.bfloat16])
    assert capsys.readouterr().out == "launched 9 kernels\n"
