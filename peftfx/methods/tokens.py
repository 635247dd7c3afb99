"""Chosen rows of a table are trained, the others stay: new tokens, or old ones with new meanings.

    E'[ids] = V

As HF PEFT's trainable tokens (0.21). At an embedding the rows of V come in the place of the base's;
at a head (a linear whose rows are tokens) their logits do. Where a rule names both names of a tied
table, both have one V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.errors import MergeError, PlanError, SpecError
from peftfx.methods.additive import plain
from peftfx.methods.method import Call, Method, Param, Tensors, option
from peftfx.methods.peft import Known, PeftForm, Placed
from peftfx.site import Site


class TokensForm(PeftForm):
    """``TRAINABLE_TOKENS``, or ``trainable_token_indices`` beside a LoRA."""

    def refusal(self, method: Method, site: Site) -> str | None:
        if site.kind == "linear" and not site.aliases:
            return f"PEFT trains tokens of embeddings, and {site.module} is a linear of its own"
        return None

    def more(self, placed: Placed) -> dict[str, Any]:
        ids = {m.ids for _, m in placed if isinstance(m, Tokens)}
        if len(ids) > 1:
            raise SpecError("PEFT has one list of tokens for all embeddings")
        return {"token_indices": list(ids.pop()), "init_weights": True}

    def besides(self, placed: Placed, main: Placed, free: Sequence[str]) -> Any:
        return {s.module: list(m.ids) for s, m in placed if isinstance(m, Tokens)}

    def rules(
        self, rule: dict[str, Any], content: Mapping[str, Any], sites: Mapping[str, Site] | None
    ) -> list[dict[str, Any]]:
        names = [*rule["name"], *_tied(rule["name"], sites)]
        return [{**rule, "name": names, "ids": content.get("token_indices") or []}]

    def rules_beside(
        self,
        method: str,
        value: Any,
        rule: Mapping[str, Any],
        content: Mapping[str, Any],
        known: Known | None,
    ) -> list[dict[str, Any]]:
        if not isinstance(value, Mapping):  # of the token embedding, whatever it is called
            value = {(known and known.table) or "embed_tokens": value}
        sites = known.weights if known is not None else None
        rules = []
        for module, ids in value.items():
            found = [n for n in sites or () if n.endswith(module)]
            names = [*(found or [f"*{module}"]), *_tied(found, sites)]
            rules.append({"method": method, "name": names, "ids": list(ids)})
        return rules


def _tied(names: Sequence[str], sites: Mapping[str, Site] | None) -> list[str]:
    """The modules whose weights are tied to those of *names*."""
    known = [site for n in names if (site := (sites or {}).get(n)) is not None]
    return [alias.rpartition(".")[0] for site in known for alias in site.aliases]


@dataclass(frozen=True, kw_only=True)
class Tokens(Method):
    """Trains the rows of chosen tokens in an embedding, and in the head that is tied to it."""

    name: ClassVar[str] = "tokens"
    kinds: ClassVar[tuple[str, ...]] = ("embedding", "linear")
    reads: ClassVar[tuple[str, ...]] = ("bias",)
    peft: ClassVar[PeftForm | None] = TokensForm(
        "TRAINABLE_TOKENS",
        keys={"rows": "{module}.trainable_tokens_delta"},
        special=("token_indices", "init_weights"),
        called={"ids": "token_indices"},
        kinds=("embedding", "linear"),
        beside="trainable_token_indices",
        beside_keys={"rows": "{module}.token_adapter.trainable_tokens_delta"},
        tied=True,
    )
    example: ClassVar[Mapping[str, Any]] = {"name": "*.embed_tokens", "ids": list(range(100))}

    ids: tuple[int, ...] = option("The rows to train.", ())

    def __post_init__(self) -> None:
        if len(set(self.ids)) < len(self.ids) or any(i < 0 for i in self.ids):
            raise SpecError(f"ids is {self.ids[:8]}", remedy="each row once, counted from 0")

    def accepts(self, site: Site) -> str | None:
        return super().accepts(site) or plain(site)

    def check(self, site: Site) -> None:
        if not self.ids:
            raise PlanError("no rows are named", remedy="write `ids: [...]` in the rule")
        if max(self.ids) >= site.shape[0]:
            raise PlanError(f"there is no row {max(self.ids)}", remedy=f"it has {site.shape[0]}")

    def params(self, site: Site) -> dict[str, Param]:
        tie = min(site.name, *site.aliases) if site.aliases else None
        return {"rows": Param((len(self.ids), site.shape[1]), torch.nn.init.zeros_, shared=tie)}

    def buffers(self, site: Site) -> dict[str, Tensor]:
        ids = torch.tensor(self.ids, dtype=torch.int64)
        return {"ids": ids, "order": ids.argsort()}

    def start(self, w: Tensor, p: Tensors, site: Site) -> None:
        p["rows"].copy_(w[torch.tensor(self.ids, device=w.device)])

    def apply(self, y: Tensor | None, x: Tensor, p: Tensors, call: Call) -> Tensor:
        assert y is not None
        rows = p["rows"].to(y.dtype)
        if call.kind == "linear":
            bias = p["base.bias"][p["ids"]].to(y.dtype) if "base.bias" in p else None
            return y.index_copy(-1, p["ids"], F.linear(x.to(y.dtype), rows, bias))
        ids = p["ids"][p["order"]]
        near = torch.searchsorted(ids, x).clamp_max(p["ids"].shape[0] - 1)
        found = F.embedding(p["order"][near], rows) * call.attrs.get("embed_scale", 1.0)
        return torch.where((ids[near] == x).unsqueeze(-1), found, y)

    def merge(self, w: Tensor, p: Tensors, site: Site) -> Tensor:
        return w.index_copy(0, p["ids"], p["rows"].to(w.dtype))

    def weight_form(self, site: Site) -> str | None:
        return None

    def mix(
        self, parts: Sequence[tuple[float, Method, Tensors]], site: Site
    ) -> tuple[Method, dict[str, Tensor]]:
        """``base + Σ wᵢ (Vᵢ - base)`` at the rows that any of them trains."""
        base = parts[0][2]["base"]
        ids = sorted({i for _, m, _ in parts for i in getattr(m, "ids", ())})
        if not ids:
            raise MergeError("there are no rows to mix", site=site.name)
        moved = base.detach().to(parts[0][2]["rows"].dtype, copy=True)
        for weight, _, p in parts:
            moved.index_add_(0, p["ids"], weight * (p["rows"] - base[p["ids"]]).to(moved.dtype))
        mixed = replace(self, ids=tuple(ids))
        buffers = {n: t.to(base.device) for n, t in mixed.buffers(site).items()}
        return mixed, {"rows": moved[buffers["ids"]], **buffers}
