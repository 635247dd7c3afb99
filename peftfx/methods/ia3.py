"""IA³: trained vectors that rescale what a module gives, or what it is given.

    y = l ⊙ (W·x + b)   or   y = W·(l ⊙ x) + b

Liu et al., 2022 (arXiv 2205.05638): keys and values are scaled, and the inner activations of the
feed-forward, which are the input of its second linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from peftfx.errors import CheckpointError, MergeError, SpecError
from peftfx.methods.additive import CONV, LINEAR, TABLE, TRANSPOSED, channels, plain, wide
from peftfx.methods.method import Acts, Call, Method, Param, Tensors, option
from peftfx.methods.part import cut, put
from peftfx.methods.peft import LINEARS, PeftForm, Placed, expression
from peftfx.site import Site


class Ia3Form(PeftForm):
    """``IA3``; the modules that are scaled at their input are PEFT's ``feedforward_modules``."""

    def more(self, placed: Placed) -> dict[str, Any]:
        at = {s.module: m.at for s, m in placed if isinstance(m, IA3)}
        fed: Any = sorted(module for module, where in at.items() if where == "input")
        if any(m.endswith(tuple(fed)) for m, where in at.items() if where == "output"):
            fed = "|".join(m.replace(".", r"\.") for m in fed)  # PEFT asks no dot before an ending
        every = all(site.kind == "hf_conv1d" for site, _ in placed)
        return {"feedforward_modules": fed, "fan_in_fan_out": every}

    def refusal(self, method: Method, site: Site) -> str | None:
        whole = replace(site, attrs={k: v for k, v in site.attrs.items() if k != "part"})
        return super().refusal(method, whole)

    def pack(self, method: Method, site: Site, p: Tensors) -> dict[str, Tensor]:
        if not site.part:
            return super().pack(method, site, p)
        ones = p["l"].new_ones(int(site.attrs["width"]), 1)
        return {"l": put(ones, p["l"], site, 0)}

    def unpack(self, method: Method, site: Site, p: Tensors) -> dict[str, Tensor]:
        if not site.part:
            return super().unpack(method, site, p)
        part = cut(p["l"], site, 0)
        if not torch.equal(put(torch.ones_like(p["l"]), part, site, 0), p["l"]):
            raise CheckpointError("it has other rows than the spec says", site=site.name)
        return {"l": part}

    def rules(
        self, rule: dict[str, Any], content: Mapping[str, Any], sites: Mapping[str, Site] | None
    ) -> list[dict[str, Any]]:
        fed = content.get("feedforward_modules") or []
        if sites is not None:  # PEFT asks no dot before an ending
            if isinstance(fed, str):
                means = [s for s in sites if expression(fed, s)]
            else:
                means = [s for s in sites if s.endswith(tuple(fed))]
            return [{**rule, "overrides": [{"name": means, "at": "input"}]} if means else rule]
        if isinstance(fed, str):
            raise SpecError(
                "feedforward_modules is an expression: it takes the model to say which are meant",
                remedy="Spec.from_peft(config, model), or list the modules",
            )
        names = [f"*{t}" for t in sorted(fed)]  # here too, no dot
        return [{**rule, "overrides": [{"name": names, "at": "input"}]} if names else rule]


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Rescales activations by trained vectors."""

    name: ClassVar[str] = "ia3"
    kinds: ClassVar[tuple[str, ...]] = (*LINEAR, *TABLE, *CONV, *TRANSPOSED, "parameter")
    baked: ClassVar[tuple[str, ...]] = ("at",)
    paper: ClassVar[str] = "arXiv 2205.05638"
    peft: ClassVar[PeftForm | None] = Ia3Form(
        "IA3",
        keys={"l": "{module}.ia3_l"},
        special=("feedforward_modules", "fan_in_fan_out"),
        called={"at": "feedforward_modules"},
        ignored=("init_ia3_weights",),
        kinds=(*LINEARS, "conv2d", "conv3d"),
    )
    example: ClassVar[Mapping[str, Any]] = {
        "name": ["*.k_proj", "*.v_proj", "*.down_proj"],
        "overrides": [{"name": "*.down_proj", "at": "input"}],
    }

    at: Literal["output", "input"] = option(
        "What is scaled: the module's output or input.", "output"
    )

    def accepts(self, site: Site) -> str | None:
        if self.at == "input" and site.kind in TABLE:
            return "the input of a table is rows, which cannot be scaled"
        if self.at == "input" or site.kind in TABLE:
            return super().accepts(site) or plain(site)
        return super().accepts(site)

    def acts_at(self, site: Site) -> Acts:
        return "weight" if site.kind == "parameter" else self.at

    def params(self, site: Site) -> dict[str, Param]:
        size = site.out_features if self.at == "output" else site.in_features
        if site.kind in (*CONV, *TRANSPOSED):
            shape: tuple[int, ...] = (1, size, *(1 for _ in site.shape[2:]))
        else:  # of a stack of matrices, for each
            shape = (*site.shape[:-2], *((size, 1) if self.at == "output" else (1, size)))
        return {"l": Param(shape, torch.nn.init.ones_)}

    def apply(self, y: Tensor | None, x: Tensor, p: Tensors, call: Call) -> Tensor:
        scaled = x if y is None else y
        return (scaled * channels(p["l"], call.kind)).to(scaled.dtype)

    def merge(self, w: Tensor, p: Tensors, site: Site) -> Tensor:
        out, into = site.axes
        axis, other = (out, into) if self.at == "output" else (into, out)
        scale = p["l"].to(wide(w))
        if site.kind == "parameter":
            scale = scale if site.axes == (-2, -1) else scale.mT
        elif site.groups > 1 and axis == 1:  # each group has channels of its own
            scale = scale.reshape(site.groups, -1).repeat_interleave(w.shape[0] // site.groups, 0)
            scale = scale.reshape(*w.shape[:2], *(1 for _ in w.shape[2:]))
        else:
            scale = scale.reshape(-1, *(1 for _ in w.shape[2:])).unsqueeze(other)
        return (w.to(wide(w)) * scale).to(w.dtype)

    def merge_bias(self, bias: Tensor | None, p: Tensors, site: Site) -> Tensor | None:
        if bias is None or self.at == "input":
            return bias
        return (bias * p["l"].reshape(-1)).to(bias.dtype)

    def weight_form(self, site: Site) -> str | None:
        if self.at == "input" or site.kind == "parameter":
            return None
        return super().weight_form(site)

    def mix(
        self, parts: Sequence[tuple[float, Method, Tensors]], site: Site
    ) -> tuple[Method, dict[str, Tensor]]:
        """``1 + Σ wᵢ (lᵢ - 1)``: the sum of the updates."""
        if any(getattr(m, "at", None) != self.at for _, m, _ in parts):
            raise MergeError("one scales the input, the other the output", site=site.name)
        return self, {"l": 1 + torch.stack([w * (p["l"] - 1) for w, _, p in parts]).sum(0)}
