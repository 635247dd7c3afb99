"""BitFit: train the biases, nothing else. Ben Zaken et al., 2021 (arXiv 2106.10199)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peftfx.errors import SpecError
from peftfx.methods.peft import Known, PeftForm, Placed
from peftfx.methods.train import VALUE, Train
from peftfx.site import Site


class BiasForm(PeftForm):
    """``bias="all"`` or ``"lora_only"``, beside a LoRA."""

    def besides(self, placed: Placed, main: Placed, free: Sequence[str]) -> Any:
        trained = {site.name for site, _ in placed}
        if trained == {n for n in free if n.rpartition(".")[2] == "bias"}:
            return "all"
        if trained == {f"{site.module}.bias" for site, _ in main} & {*free}:
            return "lora_only"
        raise SpecError(
            "PEFT trains all that is called `bias`, or that of each adapted module; here it is "
            f"{len(trained)} others"
        )

    def rules_beside(
        self,
        method: str,
        value: Any,
        rule: Mapping[str, Any],
        content: Mapping[str, Any],
        known: Known | None,
    ) -> list[dict[str, Any]]:
        if value not in ("all", "lora_only"):
            raise SpecError(f"bias={value!r} is not supported", remedy="none, all or lora_only are")
        chosen: dict[str, Any] = {"method": method, "name": ["bias", "*.bias"]}
        if value == "lora_only":
            chosen["name"] = [f"{name}.bias" for name in rule["name"]]
            chosen |= {"except": rule["except"]} if "except" in rule else {}
        elif saved := sorted(content.get("modules_to_save") or ()):
            chosen["except"] = [f"*{n}" for n in saved]
        if known is None:
            return [chosen]
        if value == "lora_only":
            chosen["name"] = [n for n in chosen["name"] if n in known.parameters]
        any_bias = any(n.rpartition(".")[2] == "bias" for n in known.parameters)
        return [chosen] if chosen["name"] and any_bias else []


@dataclass(frozen=True, kw_only=True)
class BitFit(Train):
    """Trains the biases of the modules that the selectors name."""

    name: ClassVar[str] = "bitfit"
    paper: ClassVar[str] = "arXiv 2106.10199"
    peft: ClassVar[PeftForm | None] = BiasForm(
        "", keys={VALUE: "{inner}.{parameter}"}, kinds=(), beside="bias"
    )

    def accepts(self, site: Site) -> str | None:
        if "bias" not in site.parameter:
            return f"bitfit trains biases, this is a {site.parameter}"
        return super().accepts(site)
