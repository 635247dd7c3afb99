"""Scenarios under DistributedDataParallel: the orders of binding, wrapping and compiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import peftfx
from peftfx.backends import Backend
from peftfx.errors import BindError
from tests.architectures import by_name
from tests.distributed.worker import scenario
from tests.helpers import fill
from tests.state.bench import SPEC, X, base

RULES = [
    {"method": "lora", "role": ["attention.query", "mlp.down"], "rank": 3},
    {"method": "prefix", "role": "attention", "length": 3, "mlp": True, "hidden": 6},
    {"method": "prompt", "role": "tokens", "length": 2},
]


@scenario
def gradients_of_bert(rank: int, world: int, directory: Path) -> dict[str, Tensor]:
    """Compiled in place, then wrapped; each process has its share of a batch of eight."""
    model = by_name("bert").build()
    peftfx.adapt(model, {"rules": RULES}, lower="aot_eager")
    fill(peftfx.parameters(model))
    wrapped = DistributedDataParallel(model) if world > 1 else model
    ids = torch.randint(3, 61, (8, 7), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 0] % 3
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    wrapped(input_ids=ids[share], labels=labels[share]).loss.backward()
    return {n: p.grad for n, p in peftfx.named_parameters(wrapped) if p.grad is not None}


def trained(rank: int, world: int, order: str) -> dict[str, Tensor]:
    """Three steps of AdamW on four samples."""
    model = base()
    backend = Backend(SPEC, "aot_eager")
    backend.bind(model, (X,))
    fill(peftfx.parameters(model))
    if order == "compile, wrap":
        model.compile(backend=backend)
    run: Any = DistributedDataParallel(model) if world > 1 else model
    if order == "wrap, compile":
        run = torch.compile(run, backend=backend)
    optimizer = torch.optim.AdamW(peftfx.parameters(run), lr=0.05)
    share = slice(rank * 4 // world, (rank + 1) * 4 // world)
    for _ in range(3):
        run(X[share]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: t.clone() for n, t in peftfx.state_dict(run).items()}


@scenario
def compiled_then_wrapped(rank: int, world: int, directory: Path) -> dict[str, Tensor]:
    return trained(rank, world, "compile, wrap")


@scenario
def wrapped_then_compiled(rank: int, world: int, directory: Path) -> dict[str, Tensor]:
    return trained(rank, world, "wrap, compile")


@scenario
def wrapped(rank: int, world: int, directory: Path) -> dict[str, Tensor]:
    return trained(rank, world, "wrap")


def refused(run: Any, *args: Any) -> str:
    try:
        run(*args)
    except Exception as error:
        seen: BaseException | None = error
        while seen is not None and not isinstance(seen, BindError):
            seen = seen.__cause__ or seen.__context__
        return "" if seen is None else str(seen)
    return ""


@scenario
def too_late(rank: int, world: int, directory: Path) -> dict[str, str]:
    """What would train on each process by itself is refused."""
    found = {}
    model = base()
    wrapped = DistributedDataParallel(model)
    backend = Backend(SPEC, "eager")
    found["bind the wrapper"] = refused(backend.bind, wrapped, (X,))
    found["bind what it wraps"] = refused(backend.bind, model, (X,))
    found["bind by the first call"] = refused(torch.compile(wrapped, backend=backend), X)
    assert not peftfx.is_adapted(model)
    del wrapped
    backend.bind(model, (X,))
    wrapped = DistributedDataParallel(model)
    peftfx.add(wrapped, SPEC, "b", (X,))
    found["activate another"] = refused(peftfx.activate, wrapped, "b")
    found["activate another inside"] = refused(peftfx.activate, model, "b")
    assert peftfx.adapters(model) == {"default": 1.0, "b": 0.0}
    return found


@scenario
def for_inference(rank: int, world: int, directory: Path) -> bool:
    """What does not train may come late; and what was wrapped may come back."""
    model = base()
    Backend(SPEC, "eager").bind(model, (X,))
    wrapped = DistributedDataParallel(model)
    before: Tensor = wrapped(X)
    peftfx.add(wrapped, SPEC, "b", (X,), trainable=False)
    peftfx.activate(wrapped, "b")
    peftfx.activate(wrapped, "default")
    with peftfx.disabled(wrapped):
        assert torch.equal(wrapped(X), base()(X))
    return torch.equal(wrapped(X), before)
