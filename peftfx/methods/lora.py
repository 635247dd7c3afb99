"""LoRA: a frozen weight plus a product of two thin ones.

    W' = W + s·B·A,   s = alpha / rank,  or alpha / sqrt(rank) when rank-stabilised

Hu et al., 2021 (arXiv 2106.09685); rank-stabilised scale: Kalajdzievski, 2023 (arXiv 2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import peftfx.kernels.low_rank_linear.op  # noqa: F401 - defines the ops used below
from peftfx.errors import MergeError, PlanError, SpecError
from peftfx.methods.method import Acts, Call, Method, Param
from peftfx.site import Site

_CONV = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}


def _doc(text: str, default: Any) -> Any:
    return field(default=default, metadata={"doc": text})


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adaptation of linears, embeddings and convolutions.

    Shapes, for a linear ``[N, K]``: A ``[R, K]``, B ``[N, R]``; an embedding ``[V, D]``: A
    ``[R, V]``, B ``[D, R]``; a convolution ``[N, K/g, *k]``: A ``[R, K, *k]`` over all channels,
    B ``[N, R/g, 1, …]`` in the base's groups (as HF PEFT has it; with g > 1 there is no merge).
    A starts as He et al.'s uniform noise and B as zeros (an embedding's A as zeros and B as normal
    noise), so that the model starts as the base.
    """

    name: ClassVar[str] = "lora"
    kinds: ClassVar[tuple[str, ...]] = (
        "linear", "hf_conv1d", "embedding", "conv1d", "conv2d", "conv3d", "attention",
    )  # fmt: skip
    baked: ClassVar[tuple[str, ...]] = ("dropout", "bias")
    paper: ClassVar[str] = "arXiv 2106.09685"

    rank: int = _doc("Width R of the two factors.", 8)
    alpha: float = _doc("The update is scaled by alpha / rank.", 16.0)
    dropout: float = _doc("Probability with which an input is dropped before A, in training.", 0.0)
    rank_stabilized: bool = _doc("Scale by alpha / sqrt(rank) instead.", False)
    bias: bool = _doc("A trainable bias on B (PEFT's lora_bias).", False)

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 2**20:
            raise SpecError(f"rank is {self.rank}", remedy="a rank is between 1 and 1048576")
        if not 0.0 <= self.dropout < 1.0:
            raise SpecError(f"dropout is {self.dropout}", remedy="a dropout is in [0, 1)")
        if not math.isfinite(self.alpha):
            raise SpecError(f"alpha is {self.alpha}", remedy="alpha is a finite number")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def accepts(self, site: Site) -> str | None:
        packed = site.kind == "attention" and site.parameter == "in_proj_weight"
        reason = None if packed else super().accepts(site)
        if reason is None and site.attrs.get("padding_mode", "zeros") != "zeros":
            return f"padding_mode={site.attrs['padding_mode']!r} is not supported"
        if reason is None and site.attrs.get("max_norm") is not None:
            return "an embedding with max_norm rewrites its own weight"
        return reason

    def acts_at(self, site: Site) -> Acts:
        # what nn.MultiheadAttention projects is not among its inputs and outputs
        return "weight" if site.kind == "attention" else "output"

    def params(self, site: Site) -> dict[str, Param]:
        groups = int(site.attrs.get("groups", 1))
        bound = min(site.in_features * math.prod(site.shape[2:]), site.out_features)
        if self.rank > bound:
            raise PlanError(
                f"rank {self.rank} is larger than the weight {list(site.shape)} has",
                site=site.name,
                remedy=f"use a rank of at most {bound}",
            )
        if self.rank % groups:
            raise PlanError(
                f"rank {self.rank} cannot be split over {groups} groups",
                site=site.name,
                remedy=f"use a multiple of {groups}",
            )
        if site.kind.startswith("conv"):
            a = (self.rank, site.in_features, *site.shape[2:])
            b = (site.out_features, self.rank // groups, *(1 for _ in site.shape[2:]))
        else:
            a, b = (self.rank, site.in_features), (site.out_features, self.rank)
        if site.kind == "embedding":
            params = {"A": Param(a, torch.nn.init.zeros_), "B": Param(b, torch.nn.init.normal_)}
        else:
            params = {"A": Param(a, _kaiming), "B": Param(b, torch.nn.init.zeros_)}
        if self.bias:
            params["bias"] = Param((site.out_features,), torch.nn.init.zeros_)
        return params

    def buffers(self, site: Site) -> dict[str, Tensor]:
        return {"scale": torch.tensor([self.scale])}

    def draws(self, training: bool) -> bool:
        return training and self.dropout > 0

    def apply(self, y: Tensor | None, x: Tensor, p: Mapping[str, Tensor], call: Call) -> Tensor:
        assert y is not None
        bias = p.get("bias")
        if call.kind in ("linear", "hf_conv1d"):
            return torch.ops.peftfx.low_rank_add(  # type: ignore[no-any-return]
                y, x, p["A"], p["B"], bias, p["scale"], call.seed, self.dropout, call.site
            )[0]
        a, b, scale = p["A"].to(y.dtype), p["B"].to(y.dtype), p["scale"].to(y.dtype)
        if call.kind == "embedding":
            s = F.embedding(x, a.t(), padding_idx=call.attrs["padding_idx"])  # [..., R]
            update = (s * scale) @ b.t()
        else:
            conv, attrs = _CONV[call.kind], call.attrs
            if call.seed is not None:
                x = torch.ops.peftfx.dropout(x, call.seed, self.dropout, call.site)
            s = conv(
                x.to(y.dtype), a, None,
                attrs["stride"], attrs["padding"], attrs["dilation"],
            )  # fmt: skip
            update = conv(s * scale, b, groups=attrs["groups"])
        if bias is not None:
            shift = bias.to(y.dtype) * scale
            update = update + (shift if call.kind == "embedding" else _channels(shift, call.kind))
        return y + update

    def delta(self, p: Mapping[str, Tensor], site: Site) -> Tensor:
        """The update ``s·B·A`` in the layout of the site's weight, in at least fp32."""
        wide = torch.promote_types(p["A"].dtype, torch.float32)
        a, b, scale = p["A"].to(wide), p["B"].to(wide), p["scale"].to(wide)
        if site.kind.startswith("conv"):
            if int(site.attrs["groups"]) > 1:
                raise MergeError(
                    "A sees all channels and the grouped weight only its own: no merged form",
                    site=site.name,
                    remedy="keep the adapter unmerged",
                )
            return (b.flatten(1) @ a.flatten(1)).reshape(site.shape) * scale
        product = b @ a  # [N, K], an embedding's is [D, V]
        return (product.t() if site.kind in ("hf_conv1d", "embedding") else product) * scale

    def merge(self, w: Tensor, p: Mapping[str, Tensor], site: Site) -> Tensor:
        wide = torch.promote_types(w.dtype, torch.float32)
        return (w.to(wide) + self.delta(p, site).to(wide)).to(w.dtype)

    def merge_bias(self, bias: Tensor | None, p: Mapping[str, Tensor], site: Site) -> Tensor | None:
        if not self.bias:
            return bias
        if bias is None:
            raise MergeError("B has a bias, and the module that it merges into has none",
                             site=site.name)  # fmt: skip
        return (bias + p["bias"] * p["scale"]).to(bias.dtype)

    def weight_form(self, site: Site) -> str | None:
        if self.dropout or self.bias:
            return "dropout and a bias act on what the weight's module computes; it is never called"
        return None

    def mix(
        self, parts: Sequence[tuple[float, Method, Mapping[str, Tensor]]], site: Site
    ) -> tuple[Method, dict[str, Tensor]]:
        """Ranks are joined: ``Σ wᵢ sᵢ Bᵢ Aᵢ = [w₁s₁B₁ …]·[A₁; …]``."""
        groups = int(site.attrs.get("groups", 1))
        a = _join([p["A"] for _, _, p in parts], groups)  # rows of one group stay together
        b = torch.cat([p["B"] * (w * p["scale"]) for w, _, p in parts], dim=1)
        tensors = {"A": a, "B": b}
        biases = [p["bias"] * (w * p["scale"]) for w, _, p in parts if "bias" in p]
        if biases:
            tensors["bias"] = torch.stack(biases).sum(0)
        rank = a.shape[0]
        mixed = replace(
            self, rank=rank, alpha=float(rank), rank_stabilized=False, bias=bool(biases)
        )
        tensors["scale"] = torch.ones_like(parts[0][2]["scale"])
        return mixed, tensors


def _kaiming(t: Tensor) -> None:
    torch.nn.init.kaiming_uniform_(t, a=math.sqrt(5))


def _channels(v: Tensor, kind: str) -> Tensor:
    return v.view(-1, *(1 for _ in range(int(kind[4]))))  # conv2d: [N, 1, 1]


def _join(parts: list[Tensor], groups: int) -> Tensor:
    chunks = [t.chunk(groups) for t in parts]
    return torch.cat([chunk for group in zip(*chunks, strict=True) for chunk in group])
