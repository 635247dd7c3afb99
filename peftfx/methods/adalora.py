"""AdaLoRA: a low-rank update in the form of a singular value decomposition, its rank by site.

    W' = W + s·B·diag(E)·A,   s = alpha / (rank + 1e-5)

Zhang et al., 2023 (arXiv 2303.10512). All sites start with ``rank``; a schedule
(``peftfx.Schedule``) sets the least important E to zero, over all sites together, until
``target`` ranks a site are left on average. Nothing changes its shape, so nothing recompiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftfx.errors import AdapterError, PlanError, SpecError
from peftfx.methods.additive import LINEAR, LowRank
from peftfx.methods.method import Param, Tensors, option
from peftfx.methods.peft import LINEARS, PeftForm, Placed
from peftfx.site import Site


class AdaLoraForm(PeftForm):
    """``ADALORA``; ranks that were allocated are read as the ranks of their sites."""

    def more(self, placed: Placed) -> dict[str, Any]:
        method = placed[0][1]
        assert isinstance(method, AdaLoRA)
        every = all(site.kind == "hf_conv1d" for site, _ in placed)
        total = max(method.steps, method.end, 1)
        return {
            "fan_in_fan_out": every, "bias": "none", "tinit": method.warmup,
            "tfinal": total - method.end if method.end else 0, "total_step": total,
        }  # fmt: skip

    def rules(
        self, rule: dict[str, Any], content: Mapping[str, Any], sites: Mapping[str, Site] | None
    ) -> list[dict[str, Any]]:
        total, tail = content.get("total_step") or 0, content.get("tfinal") or 0
        rule = {**rule, "warmup": content.get("tinit", 0), "steps": total, "end": total - tail}
        if rule["warmup"] >= rule["end"]:  # no schedule
            rule = {k: v for k, v in rule.items() if k not in ("warmup", "steps", "end")}
        overrides, none = [], []
        rank, alpha = int(content.get("init_r", 12)), content.get("lora_alpha", 8)
        for key, kept in (content.get("rank_pattern") or {}).items():
            module, left = key.rpartition(".lora_E")[0], sum(map(bool, kept))
            if not left:
                none.append(module)
            elif left != rank:  # PEFT keeps the scale of the first rank
                same = alpha * (left + 1e-5) / (rank + 1e-5)
                overrides.append({"name": module, "rank": left, "alpha": same})
        if none:
            rule["except"] = [*rule.get("except", ()), *none]
        return [{**rule, "overrides": overrides} if overrides else rule]


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(LowRank):
    """Adaptive low-rank adaptation: a budget of ranks, spent where it matters.

    The penalty keeps the rows of A and the columns of B orthonormal.
    """

    name: ClassVar[str] = "adalora"
    paper: ClassVar[str] = "arXiv 2303.10512"
    kinds: ClassVar[tuple[str, ...]] = (*LINEAR, "conv2d")
    peft: ClassVar[PeftForm | None] = AdaLoraForm(
        "ADALORA",
        keys={n: "{module}.lora_" + n for n in "ABE"},
        options={
            "init_r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout",
            "target_r": "target", "deltaT": "every", "beta1": "smooth",
            "beta2": "smooth_uncertainty", "orth_reg_weight": "orthogonality",
        },
        defaults={"lora_alpha": 8},
        special=("rank_pattern", "tinit", "tfinal", "total_step", "bias", "fan_in_fan_out"),
        called={"warmup": "tinit", "end": "tfinal", "steps": "total_step"},
        ignored=(
            "r", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
            "runtime_config", "qalora_group_size", "ensure_weight_tying", "lora_ga_config",
            "arrow_config", "init_lora_weights",
        ),
        kinds=(*LINEARS, "conv2d"),
    )  # fmt: skip

    rank: int = option("Rank of every site at the start.", 12)
    target: int = option("Rank that is left on average.", 8)
    alpha: float = option("The update is scaled by alpha / rank.", 16.0)
    warmup: int = option("Steps before ranks are taken away.", 0)
    end: int = option("Step after which no more ranks are taken away; 0: no schedule.", 0)
    steps: int = option("Steps of the whole training, for PEFT's files; 0: end.", 0)
    every: int = option("Steps between two allocations.", 1)
    smooth: float = option("Decay of the average of the sensitivities.", 0.85)
    smooth_uncertainty: float = option("Decay of the average of their uncertainty.", 0.85)
    orthogonality: float = option("Weight of the penalty.", 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.rank <= 2**20:
            raise SpecError(f"rank is {self.rank}", remedy="a rank is between 1 and 1048576")
        if self.target < 1:
            raise SpecError(f"target is {self.target}", remedy="a rank of at least 1 is left")
        if self.end and not 0 <= self.warmup < self.end:
            raise SpecError(f"warmup is {self.warmup}", remedy=f"it ends before step {self.end}")
        if self.every < 1:
            raise SpecError(f"every is {self.every}", remedy="at least 1")

    def factor(self) -> float:
        return self.alpha / (self.rank + 1e-5)

    def accepts(self, site: Site) -> str | None:
        if int(site.attrs.get("groups", 1)) > 1:
            return "a grouped convolution has no B·A of its weight's shape"
        return super().accepts(site)

    def check(self, site: Site) -> None:
        width = site.in_features * torch.Size(site.shape[2:]).numel()
        if self.rank > min(width, site.out_features):
            raise PlanError(
                f"rank {self.rank} is larger than the weight {list(site.shape)} has",
                remedy=f"use a rank of at most {min(width, site.out_features)}",
            )

    def params(self, site: Site) -> dict[str, Param]:
        width = site.in_features * torch.Size(site.shape[2:]).numel()
        return {
            "A": Param((self.rank, width), _small),
            "B": Param((site.out_features, self.rank), _small),
            "E": Param((self.rank, 1), torch.nn.init.zeros_),
        }

    def factors(self, p: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return p["A"] * p["E"], p["B"]

    # -- the budget ------------------------------------------------------------------------------

    def penalty(self, sites: Sequence[tuple[Site, Tensors]]) -> Tensor | None:
        """The mean of ``‖A·Aᵀ - I‖`` and ``‖Bᵀ·B - I‖`` over the sites, times its weight."""
        grams = [g for _, p in sites for g in (p["A"] @ p["A"].t(), p["B"].t() @ p["B"])]
        terms = [torch.linalg.norm(g - torch.eye(len(g), device=g.device)) for g in grams]
        return self.orthogonality * torch.stack([t.to(terms[0].device) for t in terms]).mean()

    def budget(self, step: int, sites: int, ranks: int) -> int:
        """How many of *ranks* are kept after *step*: down to the target along a cubic."""
        target = min(self.target * sites, ranks)
        if step <= self.warmup:
            return ranks
        if step >= self.end:
            return target
        left = 1 - (step - self.warmup) / (self.end - self.warmup)
        return int((ranks - target) * left**3 + target)

    def advance(
        self, step: int, sites: Sequence[tuple[Site, Tensors]], memory: dict[str, Tensor]
    ) -> None:
        if not self.end:
            return
        if step > self.end:  # what was taken away stays away, whatever the optimizer did
            for site, p in sites:
                if f"kept:{site.name}" not in memory:
                    raise AdapterError(
                        f"step {step} comes after the last allocation, and none was made",
                        remedy="load the state_dict() of the schedule that made it",
                    )
                p["E"].masked_fill_(~memory[f"kept:{site.name}"], 0.0)
            return
        scores = []
        for site, p in sites:
            parts = {}
            for n in "ABE":
                name = f"{n}:{site.name}"
                if step < self.end:
                    self._observe(name, p[n], memory)
                parts[n] = memory[f"mean {name}"] * memory[f"spread {name}"]
            scores.append(parts["E"].reshape(-1) + parts["A"].mean(1) + parts["B"].mean(0))
        ranks = sum(map(len, scores))
        budget = self.budget(step, len(sites), ranks)
        if step <= self.warmup or (step % self.every and step != self.end):
            return
        least = torch.cat([s.cpu() for s in scores]).sort().values
        bound = least[ranks - budget - 1] if budget < ranks else least[0] - 1
        for (site, p), score in zip(sites, scores, strict=True):
            kept = (score > bound.to(score.device))[:, None]
            memory[f"kept:{site.name}"] = kept
            p["E"].masked_fill_(~kept, 0.0)

    def _observe(self, name: str, value: Tensor, memory: dict[str, Tensor]) -> None:
        """Averages the sensitivity |w·∂L/∂w| of a tensor's elements, and its uncertainty."""
        now = (value * value.grad).abs() if value.grad is not None else torch.zeros_like(value)
        zero = torch.zeros_like(now)
        mean = torch.lerp(now, memory.get(f"mean {name}", zero), self.smooth)
        spread = torch.lerp(
            (now - mean).abs(), memory.get(f"spread {name}", zero), self.smooth_uncertainty
        )
        memory |= {f"mean {name}": mean, f"spread {name}": spread}


def _small(t: Tensor) -> None:
    torch.nn.init.normal_(t, std=0.02)
