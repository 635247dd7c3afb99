"""What methods share that add an update to a weight: ``W' = W + ΔW``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import peftfx.kernels.low_rank_linear.op  # noqa: F401 - defines the ops used below
from peftfx.errors import MergeError, SpecError
from peftfx.methods.method import Call, Method, Tensors, option
from peftfx.site import Site

CONV = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}
LINEAR = ("linear", "hf_conv1d")


def kaiming(t: Tensor) -> None:
    """He et al.'s uniform noise, as ``nn.Linear`` starts with."""
    torch.nn.init.kaiming_uniform_(t, a=math.sqrt(5))


def plain(site: Site) -> str | None:
    """None if the call of the site's module is linear in its weight, else the reason why not."""
    if site.attrs.get("padding_mode", "zeros") != "zeros":
        return f"padding_mode={site.attrs['padding_mode']!r} is not supported"
    if site.attrs.get("max_norm") is not None:
        return "an embedding with max_norm rewrites its own weight"
    return None


def wide(t: Tensor) -> torch.dtype:
    """The dtype to merge in: fp32 at least."""
    return torch.promote_types(t.dtype, torch.float32)


def channels(v: Tensor, kind: str) -> Tensor:
    """A vector over output features, shaped to go with a module's output."""
    return v.reshape(-1, *(1 for _ in range(int(kind[4])))) if kind in CONV else v.reshape(-1)


@dataclass(frozen=True, kw_only=True)
class Additive(Method):
    """A method that states its update :meth:`delta`, in the layout of the weight."""

    kinds: ClassVar[tuple[str, ...]] = (*LINEAR, *CONV)

    def accepts(self, site: Site) -> str | None:
        return super().accepts(site) or plain(site)

    def delta(self, p: Tensors, site: Site) -> Tensor:
        """ΔW; of *site*, only kind, shape and attrs may be asked."""
        raise NotImplementedError

    def apply(self, y: Tensor | None, x: Tensor, p: Tensors, call: Call) -> Tensor:
        assert y is not None
        w, x, attrs = self.delta(p, call.weight).to(y.dtype), x.to(y.dtype), call.attrs
        if call.kind == "linear":
            return y + F.linear(x, w)
        if call.kind == "hf_conv1d":
            return y + x @ w
        return y + CONV[call.kind](
            x, w, None, attrs["stride"], attrs["padding"], attrs["dilation"], attrs["groups"]
        )

    def merge(self, w: Tensor, p: Tensors, site: Site) -> Tensor:
        return (w.to(wide(w)) + self.delta(p, site).to(wide(w))).to(w.dtype)

    def weight_form(self, site: Site) -> str | None:
        return None


