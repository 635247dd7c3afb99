"""The one table of HF PEFT's options for LoRA and IA³ that tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

from tests.kinds import Experts


class Block(nn.Module):
    """Attention by hand, a feed-forward block, experts, norms; linears with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.q_proj, self.k_proj = nn.Linear(6, 8), nn.Linear(6, 8, bias=False)
        self.v_proj, self.o_proj = nn.Linear(6, 8), nn.Linear(8, 6)
        self.experts = Experts()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        scores = (self.q_proj(h) @ self.k_proj(h).transpose(-1, -2)).softmax(-1)
        x = x + self.o_proj(scores @ self.v_proj(h))
        x = x + self.experts(x.flatten(0, 1)).view_as(x)
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """Two blocks between an embedding and a head, with names that endings confuse."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(13, 6)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(Block() for _ in range(3))
        self.mix_up = nn.Linear(6, 6)
        self.score = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.decoder.layers:  # type: ignore[union-attr]
            x = layer(x)
        return self.score(x + self.mix_up(x))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        return None


IDS = torch.tensor([[1, 5, 12, 3], [0, 7, 7, 2]])
TWO = ["q_proj", "v_proj"]
Config = Callable[[], Any]


@dataclass(frozen=True)
class Option:
    """A configuration that shows one option of PEFT's.

    ``alone``: whether the same can be read without the model.
    """

    id: str
    config: Config
    alone: bool = True

    def __str__(self) -> str:
        return self.id


def _lora(**options: Any) -> Config:
    return lambda: peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TWO, **options})


def _ia3(*targets: str, fed: Any = (), **options: Any) -> Config:
    fed = fed if isinstance(fed, str) else list(fed)
    return lambda: peft.IA3Config(target_modules=list(targets), feedforward_modules=fed, **options)


OPTIONS: tuple[Option, ...] = (
    Option("target_modules, a list", _lora()),
    Option("target_modules, an ending and a full name",
           _lora(target_modules=["decoder.layers.1.up", "k_proj"])),
    Option("target_modules, an expression",
           _lora(target_modules=r".*\.layers\.[02]\.(q|o)_proj|mix_up"), alone=False),
    Option("target_modules, all-linear", _lora(target_modules="all-linear"), alone=False),
    Option("exclude_modules, a list",
           _lora(target_modules=[*TWO, "up"], exclude_modules=["layers.1.up", "v_proj"])),
    Option("exclude_modules, an expression",
           _lora(exclude_modules=r".*\.1\..*"), alone=False),
    Option("layers_to_transform", _lora(layers_to_transform=[0, 2]), alone=False),
    Option("layers_to_transform, one", _lora(layers_to_transform=1), alone=False),
    Option("layers_to_transform, and a full name",
           _lora(target_modules=["q_proj", "mix_up"], layers_to_transform=[1]), alone=False),
    Option("layers_pattern", _lora(layers_to_transform=[0, 1], layers_pattern="layers"),
           alone=False),
    Option("layers_pattern, dotted",
           _lora(layers_to_transform=[2], layers_pattern=["blocks", r"decoder\.layers"]),
           alone=False),
    Option("rank_pattern", _lora(rank_pattern={"q_proj": 2, r"layers\.2\.v_proj": 1}), alone=False),
    Option("alpha_pattern", _lora(alpha_pattern={r"layers\.[01]\.q_proj": 7.5}), alone=False),
    Option("rank_pattern and alpha_pattern",
           _lora(rank_pattern={r"layers\.0\..*": 2}, alpha_pattern={"^decoder.*v_proj": 2}),
           alone=False),
    Option("use_rslora", _lora(use_rslora=True)),
    Option("use_rslora and rank_pattern", _lora(use_rslora=True, rank_pattern={"q_proj": 4}),
           alone=False),
    Option("bias all", _lora(bias="all")),
    Option("bias lora_only", _lora(bias="lora_only")),
    Option("bias all, modules_to_save", _lora(bias="all", modules_to_save=["score"])),
    Option("bias lora_only, layers_to_transform",
           _lora(bias="lora_only", layers_to_transform=[1]), alone=False),
    Option("modules_to_save", _lora(modules_to_save=["score", "norm"])),
    Option("modules_to_save, of a target", _lora(modules_to_save=["layers.1.q_proj"])),
    Option("modules_to_save, that are not there",
           _lora(modules_to_save=["classifier", "score"])),
    Option("fan_in_fan_out, which PEFT takes back", _lora(fan_in_fan_out=True)),
    Option("lora_bias", _lora(lora_bias=True)),
    Option("lora_dropout", _lora(lora_dropout=0.3)),
    Option("init_lora_weights", _lora(init_lora_weights="gaussian")),
    Option("use_dora", _lora(use_dora=True)),
    Option("trainable_token_indices, a list", _lora(trainable_token_indices=[7, 3, 12])),
    Option("trainable_token_indices, by name",
           _lora(trainable_token_indices={"embed_tokens": [5, 1]})),
    Option("target_modules, an embedding", _lora(target_modules=["embed_tokens", "up"])),
    Option("target_parameters", _lora(target_modules=[], target_parameters=["experts.up"])),
    Option("target_parameters, two of a module",
           _lora(target_modules=[], target_parameters=["experts.up", "experts.down"])),
    Option("target_parameters beside target_modules",
           _lora(target_parameters=["layers.1.experts.down"],
                 rank_pattern={r"experts\.down": 2}), alone=False),
    Option("ia3", _ia3("k_proj", "v_proj", "down", fed=["down"])),
    Option("ia3, an ending that others have too", _ia3("mix_up", "up", fed=["up"])),
    Option("ia3, an expression", _ia3("q_proj", "up", fed=r".*\.up"), alone=False),
    Option("ia3, exclude_modules", _ia3("q_proj", "up", exclude_modules=["layers.2.up"])),
    Option("ia3, modules_to_save", _ia3("q_proj", "down", fed=["down"],
                                        modules_to_save=["score"])),
)  # fmt: skip
