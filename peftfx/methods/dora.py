"""DoRA: LoRA on the direction of each row of the weight, and its length on its own.

    W' = m ⊙ (W + s·B·A) / ‖W + s·B·A‖    row by row (by output feature), the norm without gradient

Liu et al., 2024 (arXiv 2402.09353, section 4.3 for the norm). The norms are one op, which never
forms W + s·B·A (``peftfx::low_rank_norms``). The product is LoRA's, so that it is fused and grouped
as LoRA's is; what is behind it is a factor for each output.

With dropout PEFT also drops the inputs of the frozen part, ``(m/‖·‖ - 1)·W·drop(x)``; here, as in
LoRA, only those of the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

import peftfx.kernels.low_rank_norms.op  # noqa: F401 - defines the op used below
from peftfx.errors import SpecError
from peftfx.methods.additive import CONV, LINEAR, channels, wide
from peftfx.methods.lora import LORA, LoRA
from peftfx.methods.method import Acts, Call, Method, Param, Tensors
from peftfx.methods.peft import LINEARS, PeftForm
from peftfx.site import Site


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation: LoRA with a trained magnitude for each output."""

    name: ClassVar[str] = "dora"
    kinds: ClassVar[tuple[str, ...]] = (*LINEAR, "embedding", *CONV)
    reads: ClassVar[tuple[str, ...]] = ("weight", "bias")
    paper: ClassVar[str] = "arXiv 2402.09353"
    peft: ClassVar[PeftForm | None] = replace(
        LORA,
        options={theirs: ours for theirs, ours in LORA.options.items() if theirs != "lora_bias"},
        fixed={"use_dora": True},
        kinds=(*LINEARS, "embedding", *CONV),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate:
            raise SpecError("a magnitude is of one weight for all tokens", remedy="method: lora")

    def accepts(self, site: Site) -> str | None:
        if int(site.attrs.get("groups", 1)) > 1:
            return "a grouped convolution has no W + B·A to take the norm of"
        return super().accepts(site)

    def acts_at(self, site: Site) -> Acts:
        return "output"

    def params(self, site: Site) -> dict[str, Param]:
        n = site.out_features
        shape = (1, n, *(1 for _ in site.shape[2:])) if site.kind in CONV else (n,)
        return {**super().params(site), "magnitude": Param(shape, torch.nn.init.ones_)}

    def start(self, w: Tensor, p: Tensors, site: Site) -> None:
        super().start(w, p, site)
        scale = torch.tensor([self.factor()], device=w.device)
        norm = self._norm({**p, "base.weight": w, "scale": scale}, site)
        p["magnitude"].copy_(norm.reshape(p["magnitude"].shape))

    def _norm(self, p: Tensors, site: Site) -> Tensor:
        """Lengths of the rows of W + s·B·A, [N], fp32 at least."""
        w = p["base.weight"].detach()
        w = w.t() if site.kind in ("hf_conv1d", "embedding") else w.flatten(1)  # [N, K]
        a, b = (t.detach().flatten(1) for t in self.factors(p, site))
        return torch.ops.peftfx.low_rank_norms(w, a, b, p["scale"])  # type: ignore[no-any-return]

    def _gain(self, p: Tensors, site: Site) -> Tensor:
        norm = self._norm(p, site).clamp_min(torch.finfo(wide(p["A"])).tiny)
        return p["magnitude"].reshape(-1) / norm  # [N]

    def apply(self, y: Tensor | None, x: Tensor, p: Tensors, call: Call) -> Tensor:
        assert y is not None
        out = super().apply(y, x, p, call)
        gain = channels(self._gain(p, call.weight), call.kind)
        if "base.bias" not in p:
            return (out * gain).to(y.dtype)
        bias = channels(p["base.bias"], call.kind)
        return ((out - bias) * gain + bias).to(y.dtype)

    def merge(self, w: Tensor, p: Tensors, site: Site) -> Tensor:
        gain = self._gain(p, site)
        shape = (1, -1) if site.kind in ("hf_conv1d", "embedding") else (-1, *(1,) * (w.ndim - 1))
        moved = w.to(wide(w)) + self.delta(p, site).to(wide(w))
        return (moved * gain.reshape(shape)).to(w.dtype)

    def merge_bias(self, bias: Tensor | None, p: Tensors, site: Site) -> Tensor | None:
        moved = super().merge_bias(bias, p, site)
        base = p.get("base.bias")
        if moved is None or base is None or moved is base:
            return moved
        return ((moved - base) * self._gain(p, site) + base).to(moved.dtype)

    def weight_form(self, site: Site) -> str | None:
        return "dora changes what a module computes, and this module is never called"

    def mix(
        self, parts: Sequence[tuple[float, Method, Tensors]], site: Site
    ) -> tuple[Method, dict[str, Tensor]]:
        return Method.mix(self, parts, site)  # not a sum of updates
