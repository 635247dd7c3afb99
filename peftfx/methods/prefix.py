"""Prefix tuning: trained keys and values at every attention call. Li & Liang, 2021 (2101.00190).

head = softmax(q·[Pk; k]ᵀ·s)·[Pv; v],   [Pk, Pv] = W₂·tanh(W₁·e) where an MLP makes them

With a gate, g(x)·Pk and g(x)·Pv stand in their place, as in UniPELT (:mod:`peftfx.methods.gates`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.errors import MergeError, SpecError
from peftfx.methods import gates
from peftfx.methods.method import Acts, Call, Method, Param, option
from peftfx.methods.peft import PeftForm
from peftfx.methods.peft_prompt import PrefixForm
from peftfx.methods.soft_prompt import LONGEST
from peftfx.site import Site


@dataclass(frozen=True, kw_only=True)
class Prefix(Method):
    """Trains keys and values that every query sees in front of its own.

    Shapes, for N key heads of width D: keys and values ``[N, length, D]`` at each site, normal
    noise or zeros (neither of which is the base). With an MLP, a site has W₂ alone, and e
    ``[length, width]`` and W₁ are the rule's. Keys are not rotated; tokens stand behind the prefix.
    """

    name: ClassVar[str] = "prefix"
    acts: ClassVar[Acts] = "attention"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "hf_conv1d")
    baked: ClassVar[tuple[str, ...]] = ("length", "mlp", "gate")
    paper: ClassVar[str] = "arXiv 2101.00190"
    example: ClassVar[Mapping[str, Any]] = {"name": "*.q_proj"}
    peft: ClassVar[PeftForm | None] = PrefixForm(
        "PREFIX_TUNING",
        keys={},
        called={"length": "num_virtual_tokens"},
        defaults={"prefix_projection": False, "encoder_hidden_size": None, "init_weights": None},
    )

    length: int = option("Number of virtual keys.", 20)
    init: Literal["random", "zeros"] = option("Start of keys and values.", "random")
    mlp: bool = option("Keys and values are made by an MLP.", False)
    hidden: int = option("Hidden width of the MLP; 0: as wide as its input.", 0)
    width: int = option("Width of the MLP's input; 0: that of all key heads.", 0)
    gate: Literal["token", "sequence"] | None = option(
        "A trained gate of keys and values, by token or sequence.", None
    )

    def __post_init__(self) -> None:
        for name, least, most in (
            ("length", 1, LONGEST),
            ("hidden", 0, 2**20),
            ("width", 0, 2**20),
        ):
            if not least <= (value := getattr(self, name)) <= most:
                raise SpecError(f"{name} is {value}", remedy=f"between {least} and {most}")

    def over(self, sites: Sequence[Site]) -> Method:
        if not self.mlp:
            return self
        width = self.width or sites[0].attrs["kv_heads"] * sites[0].attrs["head_dim"]
        return replace(self, width=width, hidden=self.hidden or width)

    def params(self, site: Site) -> dict[str, Param]:
        heads, d, e = (int(site.attrs[n]) for n in ("kv_heads", "head_dim", "value_dim"))
        start = torch.nn.init.normal_ if self.init == "random" else torch.nn.init.zeros_
        gate = gates.params(site.in_features) if self.gate else {}
        if not self.mlp:
            shapes = {"keys": (heads, self.length, d), "values": (heads, self.length, e)}
            return {name: Param(shape, start) for name, shape in shapes.items()} | gate
        first = functools.partial(_uniform, bound=self.width**-0.5)  # as nn.Linear has it
        spread = functools.partial(_uniform, bound=self.hidden**-0.5)
        last = start if self.init == "zeros" else spread
        return {
            "embeddings": Param((self.length, self.width), torch.nn.init.normal_, shared="rule"),
            "weight1": Param((self.hidden, self.width), first, shared="rule"),
            "bias1": Param((self.hidden,), first, shared="rule"),
            "weight2": Param((heads * (d + e), self.hidden), last),
            "bias2": Param((heads * (d + e),), last),
            **gate,
        }

    def front(self, p: Mapping[str, Tensor], call: Call) -> tuple[Tensor, Tensor]:
        if not self.mlp:
            return p["keys"], p["values"]
        heads, d = int(call.attrs["kv_heads"]), int(call.attrs["head_dim"])
        made = torch.tanh(F.linear(p["embeddings"], p["weight1"], p["bias1"]))
        rows = F.linear(made, p["weight2"], p["bias2"])  # [P, N·D + N·D]
        parts = (rows[:, : heads * d], rows[:, heads * d :])
        keys, values = (t.unflatten(1, (heads, -1)).transpose(0, 1) for t in parts)
        return keys, values

    def opened(self, x: Tensor, p: Mapping[str, Tensor], call: Call) -> Tensor | None:
        return gates.opened(self.gate, x, p) if self.gate else None

    def finished(self) -> Method:
        return replace(self, mlp=False, hidden=0, width=0)

    def finish(self, p: Mapping[str, Tensor], site: Site) -> dict[str, Tensor]:
        keys, values = self.front(p, Call(site, training=False))
        gate = {name: t for name, t in p.items() if name.startswith("gate")}
        return {"keys": keys, "values": values, **gate}

    def merge(self, w: Tensor, p: Mapping[str, Tensor], site: Site) -> Tensor:
        raise MergeError(
            "keys and values of a prefix are no change of a weight",
            site=site.name,
            remedy="keep the adapter unmerged",
        )


def _uniform(t: Tensor, bound: float) -> None:
    torch.nn.init.uniform_(t, -bound, bound)
