"""``accelerate launch`` of a Trainer's script: two processes are one, and resume bit for bit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import relative

SCRIPT = Path(__file__).with_name("launched.py")


def launch(world: int, directory: Path, *arguments: str) -> dict[str, torch.Tensor]:
    """Trains in *world* processes; gives the adapter that was saved."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1",
         # its own --cpu starts one process; torchrun comes with --multi_gpu alone
         "--multi_gpu" if world > 1 else "--cpu",
         f"--num_processes={world}", f"--main_process_port={port}", "--mixed_precision=no",
         "--dynamo_backend=no", "--num_cpu_threads_per_process=1",
         str(SCRIPT), str(directory), str(8 // world), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return load_file(directory / "last" / "adapter_model.safetensors")


@pytest.mark.slow
def test_two_are_one_and_resume(tmp_path: Path) -> None:
    one, two = launch(1, tmp_path / "one"), launch(2, tmp_path / "two")
    assert two.keys() == one.keys() and len(one) > 4
    assert all(relative(two[k], t) < 1e-5 for k, t in one.items())
    resumed = launch(2, tmp_path / "resumed", str(tmp_path / "two" / "checkpoint-2"))
    assert all(torch.equal(resumed[k], t) for k, t in two.items())
    saved = {f.name for f in (tmp_path / "two" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved
