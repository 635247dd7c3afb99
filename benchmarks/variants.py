"""Variants of one model: frozen alone, adapted by peftfx, by PEFT, by others' orders of products.

They share the model's frozen parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import peftfx
from benchmarks.models import Layer, Sites
from benchmarks.peers import ORDERS, Ordered, Plain, why_no_peft, with_peft
from benchmarks.registry import Setting
from peftfx.backends import Backend


@dataclass(frozen=True)
class Adapter:
    """What all variants train: rank, scale, dropout. ``example``: inputs for binding.

    ``by_layer``: each layer is compiled by itself, so that equal layers share their graphs.
    """

    rank: int = 16
    scale: float = 2.0
    dropout: float = 0.0
    example: Any = None
    by_layer: bool = False


@dataclass
class Variant:
    """A model to run, and its trained tensors: all A's, then all B's, in the order of modules."""

    model: nn.Module
    factors: list[nn.Parameter]


Made = tuple[nn.Module, dict[str, nn.Parameter]]  # a model and what it trains, by name


def variant(name: str, base: nn.Module, adapter: Adapter, setting: Setting) -> Variant:
    """*base* as *name* of :data:`MAKERS` has it, compiled where that belongs to it.

    Raises:
        ModuleNotFoundError: what it needs is not installed.
    """
    shared = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    model, named = MAKERS[name](name, shared, adapter, setting)
    return Variant(model, _sorted(named))


def same_start(variants: dict[str, Variant]) -> None:
    """Gives all variants the same factors, B not zero."""
    generator = torch.Generator().manual_seed(1)
    longest = max((v.factors for v in variants.values()), key=len)
    with torch.no_grad():
        for number, like in enumerate(longest):
            value = torch.randn(like.shape, generator=generator) * like.shape[-1] ** -0.5
            for one in variants.values():
                if one.factors:
                    one.factors[number].copy_(value)


def _frozen(name: str, model: nn.Module, adapter: Adapter, setting: Setting) -> Made:
    for part in _parts(model, adapter):
        setting.compiled(part)
    return model, {}


def _peftfx(name: str, model: nn.Module, adapter: Adapter, setting: Setting) -> Made:
    rule = {"method": "lora", "name": "*linears*", "rank": adapter.rank,
            "alpha": adapter.scale * adapter.rank, "dropout": adapter.dropout}  # fmt: skip
    backend = Backend({"rules": [rule]}, setting.lower)
    backend.bind(model, adapter.example)
    for part in _parts(model, adapter):
        part.compile(backend=backend, fullgraph=True)
    return model, dict(peftfx.named_parameters(model))


def _peft(name: str, model: nn.Module, adapter: Adapter, setting: Setting) -> Made:
    why = why_no_peft()
    if why is not None:
        raise ModuleNotFoundError(why)
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "linears" in n]
    made = with_peft(model, targets, adapter.rank, adapter.scale, adapter.dropout, name == "peft")
    if name.startswith("peft + compile"):
        for part in _parts(made, adapter):
            setting.compiled(part)
    return made, {n: p for n, p in made.named_parameters() if "lora_" in n}


def _other(name: str, model: nn.Module, adapter: Adapter, setting: Setting) -> Made:
    """Sites replaced. Of others' orders the rest of each layer is compiled, piece by piece."""
    named: dict[str, nn.Parameter] = {}
    for path, sites in [(p, m) for p, m in model.named_modules() if isinstance(m, Sites)]:
        other: nn.Module = (
            Plain(sites, adapter.rank, adapter.scale, adapter.dropout)
            if name == "plain torch"
            else Ordered(sites, name, adapter.rank, adapter.scale)
        )
        named |= {f"{path}.{n}": p for n, p in other.named_parameters()}
        if path:
            model.set_submodule(path, other)
        else:
            model = other
    for layer in (m for m in model.modules() if isinstance(m, Layer) and name in ORDERS):
        layer.pieces = {n: torch.compile(f, backend=setting.lower) for n, f in layer.pieces.items()}
    return model, named


MAKERS: dict[str, Callable[[str, nn.Module, Adapter, Setting], Made]] = {
    "frozen": _frozen,
    "peftfx": _peftfx,
    "peft": _peft,
    "peft, bf16 adapters": _peft,
    "peft + compile, bf16 adapters": _peft,
    **dict.fromkeys(ORDERS, _other),
    "plain torch": _other,
}
ALL = tuple(name for name in MAKERS if name != "plain torch")


def _parts(model: nn.Module, adapter: Adapter) -> list[nn.Module]:
    """What is compiled by itself."""
    return [m for m in model.modules() if isinstance(m, Layer)] if adapter.by_layer else [model]


def _sorted(named: dict[str, nn.Parameter]) -> list[nn.Parameter]:
    """A's before B's; within each, by module."""

    def is_b(name: str) -> bool:
        return "lora_B" in name or "B" in name.split(".")[-2:]

    return [named[name] for name in sorted(named, key=is_b)]
