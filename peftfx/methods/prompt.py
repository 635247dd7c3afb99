"""Prompt tuning: trained embeddings in front of the input. Lester et al., 2021 (arXiv 2104.08691).

h₀ = [P; E(x)]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from peftfx.errors import SpecError
from peftfx.methods.method import Call, Param, option
from peftfx.methods.peft import PeftForm
from peftfx.methods.peft_prompt import PromptForm
from peftfx.methods.soft_prompt import SoftPrompt
from peftfx.site import Site


@dataclass(frozen=True, kw_only=True)
class Prompt(SoftPrompt):
    """Trains the embeddings of virtual tokens in front of the input.

    P ``[length, D]`` starts as normal noise, as rows of the model's own table drawn at random, or
    as the embeddings of a text (repeated or cut to the length).
    """

    name: ClassVar[str] = "prompt"
    paper: ClassVar[str] = "arXiv 2104.08691"
    example: ClassVar[Mapping[str, Any]] = {"name": "*.embed_tokens"}
    peft: ClassVar[PeftForm | None] = PromptForm(
        "PROMPT_TUNING",
        keys={},
        called={"length": "num_virtual_tokens"},
        defaults={"prompt_tuning_init": "RANDOM"},
        ignored=("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    )  # fmt: skip

    init: Literal["random", "vocabulary", "text"] = option(
        "Start: random noise, rows of the vocabulary, or a text.", "random"
    )
    text: str = option("The text to start from.", "")
    tokenizer: str = option("Local directory of the HF tokenizer that reads the text.", "")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.init == "text") != bool(self.text and self.tokenizer):
            raise SpecError(
                f"init is {self.init!r}", remedy="a text and a tokenizer go with `init: text`"
            )

    def params(self, site: Site) -> dict[str, Param]:
        return {"embeddings": Param((self.length, site.out_features), torch.nn.init.normal_)}

    def start(self, w: Tensor, p: Mapping[str, Tensor], site: Site) -> None:
        if self.init == "random":
            return
        if self.init == "vocabulary":
            ids = torch.randint(w.shape[0], (self.length,), device=w.device)
        else:
            found = torch.tensor(self._ids(site), device=w.device)
            ids = found[torch.arange(self.length, device=w.device) % len(found)]
        p["embeddings"].copy_(w[ids])

    def _ids(self, site: Site) -> list[int]:
        from transformers import AutoTokenizer

        if not Path(self.tokenizer).is_dir():
            raise SpecError(
                f"tokenizer {self.tokenizer!r} is no directory",
                remedy="save the tokenizer locally: nothing is fetched",
            )
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer, local_files_only=True)
        ids = list(tokenizer(self.text)["input_ids"])
        if not ids or max(ids) >= site.shape[0]:
            raise SpecError(
                f"text {self.text!r} has no ids in the model's table of {site.shape[0]} rows",
                remedy="take the tokenizer that belongs to the model",
            )
        return ids

    def rows(self, p: Mapping[str, Tensor], call: Call) -> Tensor:
        return p["embeddings"]
