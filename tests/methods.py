"""The one table of methods that tests share: each with options, and what is true of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft

Targets = list[str]

# Sites for rules that do not act at linears, by architecture
EMBEDDINGS = {"llama": "embed_tokens", "bert": "word_embeddings", "gpt2": "wte", "t5": "shared",
              "mamba": "embeddings", "qwen3": "embed_tokens", "phi3": "embed_tokens",
              "electra": "word_embeddings"}  # fmt: skip
NORMS = {"llama": ["input_layernorm", "norm"], "bert": ["LayerNorm"], "gpt2": ["ln_1", "ln_f"],
         "t5": ["layer_norm"], "vit": ["layernorm_before", "layernorm"],
         "whisper": ["self_attn_layer_norm", "layer_norm"], "qwen3": ["input_layernorm", "norm"],
         "phi3": ["post_attention_layernorm"]}  # fmt: skip
LINEARS = ("llama", "bert", "t5", "vit", "whisper", "mixtral", "albert", "phi3")


@dataclass(frozen=True)
class Row:
    """A method with options.

    ``peft`` makes PEFT's configuration of the same, given module names; ``on`` are architectures
    where PEFT has it, the first in the default suite. ``start``: how far from the base it may
    start. ``mixes``: whether weighted sums of it exist. ``near_one``: tensors whose identity is 1.
    """

    id: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    peft: Callable[[Targets], Any] | None = None
    on: tuple[str, ...] = ()
    start: float = 1e-6
    merges: bool = True
    mixes: bool = True
    near_one: tuple[str, ...] = ()
    name: str = "*"  # what a rule selects in the laws' models

    def __str__(self) -> str:
        return self.id

    def rule(self, **more: Any) -> dict[str, Any]:
        """A rule of the method."""
        return {"method": self.method, "name": self.name, **self.options, **more}


def _dora(t: Targets) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=t)


def _lokr(**options: Any) -> Callable[[Targets], Any]:
    return lambda t: peft.LoKrConfig(r=2, alpha=3, target_modules=t, **options)


ROWS: tuple[Row, ...] = (
    Row("lora", "lora", {"rank": 2, "alpha": 3.0},
        lambda t: peft.LoraConfig(r=4, lora_alpha=6, target_modules=t)),  # on: test_architectures
    Row("lora biased", "lora", {"rank": 2, "bias": True, "rank_stabilized": True},
        lambda t: peft.LoraConfig(r=4, lora_bias=True, use_rslora=True, target_modules=t),
        ("bert", "vit"), name="head"),
    Row("lora frozen", "lora", {"rank": 2, "freeze_a": True, "plus": 4.0}),
    Row("lora gaussian", "lora", {"rank": 2, "init": "gaussian"}),
    Row("lora orthogonal", "lora", {"rank": 2, "init": "orthogonal"}, start=1e-5),
    Row("lora pissa", "lora", {"rank": 2, "init": "pissa"}, start=1e-5),
    Row("lora olora", "lora", {"rank": 2, "init": "olora"}, start=1e-5),
    Row("lora gated", "lora", {"rank": 2, "gate": "token"}, merges=False, mixes=False),
    Row("lora gated by sequence", "lora", {"rank": 2, "gate": "sequence", "bias": True},
        merges=False, mixes=False),
    Row("dora", "dora", {"rank": 2, "alpha": 3.0}, _dora,
        ("gpt2", "resnet", "tables", *LINEARS), start=1e-5, mixes=False,
        near_one=("magnitude",)),
    Row("adalora", "adalora", {"rank": 2},
        lambda t: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=9,
                                     target_modules=t),
        ("bert", "resnet", "gpt2", *LINEARS)),
    Row("vera", "vera", {"rank": 3}, lambda t: peft.VeraConfig(r=5, target_modules=t),
        ("t5", "gpt2", *LINEARS)),
    Row("loha", "loha", {"rank": 2}, lambda t: peft.LoHaConfig(r=2, alpha=3, target_modules=t),
        ("vit", "resnet", *LINEARS)),
    Row("loha dense", "loha", {"rank": 3},
        lambda t: peft.LoHaConfig(r=4, alpha=3, target_modules=t, use_effective_conv2d=True),
        ("sequential", "resnet", "llama")),
    Row("lokr", "lokr", {"rank": 2}, _lokr(), ("whisper", "resnet", *LINEARS), mixes=False),
    Row("lokr both", "lokr", {"rank": 1, "both": True},
        lambda t: peft.LoKrConfig(r=1, target_modules=t, decompose_both=True,
                                  use_effective_conv2d=True),
        ("sequential", "resnet", "llama"), mixes=False),
    Row("ia3", "ia3", {}, lambda t: peft.IA3Config(target_modules=t, feedforward_modules=t[-1:]),
        ("mixtral", "gpt2", "resnet", *LINEARS), near_one=("l",)),
    Row("ia3 input", "ia3", {"at": "input"}, near_one=("l",)),
    Row("oft", "oft", {"block": 3}, lambda t: peft.OFTConfig(oft_block_size=4, target_modules=t),
        ("tables", *LINEARS), mixes=False),
    Row("oft exact", "oft", {"block": 3, "terms": 0, "share": True},
        lambda t: peft.OFTConfig(oft_block_size=4, target_modules=t, use_cayley_neumann=False,
                                 block_share=True),
        ("albert", "bert"), mixes=False),
    Row("hra", "hra", {"rank": 2}, lambda t: peft.HRAConfig(r=4, target_modules=t),
        ("resnet", *LINEARS), start=1e-5, mixes=False),
    Row("hra orthogonal", "hra", {"rank": 3, "orthogonal": True},
        lambda t: peft.HRAConfig(r=3, target_modules=t, apply_GS=True), ("qwen3", "vit"),
        start=9.0, mixes=False),
    Row("norm", "norm", {}, lambda t: peft.LNTuningConfig(target_modules=t), tuple(NORMS),
        name="*norm*"),
    Row("tokens", "tokens", {"ids": [1, 3]},
        lambda t: peft.TrainableTokensConfig(token_indices=[7, 3, 11], target_modules=t),
        tuple(sorted(EMBEDDINGS, key=lambda name: name != "gpt2")), name="table"),
    Row("sparse", "sparse", {"rank": 1},
        lambda t: peft.ShiraConfig(r=2, random_seed=3, target_modules=t),
        ("bert", "llama", "t5", "vit", "whisper", "albert", "qwen3", "phi3")),
    Row("sparse magnitude", "sparse", {"density": 0.3, "mask": "magnitude"}),
    Row("sparse rows", "sparse", {"density": 0.3, "structure": "row"}),
    Row("sparse columns", "sparse", {"density": 0.3, "structure": "column", "mask": "magnitude"}),
    Row("sparse learned", "sparse", {"density": 0.5, "budget": 0.2}),
    Row("said", "said", {"dimension": 5}),
    Row("bottleneck", "bottleneck", {"size": 5}, merges=False),
    Row("bottleneck beside", "bottleneck", {"size": 3, "parallel": True, "activation": "silu",
                                            "learned_scale": True}, merges=False),
    Row("bottleneck gated", "bottleneck", {"reduction": 2.0, "gate": "token", "norm": True},
        merges=False, mixes=False),
    Row("bottleneck sparse", "bottleneck", {"size": 5, "density": 0.4, "init": "small",
                                            "mask": "magnitude"}, merges=False, start=1e-2),
    Row("compacter", "compacter", {"size": 3, "n": 3}, merges=False),
    Row("reft", "reft", {"rank": 2}, merges=False, mixes=False),
    Row("reft places", "reft", {"rank": 1, "first": 1, "last": 2, "orthogonal": False},
        merges=False, mixes=False),
    Row("fusion", "fusion", {"sizes": [2, 3]}, merges=False, mixes=False),
    Row("ladder", "ladder", {"reduction": 2, "role": "block"}, merges=False, mixes=False),
    Row("bitfit", "bitfit"),
    Row("train", "train", name="head"),
)  # fmt: skip


def start_of(spec: Any) -> float:
    """How far from the base a spec may start."""
    return max(
        row.start
        for rule in spec["rules"]
        for row in ROWS
        if row.id == "train"
        or (row.method == rule["method"] and all(rule.get(k) == v for k, v in row.options.items()))
    )


def merges(spec: Any) -> bool:
    """Whether all methods of a spec can be merged, with the options that it gives them."""
    never = {row.method for row in ROWS} - {row.method for row in ROWS if row.merges}
    return all(
        rule["method"] not in never
        and not any(
            row.method == rule["method"] and all(rule.get(k) == v for k, v in row.options.items())
            for row in ROWS
            if not row.merges
        )
        for rule in spec["rules"]
    )


BY_ID = {row.id: row for row in ROWS}
ELSEWHERE = {"freeze"}  # methods without an adapter


def targets(row: Row, architecture: Any) -> Targets:
    """Names of modules of *architecture* for the row, as PEFT's ``target_modules``."""
    if row.method == "norm":
        return NORMS[architecture.name]
    if row.id == "oft" and architecture.name == "tables":
        return ["user", "item"]  # the others' widths are primes
    if row.method == "tokens":
        return [EMBEDDINGS[architecture.name]]
    return list(architecture.targets)
