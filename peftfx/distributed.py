"""What ``torch.distributed`` makes of a model's parameters: shards, and sums of gradients.

FSDP2 holds on to the parameter objects that it was given and puts them back at every run; DDP sums
the gradients of those that it was given, and of no others. What comes later would train on each
process by itself, or be undone without a word, so that it is refused.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from peftfx import dynamo
from peftfx.errors import BindError


def _class(module: str, name: str) -> type[Any]:
    """A class of torch's that no object can be of before its module was imported."""
    return getattr(sys.modules.get(module), name, _Nothing)


class _Nothing:
    pass


def is_shard(tensor: Tensor) -> bool:
    """Whether this process holds a part of *tensor* only."""
    return isinstance(tensor, _class("torch.distributed.tensor", "DTensor"))


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 manages parameters of *model*."""
    managed = _class("torch.distributed.fsdp", "FSDPModule")
    return any(isinstance(m, managed) for m in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """*tensor* with all its parts; every process of its mesh has to ask."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def put(into: Tensor, value: Tensor) -> None:
    """Copies the whole *value* into a tensor or a shard of one; of a shard's, the first process's.

    Every process of its mesh has to do so.
    """
    if is_shard(into):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(into.device, into.dtype)
        value = distribute_tensor(value, into.device_mesh, into.placements)  # type: ignore[attr-defined]
    into.copy_(value)


def by_one(model: nn.Module, write: Callable[[], None]) -> None:
    """Calls *write*; of processes that share a sharded model, the first one does and all wait."""
    if not any(is_shard(p) for p in model.parameters()):
        write()
        return
    try:
        if dist.get_rank() == 0:
            write()
    finally:
        dist.barrier()


def refuse_shards(model: nn.Module, what: str) -> None:
    """Raises :class:`BindError` where FSDP2 would put the parameters back that *what* changes."""
    if is_sharded(model) or any(is_shard(p) for p in model.parameters()):
        raise BindError(
            f"{what}: the parameters are sharded, and who sharded them puts them back",
            remedy="do so before fully_shard(model), or on a model that is not sharded",
        )


def refuse_unsummed(model: nn.Module, trained: Iterable[Tensor]) -> None:
    """Raises :class:`BindError` where *trained* are not among what a DDP around *model* sums."""
    trained = [t for t in trained if t.requires_grad]
    if not (trained and dist.is_available() and dist.is_initialized()):
        return
    if not _unsummed(model, trained):
        return
    gc.collect()  # wrappers that nobody holds any more
    if _unsummed(model, trained):
        raise BindError(
            "the model is in DistributedDataParallel, which sums the gradients of the parameters "
            "that it was given: these are not among them",
            remedy="bind and activate first, then wrap; wrap anew for another adapter",
        )


def _unsummed(model: nn.Module, trained: Iterable[Tensor]) -> bool:
    for found in gc.get_objects():
        if not issubclass(type(found), DistributedDataParallel):
            continue
        summed = {id(p) for p in dynamo.summed(found)}
        within = any(m is model for m in found.modules())
        if within and not all(id(t) in summed for t in trained):
            return True
    return False
