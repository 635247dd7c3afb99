"""IA³: trained vectors that rescale what a module gives, or what it is given.

    y = l ⊙ (W·x + b)   or   y = W·(l ⊙ x) + b

Liu et al., 2022 (arXiv 2205.05638): keys and values are scaled, and the inner activations of the
feed-forward, which are the input of its second linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from peftfx.errors import MergeError, SpecError
from peftfx.methods.additive import CONV, LINEAR, channels, wide
from peftfx.methods.method import Acts, Call, Method, Param, Tensors, option
from peftfx.methods.peft import PeftForm, Placed
from peftfx.site import Site


class Ia3Form(PeftForm):
    """``IA3``; the modules that are scaled at their input are PEFT's ``feedforward_modules``."""

    def more(self, placed: Placed) -> dict[str, Any]:
        fed = [s.module for s, m in placed if isinstance(m, IA3) and m.at == "input"]
        every = all(site.kind == "hf_conv1d" for site, _ in placed)
        return {"feedforward_modules": sorted(set(fed)), "fan_in_fan_out": every}

    def rules(
        self, rule: dict[str, Any], content: Mapping[str, Any], sites: Mapping[str, Site] | None
    ) -> list[dict[str, Any]]:
        fed = content.get("feedforward_modules") or []
        if not fed:
            return [rule]
        if isinstance(fed, str):
            raise SpecError(
                "feedforward_modules is an expression", remedy="list the modules instead"
            )
        names = [g for t in sorted(fed) for g in (t, f"*.{t}")]
        return [{**rule, "overrides": [{"name": names, "at": "input"}]}]


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Rescales activations by trained vectors."""

    name: ClassVar[str] = "ia3"
    kinds: ClassVar[tuple[str, ...]] = (*LINEAR, *CONV)
    baked: ClassVar[tuple[str, ...]] = ("at",)
    paper: ClassVar[str] = "arXiv 2205.05638"
    peft: ClassVar[PeftForm | None] = Ia3Form(
        "IA3",
        keys={"l": "{module}.ia3_l"},
        special=("feedforward_modules", "fan_in_fan_out"),
        ignored=("init_ia3_weights",),
        kinds=(*LINEAR, "conv2d", "conv3d"),
    )
    example: ClassVar[Mapping[str, Any]] = {
        "name": ["*.k_proj", "*.v_proj", "*.down_proj"],
        "overrides": [{"name": "*.down_proj", "at": "input"}],
    }

    at: Literal["output", "input"] = option(
        "What is scaled: the module's output or input.", "output"
    )

    def accepts(self, site: Site) -> str | None:
        if self.at == "input" and site.attrs.get("padding_mode", "zeros") != "zeros":
            return f"padding_mode={site.attrs['padding_mode']!r} is not supported"
        return super().accepts(site)

    def acts_at(self, site: Site) -> Acts:
        return self.at

    def params(self, site: Site) -> dict[str, Param]:
        size = site.out_features if self.at == "output" else site.in_features
        if site.kind in CONV:
            shape: tuple[int, ...] = (1, size, *(1 for _ in site.shape[2:]))
        else:
            shape = (size, 1) if self.at == "output" else (1, size)
        return {"l": Param(shape, torch.nn.init.ones_)}

    def apply(self, y: Tensor | None, x: Tensor, p: Tensors, call: Call) -> Tensor:
        scaled = x if y is None else y
        return (scaled * channels(p["l"], call.kind)).to(scaled.dtype)

    def merge(self, w: Tensor, p: Tensors, site: Site) -> Tensor:
        scale = p["l"].reshape(-1).to(wide(w))
        rows = self.at == "output"
        if site.kind == "hf_conv1d":
            rows = not rows
        if site.kind in CONV and not rows:  # each group sees channels of its own
            groups = int(site.attrs["groups"])
            scale = scale.reshape(groups, -1).repeat_interleave(site.shape[0] // groups, 0)
            scale = scale.reshape(*site.shape[:2], *(1 for _ in site.shape[2:]))
        elif rows:
            scale = scale.reshape(-1, *(1 for _ in site.shape[1:]))
        return (w.to(wide(w)) * scale).to(w.dtype)

    def merge_bias(self, bias: Tensor | None, p: Tensors, site: Site) -> Tensor | None:
        if bias is None or self.at == "input":
            return bias
        return (bias * p["l"].reshape(-1)).to(bias.dtype)

    def weight_form(self, site: Site) -> str | None:
        return None if self.at == "input" else super().weight_form(site)

    def mix(
        self, parts: Sequence[tuple[float, Method, Tensors]], site: Site
    ) -> tuple[Method, dict[str, Tensor]]:
        """``1 + Σ wᵢ (lᵢ - 1)``: the sum of the updates."""
        if any(getattr(m, "at", None) != self.at for _, m, _ in parts):
            raise MergeError("one scales the input, the other the output", site=site.name)
        return self, {"l": 1 + torch.stack([w * (p["l"] - 1) for w, _, p in parts]).sum(0)}
