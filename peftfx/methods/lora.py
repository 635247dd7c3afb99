"""LoRA: a frozen weight plus a product of two thin ones.

    W' = W + s·B·A,   s = alpha / rank,  or alpha / sqrt(rank) when rank-stabilised

Hu et al., 2021 (arXiv 2106.09685); rank-stabilised scale: Kalajdzievski, 2023 (arXiv 2312.03732);
LoRA+: Hayou et al., 2024 (arXiv 2402.12354); LoRA-FA: Zhang et al., 2023 (arXiv 2308.03303).

Starts: PiSSA, Meng et al., 2024 (arXiv 2404.02948), and OLoRA, Büyükakyüz, 2024 (arXiv 2406.01775),
begin with B·A = B₀·A₀ ≠ 0 taken from W. The papers subtract it from W; here the base stays as it is
and the update is ``s·(B·A - B₀·A₀) = s·[B, -B₀]·[A; A₀]``: the same function and gradients, exact
on a base of low precision, and nothing to undo. EVA, Paischer et al., 2024 (arXiv 2410.07170),
takes A from the inputs by ``peftfx.calibrate``.

With a gate the update is ``g(x)·s·B·A·x``, as in UniPELT (see :mod:`peftfx.methods.gates`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from peftfx.errors import CheckpointError, MergeError, PlanError, SpecError
from peftfx.methods import gates
from peftfx.methods.additive import CONV, LINEAR, TABLE, TRANSPOSED, LowRank, kaiming, wide
from peftfx.methods.method import Calibration, Call, Method, Param, Tensors, option
from peftfx.methods.part import cut, put
from peftfx.methods.peft import LINEARS, PeftForm, Placed
from peftfx.site import PACKED, Site

FROM_BASE = ("pissa", "olora")
_INIT = {
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "eva": "eva",
    **{n: n for n in FROM_BASE},
}


class LoraForm(PeftForm):
    """``LORA``; a start taken from the base is written as the LoRA of twice the rank that it is.

    Of a part of a weight, the rows of B that it has not are zeros. A stack of matrices is PEFT's
    ``target_parameters``: A ``[E·R, K]``, B ``[N, R·E]``.
    """

    def refusal(self, method: Method, site: Site) -> str | None:
        assert isinstance(method, LoRA)
        if site.kind in CONV and any(d != 1 for d in site.attrs["dilation"]):
            return f"PEFT drops the dilation of {site.module}"
        if site.kind == "attention" and site.parameter != PACKED:
            return f"PEFT adapts packed projections, and {site.module} has separate ones"
        if site.kind == "attention" and method.bias:
            return f"PEFT drops the bias on B at {site.module}"
        if method.bias and "bias" not in self.said:
            return f"PEFT has no {method.name} with a bias on B"
        if method.gate:
            return "PEFT has no gates"
        if set(method.params(site)) <= {"A", "B", "bias", "A0", "B0"}:
            site = replace(site, attrs={k: v for k, v in site.attrs.items() if k != "part"})
        return super().refusal(method, site)

    def value(self, method: Method, name: str) -> Any:
        found = super().value(method, name)
        assert isinstance(method, LoRA)
        if method.init in FROM_BASE and name == "rank":
            return 2 * found
        if method.init in FROM_BASE and name == "alpha":  # the scale stays
            return found * (math.sqrt(2) if method.rank_stabilized else 2)
        return found

    def more(self, placed: Placed) -> dict[str, Any]:
        every = all(site.kind == "hf_conv1d" for site, _ in placed)
        return {"fan_in_fan_out": every, "init_lora_weights": True, "bias": "none"}

    def fresh(self, method: Method) -> tuple[Method, dict[str, Any]]:
        assert isinstance(method, LoRA)
        start = True if method.init == "kaiming" else method.init
        return replace(method, init="kaiming"), {"init_lora_weights": start}

    def rules(
        self, rule: dict[str, Any], content: Mapping[str, Any], sites: Mapping[str, Site] | None
    ) -> list[dict[str, Any]]:
        start = content.get("init_lora_weights", True)
        if not isinstance(start, str):
            return [rule]
        if start.lower() not in _INIT:
            raise SpecError(
                f"init_lora_weights={start!r} is not supported: it changed the base weights",
                remedy="convert the adapter to a plain LoRA with PEFT's save_pretrained("
                "…, path_initial_model_for_weight_conversion=…)",
            )
        return [{**rule, "init": _INIT[start.lower()]}]

    def pack(self, method: Method, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = super().pack(method, site, p)
        if "A0" in p:
            found["A"] = torch.cat([p["A"], p["A0"]])
            found["B"] = torch.cat([p["B"], -p["B0"]], 1)
        for name, axis in _WIDE.items() if site.part else ():
            if name in found:
                shape = list(found[name].shape)
                shape[axis] = site.attrs["width"]
                found[name] = put(found[name].new_zeros(shape), found[name], site, axis)
        if found["A"].ndim == 3 and site.kind == "parameter":
            found["A"] = found["A"].flatten(0, 1)
            found["B"] = found["B"].permute(1, 2, 0).flatten(1)
        return found

    def unpack(self, method: Method, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(method, LoRA)
        r, found = method.rank, dict(p)
        if site.kind == "parameter" and len(site.shape) == 3:
            found = _stacked(found, site, r)
        for name, axis in _WIDE.items() if site.part else ():
            if name in found:
                part, zeros = cut(found[name], site, axis), torch.zeros_like(found[name])
                if not torch.equal(put(zeros, part, site, axis), found[name]):
                    raise CheckpointError("it has other rows than the spec says", site=site.name)
                found[name] = part
        if method.init not in FROM_BASE or found["A"].shape[:1] == (r,):
            return found  # a start taken from the base is made from it again
        a, b = found["A"], found["B"]
        if a.shape[:1] != (2 * r,) or b.shape[1:2] != (2 * r,):
            raise CheckpointError(f"its rank is neither {r} nor {2 * r}", site=site.name)
        return {**found, "A": a[:r], "A0": a[r:], "B": b[:, :r], "B0": -b[:, r:]}


_WIDE = {"B": -2, "bias": -1}  # where a tensor has the width of the output


def _stacked(p: dict[str, Tensor], site: Site, rank: int) -> dict[str, Tensor]:
    """A ``[E, R, K]`` and B ``[E, N, R]`` of PEFT's A ``[E·R, K]`` and B ``[N, R·E]``."""
    e, k, n = site.shape[0], site.in_features, int(site.attrs.get("width", site.out_features))
    for name, shape in (("A", (e * rank, k)), ("B", (n, rank * e))):
        if tuple(p[name].shape) != shape:
            raise CheckpointError(
                f"{name} is {list(p[name].shape)}, and {list(shape)} is needed", site=site.name
            )
    return {"A": p["A"].view(e, rank, k), "B": p["B"].view(n, rank, e).permute(2, 0, 1)}


