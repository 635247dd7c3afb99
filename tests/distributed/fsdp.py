"""Scenarios under FSDP2: blocks sharded with their adapters, each compiled by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import peftfx
from peftfx.backends import Backend
from peftfx.errors import BindError, NotAdaptedError
from tests.distributed.worker import scenario
from tests.helpers import fill

SPEC: dict[str, Any] = {
    "rules": [
        {"method": "lora", "name": ["*.up", "*.down"], "rank": 3, "alpha": 4},
        {"method": "train", "name": "head"},
    ]
}
LORA: dict[str, Any] = {"rules": SPEC["rules"][:1]}
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
WHOLE = StateDictOptions(full_state_dict=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def base(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def shard(model: Net) -> Net:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)  # type: ignore[return-value]


def bound(world: int, spec: Any = None, model: Net | None = None) -> tuple[Net, Backend]:
    """A filled model; sharded by block and so compiled where there are several processes."""
    model = model or base()
    backend = Backend(spec or SPEC, "aot_eager")
    backend.bind(model, (X,))
    fill(peftfx.parameters(model))
    if world > 1:
        shard(model)
    for block in model.blocks:
        block.compile(backend=backend)
    return model, backend


def share(rank: int, world: int) -> Tensor:
    return X[rank * 8 // world : (rank + 1) * 8 // world]


def gathered(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t.clone()


@scenario
def gradients(rank: int, world: int, directory: Path) -> dict[str, Tensor]:
    model, _ = bound(world)
    model(share(rank, world)).square().mean().backward()
    return {n: gathered(p.grad) for n, p in peftfx.named_parameters(model) if p.grad is not None}


@scenario
def groups(rank: int, world: int, directory: Path) -> bool:
    """Adapters are gathered with their block and cut again behind it, not with the root."""
    model, _ = bound(2)
    seen: list[bool] = []

    def look(module: nn.Module, args: Any, out: Any) -> None:
        first, second = (b.get_parameter("up.peftfx.lora.A") for b in model.blocks)
        seen.append(isinstance(first, DTensor) and not isinstance(second, DTensor))

    model.blocks[1].up.register_forward_hook(look)  # type: ignore[union-attr]
    model(X)
    return seen == [True]


@scenario
def three_steps(rank: int, world: int, directory: Path) -> dict[str, Tensor]:
    """AdamW; then a save, and the adapter's values as every process gives them."""
    model, _ = bound(world)
    optimizer = torch.optim.AdamW(peftfx.parameters(model), lr=0.05)
    for _ in range(3):
        model(share(rank, world)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    peftfx.save(model, directory / f"trained-by-{world}")
    return {n: t.clone() for n, t in peftfx.state_dict(model).items()}


@scenario
def saved_and_loaded(rank: int, world: int, directory: Path) -> dict[str, dict[str, Tensor]]:
    """What another number of processes saved: into a bound model, and into a fresh one."""
    other = directory / f"trained-by-{3 - world}"
    if not other.exists():  # the first launch leaves its own for the second, which comes back
        other = directory / f"trained-by-{world}"
    model, _ = bound(world)
    peftfx.load(model, other, trainable=True)
    fresh = base()
    peftfx.load(fresh, other, compile=False, example=(X,))
    sharded, _ = bound(2)
    peftfx.load(sharded, other)
    peftfx.save(sharded, directory / f"again-by-{world}")
    return {
        "into": {n: t.clone() for n, t in peftfx.state_dict(model).items()},
        "fresh": {n: t.clone() for n, t in peftfx.state_dict(fresh).items()},
        "sharded": {n: t.clone() for n, t in peftfx.state_dict(sharded).items()},
        "output": {"": sharded(X).detach(), "fresh": fresh(X).detach()},
    }


@scenario
def dictionaries(rank: int, world: int, directory: Path) -> dict[str, Any]:
    """Torch's own gathering of state dicts has the adapter; it goes into a model that is whole."""
    sharded, _ = bound(2)
    state = get_model_state_dict(sharded, options=WHOLE)
    plain, _ = bound(1)
    fill(peftfx.parameters(plain), 5)
    if rank == 0:
        plain.load_state_dict(state, strict=True)
    wanted, _ = bound(1)
    other, _ = bound(2)
    fill([p.to_local() for p in peftfx.parameters(other)], 7)  # type: ignore[attr-defined]
    set_model_state_dict(other, wanted.state_dict(), options=WHOLE)
    same = {n: t.clone() for n, t in peftfx.state_dict(other).items()}
    peftfx.load_state_dict(other, {n: t + 1 for n, t in same.items()})
    return {
        "whole": peftfx.state_dict(plain) if rank == 0 else None,
        "sharded": same,
        "added": {n: t - 1 for n, t in peftfx.state_dict(other).items()},
        "wanted": peftfx.state_dict(wanted),
    }


@scenario
def from_meta(rank: int, world: int, directory: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bound and sharded on the meta device; the base's values come in shards."""
    with torch.device("meta"):
        model = Net()
    backend = Backend(SPEC, "aot_eager")
    backend.bind(model, (X.to("meta"),))
    shard(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            local.fill_(float("nan"))
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, base(4).state_dict(), options=options)
    started = model(X).detach()
    state = {n: t * 0 + 0.1 for n, t in peftfx.state_dict(model).items()}
    peftfx.load_state_dict(model, state)
    plain = base(4)
    Backend(SPEC, "eager").bind(plain, (X,))
    peftfx.load_state_dict(plain, state)
    return started, base(4)(X).detach(), model(X).detach(), plain(X).detach()


def message(run: Any, *args: Any) -> str:
    try:
        run(*args)
    except (BindError, NotAdaptedError) as error:
        return str(error)
    return ""


@scenario
def refusals(rank: int, world: int, directory: Path) -> dict[str, str]:
    """FSDP2 would put its own parameters back: nothing is exchanged under it."""
    model, backend = bound(2)
    found = {
        "add": message(peftfx.add, model, SPEC, "b", (X,)),
        "merge": message(peftfx.merge, model),
        "release": message(peftfx.release, model),
        "mix": message(peftfx.activate, model, {"default": 0.5}),
        "off": message(peftfx.disabled(model).__enter__),
        "late": message(backend.bind, shard(base()), (X,)),
    }
    plain = base()
    Backend(SPEC, "eager").bind(plain, (X,))
    peftfx.add(plain, SPEC, "b", (X,))
    shard(plain)
    found["activate"] = message(peftfx.activate, plain, "b")
    return found


@scenario
def switched_off(rank: int, world: int, directory: Path) -> tuple[Tensor, Tensor]:
    """Marks alone can be off."""
    model, _ = bound(2, LORA)
    with peftfx.disabled(model):
        return model(X).detach(), base()(X).detach()


@scenario
def tensor_parallel(rank: int, world: int, directory: Path) -> dict[str, str]:
    """Weights and activations in shards: refused, run and merged."""
    model = base()
    mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    Backend(SPEC, "eager").bind(model, (X,))
    return {"run": message(model, X), "merge": message(peftfx.merge, model)}
