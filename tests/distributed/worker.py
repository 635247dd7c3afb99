"""One process of several: runs scenarios and leaves what each gave, or its error, in a file."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Scenario = Callable[[int, int, Path], Any]
SCENARIOS: dict[str, Scenario] = {}


def scenario(run: Scenario) -> Scenario:
    """Adds a scenario: called with rank, number of processes, and a directory that all see."""
    SCENARIOS[run.__name__] = run
    return run


def main(module: str, directory: Path, rank: int, world: int) -> None:
    """Runs every scenario of *module* in turn."""
    __import__(module)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous{world}", rank=rank, world_size=world,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    for name, run in SCENARIOS.items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            found: Any = {"gave": run(rank, world, directory)}
        except Exception:
            found = {"failed": traceback.format_exc()}
        torch.save(found, directory / f"{name}-{rank}-of-{world}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    from tests.distributed import worker  # the module that scenarios import, not __main__

    worker.main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
