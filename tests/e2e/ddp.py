"""One rank of the two-process test: gradients under DDP, and rank 0 alone on the whole batch."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import peftfx
from tests.architectures import by_name
from tests.helpers import fill


def gradients(world: int, rank: int) -> dict[str, torch.Tensor]:
    torch._dynamo.reset()
    model = by_name("bert").build()
    rules = [
        {"method": "lora", "role": ["attention.query", "mlp.down"], "rank": 3},
        {"method": "prefix", "role": "attention", "length": 3, "mlp": True, "hidden": 6},
        {"method": "prompt", "role": "tokens", "length": 2},
    ]
    peftfx.adapt(model, {"rules": rules}, lower="aot_eager")
    fill(peftfx.parameters(model))
    wrapped = DistributedDataParallel(model) if world > 1 else model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 61, (8, 7), generator=generator)
    labels = ids[:, 0] % 3
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    wrapped(input_ids=ids[share], labels=labels[share]).loss.backward()
    return {n: p.grad for n, p in peftfx.named_parameters(wrapped) if p.grad is not None}


def main() -> None:
    directory, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2,
        timeout=timedelta(seconds=200),
    )  # fmt: skip
    found = gradients(2, rank)
    if rank == 0:
        torch.save(found, directory / "two.pt")
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        torch.save(gradients(1, 0), directory / "one.pt")


if __name__ == "__main__":
    main()
