"""Which tokens are which: how marks that act at chosen positions learn of padding and of caches.

A hook before the module that is given ids and mask counts the tokens of each row; marks inside read
what it counted. With a cache that has something in it, a generation goes on: what acts on positions
of the prompt has nothing to do. A mark that fires when nothing was counted was reached around that
module, or by a checkpoint that runs again after the call: it refuses.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftfx.errors import NotAdaptedError
from peftfx.hooks import hooked, unhook
from peftfx.sequence import fresh

_PLACES = "_peftfx_places"
_IDS = ("input_ids", "inputs_embeds")


@dataclass(eq=False)
class Places:
    """The ranks of tokens in the call at hand.

    ``ranks`` ``[2, B, S]``: of each token among those of its row that are not padding, from the
    front and from the back, both from 0; -1 for padding. ``host`` is the path of the module that is
    given the mask, None where there is none, and ``names`` are that module's parameters. Where the
    mask is not for ids (as in models of images and sound), the ranks are those of a sequence
    without padding.
    """

    host: str | None = None
    names: tuple[str, ...] = ()
    ranks: Tensor | None = None
    goes_on: bool = False  # the call continues a generation
    entries: list[Any] = field(default_factory=list)

    @property
    def of_ids(self) -> bool:
        """Whether the mask is one for ids."""
        return any(name in self.names for name in _IDS)

    @property
    def state(self) -> str:
        """That of a mark, see :class:`peftfx.methods.key.Key`."""
        return "skip" if self.goes_on else ""

    def of(self, y: Tensor) -> Tensor:
        """The ranks of the tokens of *y* ``[B, S, …]``."""
        if y.ndim < 3:
            raise NotAdaptedError(
                f"positions are those of sequences [B, S, …], and this is {tuple(y.shape)}",
                remedy="act at all positions",
            )
        if not self.of_ids:
            return _counted(torch.ones(y.shape[:2], dtype=torch.int64, device=y.device))
        if self.ranks is None:
            raise NotAdaptedError(
                "positions are asked for, and the module that is given the mask is not running",
                remedy="call the model, or its forward; checkpointed, compile it with peftfx",
            )
        if self.ranks.shape[1:] != y.shape[:2]:
            raise NotAdaptedError(
                f"{tuple(y.shape[:2])} tokens are here, and the mask was for "
                f"{tuple(self.ranks.shape[1:])}",
                remedy="choose layers at which the sequence is that of the ids",
            )
        return self.ranks


def watch(model: nn.Module, entry: Any, path: str) -> None:
    """Lets *entry*, a mark in the module at *path*, know the ranks of tokens."""
    at = _host(model, path)
    if at is None:
        entry.places = Places()
        return
    host = model.get_submodule(at)
    places = host.__dict__.get(_PLACES)
    if places is None:
        given = tuple(inspect.signature(host.forward).parameters)
        places = host.__dict__[_PLACES] = Places(at, given)
        host.register_forward_pre_hook(_count, with_kwargs=True)
        host.register_forward_hook(_forget, with_kwargs=True, always_call=True)
    places.entries += [] if any(e is entry for e in places.entries) else [entry]
    entry.places = places


def watched(model: nn.Module, places: Places) -> bool:
    """Whether what :func:`watch` did for a mark with these *places* is still in place."""
    if places.host is None:
        return True
    host = model.get_submodule(places.host)
    return host.__dict__.get(_PLACES) is places and hooked(host, _count)


def tidy(model: nn.Module) -> None:
    """Takes off what :func:`watch` did for entries that are not in the model any more."""
    alive = {id(m) for m in model.modules()}
    for host in model.modules():
        places = host.__dict__.get(_PLACES)
        if places is None:
            continue
        places.entries = [e for e in places.entries if id(e) in alive]
        if places.entries:
            continue
        del host.__dict__[_PLACES]
        unhook(host, _count, _forget)


def _host(model: nn.Module, path: str) -> str | None:
    """The nearest module around *path* that is given ids and their mask, or else any mask."""
    masked = None
    while path:
        path = path.rpartition(".")[0]
        given = inspect.signature(model.get_submodule(path).forward).parameters
        if "attention_mask" in given:
            if any(name in given for name in _IDS):
                return path
            masked = path
    return masked


def _count(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    places: Places = host.__dict__[_PLACES]
    if places.ranks is not None and not torch.compiler.is_compiling():
        raise NotAdaptedError(
            "the model runs twice at a time, and positions are those of one call",
            remedy="run a copy of the model in each thread",
        )
    named = {**dict(zip(places.names, args, strict=False)), **kwargs}
    if not places.of_ids:
        if named.get("attention_mask") is not None:
            raise NotAdaptedError(
                "a mask is given that is not one for ids: which tokens are padding is unknown",
                remedy="leave it out, or act at all positions",
            )
        return
    tokens = next((named[name] for name in _IDS if named.get(name) is not None), None)
    if tokens is None:
        raise NotAdaptedError("the model runs without input_ids and inputs_embeds")
    cache = named.get("past_key_values")
    places.goes_on = cache is not None and not fresh(cache)
    places.ranks = _counted(_real(named.get("attention_mask"), tokens))


def _forget(host: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
    places: Places = host.__dict__[_PLACES]
    places.ranks, places.goes_on = None, False


def _real(mask: Any, tokens: Tensor) -> Tensor:
    """Which tokens are not padding, ``[B, S]`` of 0 and 1."""
    size = tokens.shape[:2]
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
        if mask is None:
            raise NotAdaptedError("a mask of sliding windows alone does not show the padding")
    if mask is None:
        return torch.ones(size, dtype=torch.int64, device=tokens.device)
    if mask.ndim == 4:  # made by generate() for a static cache; the last query sees all tokens
        seen = mask[:, 0, -1, : size[1]]
        mask = (seen if seen.dtype == torch.bool else seen == 0).expand(size)
    elif mask.ndim != 2:
        raise NotAdaptedError(f"a mask of {mask.ndim} dimensions does not show the padding")
    return mask[:, -size[1] :].to(torch.int64)


def _counted(real: Tensor) -> Tensor:
    ahead = real.cumsum(-1) - 1
    behind = real.sum(-1, keepdim=True) - 1 - ahead
    return torch.where(real > 0, torch.stack([ahead, behind]), -1)
