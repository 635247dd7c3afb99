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
TRANSPOSED = {
    "conv_transpose1d": F.conv_transpose1d,
    "conv_transpose2d": F.conv_transpose2d,
    "conv_transpose3d": F.conv_transpose3d,
}
LINEAR = ("linear", "hf_conv1d", "attention")
TABLE = ("embedding", "embedding_bag")


def kaiming(t: Tensor) -> None:
    """He et al.'s uniform noise, as ``nn.Linear`` starts with."""
    torch.nn.init.kaiming_uniform_(t, a=math.sqrt(5))


def plain(site: Site) -> str | None:
    """None if the call of the site's module is linear in its weight, else the reason why not."""
    if site.attrs.get("padding_mode", "zeros") != "zeros":
        return f"padding_mode={site.attrs['padding_mode']!r} is not supported"
    if site.attrs.get("max_norm") is not None:
        return "an embedding with max_norm rewrites its own weight"
    if site.attrs.get("mode") == "max":
        return "a bag's maximum is not linear in its weight"
    return None


def wide(t: Tensor) -> torch.dtype:
    """The dtype to merge in: fp32 at least."""
    return torch.promote_types(t.dtype, torch.float32)


def channels(v: Tensor, kind: str) -> Tensor:
    """A vector over features, shaped to go with a module's input or output."""
    spatial = int(kind[-2]) if kind in (*CONV, *TRANSPOSED) else 0
    return v.reshape(-1, *(1 for _ in range(spatial)))


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
        if call.kind == "hf_conv1d":
            return y + x @ w
        if call.kind in LINEAR:
            return y + F.linear(x, w)
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
    ``[N, R/g, 1, …]`` in the base's groups (as HF PEFT has it; with g > 1 there is no merge); a
    transposed one ``[K, N/g, *k]``: A ``[K, R/g, *k]``, B ``[N, R/g, 1, …]``, both in groups; a
    stack of matrices ``[E, N, K]``: A ``[E, R, K]``, B ``[E, N, R]``.
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
        if call.kind in TABLE:
            update = self._looked_up(x, a, scale, call) @ b.t()
        else:
            if call.seed is not None:
                x = torch.ops.peftfx.dropout(x, call.seed, self.dropout, call.site)
            update = self._convolved(x.to(y.dtype), a, b, scale, call)
        if bias is not None:
            update = update + channels(bias.to(y.dtype) * scale, call.kind)
        return y + update

    def _looked_up(self, x: Tensor, a: Tensor, scale: Tensor, call: Call) -> Tensor:
        """What a table of A's columns gives, scaled, ``[..., R]``."""
        attrs = call.attrs
        if call.kind == "embedding":
            found = F.embedding(x, a.t(), padding_idx=attrs["padding_idx"])
            return found * (scale * attrs.get("embed_scale", 1.0))
        weights = call.given.get("per_sample_weights")
        found = F.embedding_bag(
            x, a.t(), call.given.get("offsets"), mode=attrs["mode"],
            per_sample_weights=None if weights is None else weights.to(a.dtype),
            include_last_offset=attrs["include_last_offset"], padding_idx=attrs["padding_idx"],
        )  # fmt: skip
        return found * scale

    def _convolved(self, x: Tensor, a: Tensor, b: Tensor, scale: Tensor, call: Call) -> Tensor:
        """B's convolution, a pointwise one, of A's."""
        attrs, kernel = call.attrs, call.attrs["kernel_size"]
        along = (attrs["stride"], attrs["padding"])
        if call.kind in CONV:
            a = a.reshape(-1, call.weight.in_features, *kernel)
            s = CONV[call.kind](x, a, None, *along, attrs["dilation"])
        else:
            a = a.reshape(call.weight.in_features, -1, *kernel)
            spare, groups = attrs["output_padding"], attrs["groups"]
            s = TRANSPOSED[call.kind](x, a, None, *along, spare, groups, attrs["dilation"])
        b = b.reshape(call.weight.out_features, -1, *(1 for _ in kernel))
        return CONV[f"conv{len(kernel)}d"](s * scale, b, groups=attrs["groups"])

    def delta(self, p: Tensors, site: Site) -> Tensor:
        if site.kind in CONV and site.groups > 1:
            raise MergeError(
                "A sees all channels and the grouped weight only its own: no merged form",
                site=site.name,
                remedy="keep the adapter unmerged",
            )
        a, b = self.factors(p, site)
        a, b, scale = (t.to(wide(t)) for t in (a, b, p["scale"]))
        if site.kind in TRANSPOSED:
            a = a.reshape(
                site.groups, -1, a.shape[1], math.prod(site.shape[2:])
            )  # [g, K/g, R/g, k]
            b = b.reshape(site.groups, -1, b.shape[1])  # [g, N/g, R/g]
            product = torch.einsum("gkrs,gnr->gkns", a, b)
        elif site.kind == "parameter":
            product = b @ a
            product = product.mT if site.axes == (-1, -2) else product
        else:
            product = b.flatten(1) @ a.flatten(1)  # [N, K]
            product = product.t() if site.axes == (1, 0) else product
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

        width, across = _ranks(site)
        factors = []
        for weight, method, p in parts:
            assert isinstance(method, LowRank)
            a, b = method.factors(p, site)
            factors.append((a, b * (weight * p["scale"])))
        groups = site.groups if site.kind in CONV else 1
        a = _join([a for a, _ in factors], width, groups)  # rows of one group stay together
        tensors = {"A": a, "B": torch.cat([b for _, b in factors], dim=across)}
        biases = [p["bias"] * (w * p["scale"]) for w, _, p in parts if "bias" in p]
        if biases:
            tensors["bias"] = torch.stack(biases).sum(0)
        rank = a.shape[width] * (site.groups if site.kind in TRANSPOSED else 1)
        mixed = LoRA(rank=rank, alpha=float(rank), bias=bool(biases))
        tensors["scale"] = torch.ones_like(parts[0][2]["scale"])
        return mixed, tensors


def _ranks(site: Site) -> tuple[int, int]:
    """The axes of A and of B that are the rank."""
    if site.kind in TRANSPOSED:
        return 1, 1
    return (1, 2) if len(site.shape) == 3 and site.kind == "parameter" else (0, 1)


def _join(parts: list[Tensor], axis: int, groups: int) -> Tensor:
    chunks = [t.chunk(groups, axis) for t in parts]
    return torch.cat([c for group in zip(*chunks, strict=True) for c in group], axis)
