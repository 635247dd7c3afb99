"""P-tuning: virtual tokens that an encoder makes. Liu et al., 2021 (arXiv 2103.10385).

h₀ = [f(P); E(x)],   f = W₃·relu(W₂·relu(W₁·p))  or  W₂·relu(W₁·lstm(p))
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.errors import SpecError
from peftfx.methods.method import Call, Method, Param, option
from peftfx.methods.peft import PeftForm
from peftfx.methods.peft_prompt import EncodedForm
from peftfx.methods.soft_prompt import SoftPrompt
from peftfx.site import Site


@dataclass(frozen=True, kw_only=True)
class PTuning(SoftPrompt):
    """Trains virtual tokens and an encoder that turns them into embeddings.

    P ``[length, D]`` is normal noise. The encoder is an MLP of three layers, or a bidirectional
    LSTM with one of two; all of it is saved, so that training can go on. Without one, the
    embeddings are P itself: what PEFT keeps of a finished p-tuning.
    """

    name: ClassVar[str] = "ptuning"
    baked: ClassVar[tuple[str, ...]] = ("length", "encoder", "lstm_layers")
    paper: ClassVar[str] = "arXiv 2103.10385"
    example: ClassVar[Mapping[str, Any]] = {"name": "*.embed_tokens"}
    peft: ClassVar[PeftForm | None] = EncodedForm(
        "P_TUNING",
        keys={},
        called={"length": "num_virtual_tokens"},
        defaults={
            "encoder_reparameterization_type": "MLP", "encoder_hidden_size": None,
            "encoder_num_layers": 2, "encoder_dropout": 0.0,
        },
    )  # fmt: skip

    encoder: Literal["mlp", "lstm", "none"] = option("What makes the embeddings.", "mlp")
    hidden: int = option("Width of the encoder; 0 is the model's own.", 0)
    lstm_layers: int = option("Layers of the LSTM.", 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least, most in (("hidden", 0, 2**20), ("lstm_layers", 1, 16)):
            if not least <= (value := getattr(self, name)) <= most:
                raise SpecError(f"{name} is {value}", remedy=f"between {least} and {most}")

    def params(self, site: Site) -> dict[str, Param]:
        width = site.out_features
        hidden = self.hidden or width
        found = {"embeddings": Param((self.length, width), torch.nn.init.normal_)}
        if self.encoder == "mlp":
            sizes = [width, hidden, hidden, width]
        elif self.encoder == "lstm":
            sizes = [2 * hidden, 2 * hidden, width]
            for name, rows in self._lstm(width, hidden).items():
                found[name] = Param(rows, functools.partial(_uniform, bound=hidden**-0.5))
        else:
            return found
        for i, (n, m) in enumerate(itertools.pairwise(sizes), 1):
            start = functools.partial(_uniform, bound=n**-0.5)  # as nn.Linear has it
            found |= {f"weight{i}": Param((m, n), start), f"bias{i}": Param((m,), start)}
        return found

    def _lstm(self, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights of ``nn.LSTM``, in its order."""
        found: dict[str, tuple[int, ...]] = {}
        for layer in range(self.lstm_layers):
            for side in ("", "_reverse"):
                found[f"weight_ih_l{layer}{side}"] = (
                    4 * hidden,
                    width if layer == 0 else 2 * hidden,
                )
                found[f"weight_hh_l{layer}{side}"] = (4 * hidden, hidden)
                found[f"bias_ih_l{layer}{side}"] = (4 * hidden,)
                found[f"bias_hh_l{layer}{side}"] = (4 * hidden,)
        return found

    def finished(self) -> Method:
        return replace(self, encoder="none", hidden=0, lstm_layers=2)

    def finish(self, p: Mapping[str, Tensor], site: Site) -> dict[str, Tensor]:
        return {"embeddings": self.rows(p, Call(site, training=False))}

    def rows(self, p: Mapping[str, Tensor], call: Call) -> Tensor:
        x = p["embeddings"]  # [P, D]
        if self.encoder == "lstm":
            weights = [p[name] for name in self._lstm(1, 1)]
            state = torch.zeros_like(p["weight_hh_l0"][:1]).repeat(2 * self.lstm_layers, 1, 1)
            x = torch.lstm(
                x.unsqueeze(0), (state, state), weights, True, self.lstm_layers, 0.0, False, True,
                True,
            )[0].squeeze(0)  # [P, 2H]  # fmt: skip
        layers = {"mlp": 3, "lstm": 2, "none": 0}[self.encoder]
        for i in range(1, layers + 1):
            x = F.linear(x, p[f"weight{i}"], p[f"bias{i}"])
            x = torch.relu(x) if i < layers else x
        return x


def _uniform(t: Tensor, bound: float) -> None:
    torch.nn.init.uniform_(t, -bound, bound)
