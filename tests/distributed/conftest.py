"""Scenarios are run once, by two processes and by one; tests look at what they gave."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Gave = Callable[..., Any]


def launch(module: str, directory: Path, world: int) -> None:
    """Runs the scenarios of *module* in *world* processes."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.distributed.worker", module, str(directory)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]  # fmt: skip
    for process in ranks:
        out, _ = process.communicate(timeout=400)
        assert process.returncode == 0, out.decode()[-3000:]


@pytest.fixture(scope="module")
def gave(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Gave:
    """``gave(name, world=2, rank=0)``: what a scenario of the test module's list gave.

    Two processes run first, then one, so that either can leave files for the other.
    """
    directory = tmp_path_factory.mktemp("scenarios")
    for world in (2, 1):
        launch(request.module.SCENARIOS, directory, world)

    def look(name: str, world: int = 2, rank: int = 0) -> Any:
        file = directory / f"{name}-{rank}-of-{world}.pt"
        found = torch.load(file, weights_only=False)
        assert "gave" in found, found["failed"]
        return found["gave"]

    return look
