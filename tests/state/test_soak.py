"""Long runs: nothing compiles again, nothing grows."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

MIB = 2**20


@pytest.mark.slow
def test_soak() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.state.soak", "--steps", "1000", "--activations", "10000"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["train"]["steps"] == 1000 and told["switch"]["steps"] == 10_000
    for part in told.values():
        assert part["graphs"] == 0 and part["tensors"] == 0, told
        assert part["resident"] < MIB and part["python"] < MIB // 8, told