LORA = LoraForm(
    "LORA",
    keys={
        "A": "{module}.lora_A.weight", "B": "{module}.lora_B.weight",
        "bias": "{module}.lora_B.bias", "magnitude": "{module}.lora_magnitude_vector",
    },
    of_tables={n: "{module}.lora_embedding_" + n for n in "AB"},
    joined=("A0", "B0"),
    options={"lora_dropout": "dropout", "use_rslora": "rank_stabilized", "lora_bias": "bias"},
    varied={"r": ("rank", "rank_pattern"), "lora_alpha": ("alpha", "alpha_pattern")},
    fixed={"use_dora": False},
    defaults={"lora_alpha": 8},
    special=("init_lora_weights", "fan_in_fan_out", "target_parameters"),
    called={"init": "init_lora_weights"},
    ignored=(
        "megatron_core", "loftq_config", "eva_config", "corda_config", "runtime_config",
        "qalora_group_size", "lora_ga_config",
    ),
    kinds=(*LINEARS, "embedding", *CONV, "attention", "parameter"),
    takes=("modules_to_save", "trainable_token_indices", "bias"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoRA(LowRank):
    """Low-rank adaptation of linears, embeddings and convolutions.

    A starts as He et al.'s uniform noise and B as zeros (an embedding's A as zeros and B as normal
    noise), so that the model starts as the base; it does so with every ``init``.
    """

    name: ClassVar[str] = "lora"
    kinds: ClassVar[tuple[str, ...]] = (*LINEAR, *TABLE, *CONV, *TRANSPOSED, "parameter")
    baked: ClassVar[tuple[str, ...]] = ("dropout", "bias", "gate")
    paper: ClassVar[str] = "arXiv 2106.09685"
    peft: ClassVar[PeftForm | None] = LORA

    rank: int = option("Width R of the two factors.", 8)
    alpha: float = option("The update is scaled by alpha / rank.", 16.0)
    rank_stabilized: bool = option("Scale by alpha / sqrt(rank) instead.", False)
    bias: bool = option("A trainable bias on B (PEFT's lora_bias).", False)
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva"] = option(
        "How A and B start; eva takes A from data, by peftfx.calibrate.", "kaiming"
    )
    freeze_a: bool = option("LoRA-FA: train B alone, so that the input is not kept.", False)
    plus: float = option("LoRA+: B's learning rate is that of A times this.", 1.0)
    gate: Literal["token", "sequence"] | None = option(
        "A trained gate of the update, by token or sequence.", None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.rank <= 2**20:
            raise SpecError(f"rank is {self.rank}", remedy="a rank is between 1 and 1048576")
        if not math.isfinite(self.alpha):
            raise SpecError(f"alpha is {self.alpha}", remedy="alpha is a finite number")
        if self.init == "pissa" and self.alpha <= 0:
            raise SpecError(
                f"alpha is {self.alpha}", remedy="a start by pissa takes a positive one"
            )
        if not 0.0 < self.plus < math.inf:
            raise SpecError(f"plus is {self.plus}", remedy="a ratio is positive; 16 is usual")
        if self.init == "orthogonal" and self.rank % 2:
            raise SpecError(f"rank is {self.rank}", remedy="an orthogonal start takes an even one")

    def factor(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def accepts(self, site: Site) -> str | None:
        if self.init not in ("kaiming", "gaussian") and site.kind not in LINEAR:
            return f"init {self.init} is for linears, this is {site.kind}"
        if self.gate and site.kind not in LINEAR:
            return f"a gate is of a linear's input, and this is {site.kind}"
        if site.kind == "parameter" and (reason := self.weight_form(site)) is not None:
            return reason
        return super().accepts(site)

    def check(self, site: Site) -> None:
        window = 1 if site.kind == "parameter" else math.prod(site.shape[2:])
        bound, groups = min(site.in_features * window, site.out_features), site.groups
        if self.rank > bound:
            raise PlanError(
                f"rank {self.rank} is larger than the weight {list(site.shape)} has",
                remedy=f"use a rank of at most {bound}",
            )
        if self.rank % groups:
            raise PlanError(
                f"rank {self.rank} cannot be split over {groups} groups",
                remedy=f"use a multiple of {groups}",
            )

    def params(self, site: Site) -> dict[str, Param]:
        zeros, normal = torch.nn.init.zeros_, torch.nn.init.normal_
        r, k, n = self.rank, site.in_features, site.out_features
        window = site.shape[2:]
        if site.kind in CONV:
            a, b = (r, k, *window), (n, r // site.groups, *(1 for _ in window))
        elif site.kind in TRANSPOSED:
            a, b = (k, r // site.groups, *window), (n, r // site.groups, *(1 for _ in window))
        else:
            stack = site.shape[:-2]  # of matrices
            a, b = (*stack, r, k), (*stack, n, r)
        first: Callable[[Tensor], object] = kaiming
        if self.init == "gaussian":
            first = lambda t: normal(t, std=1 / r)  # noqa: E731
        elif site.kind == "parameter":
            first = lambda t: kaiming(t.view(-1, k))  # noqa: E731 - each matrix by itself
        starts = (zeros, normal) if site.kind in TABLE else (first, zeros)
        params = {"A": Param(a, starts[0], not self.freeze_a), "B": Param(b, starts[1])}
        if self.bias:
            params["bias"] = Param((n,), zeros)
        if self.gate:
            params |= gates.params(k)
        if self.init in FROM_BASE:
            params |= {"A0": Param(a, zeros, False), "B0": Param(b, zeros, False)}
        return params

    def start(self, w: Tensor, p: Tensors, site: Site) -> None:
        w = w.to(wide(w))
        w = w.t() if site.kind == "hf_conv1d" else w
        r = self.rank
        if self.init == "orthogonal":  # B·A = 0 with neither zero: halves of one orthogonal basis
            q = torch.linalg.qr(torch.randn(r, r, device=w.device))[0]
            p["A"].copy_((torch.randn(w.shape[1], r // 2, device=w.device) @ q[0::2]).t() / 10)
            p["B"].copy_(torch.randn(w.shape[0], r // 2, device=w.device) @ q[1::2] / 10)
        if self.init not in FROM_BASE:
            return
        if self.init == "pissa":
            u, s, v = torch.linalg.svd(w, full_matrices=False)
            root = (s[:r] / self.factor()).sqrt()
            p["A"].copy_(root[:, None] * v[:r])
            p["B"].copy_(u[:, :r] * root)
        else:
            q, upper = torch.linalg.qr(w)
            p["A"].copy_(upper[:r])
            p["B"].copy_(q[:, :r])
        p["A0"].copy_(p["A"])
        p["B0"].copy_(p["B"])

    def calibration(self, site: Site) -> Calibration | None:
        return Eva(self.rank) if self.init == "eva" else None

    def lr_ratio(self, name: str) -> float:
        return self.plus if name == "B" else 1.0

    def factors(self, p: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        if "A0" not in p:
            return p["A"], p["B"]
        return torch.cat([p["A"], p["A0"]]), torch.cat([p["B"], -p["B0"]], 1)

    def apply(self, y: Tensor | None, x: Tensor, p: Tensors, call: Call) -> Tensor:
        if not self.gate:
            return super().apply(y, x, p, call)
        assert y is not None
        update = super().apply(torch.zeros_like(y), x, p, call)
        return y + gates.opened(self.gate, x.to(y.dtype), p) * update

    def merge(self, w: Tensor, p: Tensors, site: Site) -> Tensor:
        if self.gate:
            raise MergeError(
                "a gate goes by the input: no weight is equal to it",
                site=site.name,
                remedy="keep the adapter unmerged",
            )
        return super().merge(w, p, site)

    def mix(
        self, parts: Sequence[tuple[float, Method, Tensors]], site: Site
    ) -> tuple[Method, dict[str, Tensor]]:
        if any("gate" in p for _, _, p in parts):
            raise MergeError("adapters with gates cannot be mixed", site=site.name)
        return super().mix(parts, site)

    def weight_form(self, site: Site) -> str | None:
        if self.gate:
            return "a gate goes by what the weight's module is given, and it is never called"
        if self.bias:
            return "a bias acts on what the weight's module computes, and it is never called"
        return super().weight_form(site)


class Eva:
    """A's rows: the principal directions of the inputs, kept up to date batch by batch.

    More are kept than are asked for, so that one which grows late is not lost.
    """

    sees: Literal["input", "gradient"] = "input"
    SPARE = 4  # times the rank

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.kept: Tensor | None = None  # singular values times right singular vectors

    def see(self, value: Tensor) -> None:
        rows = value.detach().reshape(-1, value.shape[-1])
        rows = rows.to(wide(rows))
        if self.kept is not None:
            rows = torch.cat([self.kept, rows])
        _, s, v = torch.linalg.svd(rows, full_matrices=False)
        self.kept = s[: self.SPARE * self.rank, None] * v[: self.SPARE * self.rank]

    def fill(self, p: Tensors) -> None:
        assert self.kept is not None
        if self.kept.shape[0] < self.rank:
            raise PlanError(
                f"{self.kept.shape[0]} inputs were seen, for a rank of {self.rank}",
                remedy="calibrate on more data",
            )
        p["A"].copy_(torch.nn.functional.normalize(self.kept[: self.rank], dim=1))
        p["B"].zero_()