@dataclass(frozen=True, kw_only=True)
class LowRank(Additive):
    """A method whose update is a product of two thin factors: ``ΔW = s·B·A``.

    For a linear ``[N, K]``: A ``[R, K]``, B ``[N, R]``; an embedding ``[V, D]``: A ``[R, V]``,
    B ``[D, R]``; a convolution ``[N, K/g, *k]``: A ``[R, K, *k]`` over all channels, B
    ``[N, R/g, 1, …]`` in the base's groups (as HF PEFT has it; with g > 1 there is no merge).
    """

    kinds: ClassVar[tuple[str, ...]] = LINEAR
    baked: ClassVar[tuple[str, ...]] = ("dropout",)

    dropout: float = option(
        "Probability with which an input is dropped before A, in training.", 0.0
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise SpecError(f"dropout is {self.dropout}", remedy="a dropout is in [0, 1)")

    def factors(self, p: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """A and B; of *site*, only kind, shape and attrs may be asked."""
        return p["A"], p["B"]

    def factor(self) -> float:
        """The scale s."""
        return 1.0

    def buffers(self, site: Site) -> dict[str, Tensor]:
        return {"scale": torch.tensor([self.factor()])}

    def draws(self, training: bool) -> bool:
        return training and self.dropout > 0

    def apply(self, y: Tensor | None, x: Tensor, p: Tensors, call: Call) -> Tensor:
        assert y is not None
        bias, scale = p.get("bias"), p["scale"]
        a, b = self.factors(p, call.weight)
        if call.kind in LINEAR:
            return torch.ops.peftfx.low_rank_add(  # type: ignore[no-any-return]
                y, x, a, b, bias, scale, call.seed, self.dropout, call.site
            )[0]
        a, b, scale = a.to(y.dtype), b.to(y.dtype), scale.to(y.dtype)
        attrs = call.attrs
        if call.kind == "embedding":
            s = F.embedding(x, a.t(), padding_idx=call.attrs["padding_idx"])  # [..., R]
            update = (s * scale) @ b.t() * attrs.get("embed_scale", 1.0)
        else:
            conv = CONV[call.kind]
            a = a.reshape(-1, call.weight.in_features, *attrs["kernel_size"])
            b = b.reshape(call.weight.out_features, -1, *(1 for _ in attrs["kernel_size"]))
            if call.seed is not None:
                x = torch.ops.peftfx.dropout(x, call.seed, self.dropout, call.site)
            s = conv(
                x.to(y.dtype), a, None,
                attrs["stride"], attrs["padding"], attrs["dilation"],
            )  # fmt: skip
            update = conv(s * scale, b, groups=attrs["groups"])
        if bias is not None:
            update = update + channels(bias.to(y.dtype) * scale, call.kind)
        return y + update

    def delta(self, p: Tensors, site: Site) -> Tensor:
        if site.kind in CONV and int(site.attrs["groups"]) > 1:
            raise MergeError(
                "A sees all channels and the grouped weight only its own: no merged form",
                site=site.name,
                remedy="keep the adapter unmerged",
            )
        a, b = self.factors(p, site)
        a, b, scale = (t.to(wide(t)) for t in (a, b, p["scale"]))
        product = b.flatten(1) @ a.flatten(1)  # [N, K], an embedding's is [D, V]
        if site.kind in ("hf_conv1d", "embedding"):
            product = product.t()
        return product.reshape(site.shape) * scale

    def merge_bias(self, bias: Tensor | None, p: Tensors, site: Site) -> Tensor | None:
        if "bias" not in p:
            return bias
        if bias is None:
            raise MergeError(
                "B has a bias, and the module that it merges into has none", site=site.name
            )
        return (bias + p["bias"] * p["scale"]).to(bias.dtype)

    def weight_form(self, site: Site) -> str | None:
        if self.dropout:
            return "dropout acts on what the weight's module is given, and it is never called"
        return None

    def mix(
        self, parts: Sequence[tuple[float, Method, Tensors]], site: Site
    ) -> tuple[Method, dict[str, Tensor]]:
        """Ranks are joined: ``Σ wᵢ sᵢ Bᵢ Aᵢ = [w₁s₁B₁ …]·[A₁; …]``."""
        from peftfx.methods.lora import LoRA

        groups = int(site.attrs.get("groups", 1))
        found = []
        for weight, method, p in parts:
            assert isinstance(method, LowRank)
            a, b = method.factors(p, site)
            found.append((a, b * (weight * p["scale"])))
        a = _join([a for a, _ in found], groups)  # rows of one group stay together
        tensors = {"A": a, "B": torch.cat([b for _, b in found], dim=1)}
        biases = [p["bias"] * (w * p["scale"]) for w, _, p in parts if "bias" in p]
        if biases:
            tensors["bias"] = torch.stack(biases).sum(0)
        rank = a.shape[0]
        mixed = LoRA(rank=rank, alpha=float(rank), bias=bool(biases))
        tensors["scale"] = torch.ones_like(parts[0][2]["scale"])
        return mixed, tensors


def _join(parts: list[Tensor], groups: int) -> Tensor:
    chunks = [t.chunk(groups) for t in parts]
    return torch.cat([chunk for group in zip(*chunks, strict=True) for chunk in group])
