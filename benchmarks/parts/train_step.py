"""A training step of transformers' Llama (6 layers, hidden 768, 4×128 tokens), LoRA of rank 16
on all linears: forward, loss, backward, fused AdamW. `frozen` trains the first layer's first
norm alone. Errors are those of all gradients against PEFT's.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import peftfx
from benchmarks.peers import why_no_peft
from benchmarks.registry import Measure, Row, Setting, short
from benchmarks.verify import gate

TARGET = (
    "PEFT's time ≥1.2 of ours in bfloat16 and ≥1.05 in float32; never slower than PEFT + compile; \
≤1.08 of frozen"
)
DEVICES = ("cpu", "cuda")
RANK = 16
NAMES = ("frozen", "peftfx", "peft", "peft + compile")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPEC: dict[str, Any] = {
    "rules": [{"method": "lora", "name": [f"*.{t}" for t in TARGETS], "rank": RANK}]
}
Step = Callable[[], Tensor]


def cases(setting: Setting) -> Mapping[str, Measure]:
    names = [short(dtype) for dtype in setting.dtypes[::-1][: 1 if setting.tiny else 2]]
    return {name: functools.partial(_steps, setting, name) for name in names}


def _steps(setting: Setting, name: str) -> list[Row]:
    why = why_no_peft()
    if why is not None:
        raise ModuleNotFoundError(why)
    torch._dynamo.reset()
    base, ids = llama(setting, getattr(torch, name)), batch(setting)
    models = {variant: adapted(variant, base, setting) for variant in NAMES}
    same_start(models)
    theirs, ours = (gradients(models[n], ids, n) for n in ("peft", "peftfx"))
    errors = {"peftfx": gate("peftfx", [ours], [theirs], 1e-4 if name == "float32" else 3e-2)}
    values, spread = setting.measure(
        {n: stepper(model, ids) for n, model in models.items()}, capture=False
    )
    return [Row(name, values, errors=errors, spread=spread)]


def llama(setting: Setting, dtype: torch.dtype) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = (48, 64, 1, 4) if setting.tiny else (768, 2048, 6, 12)
    hidden, inner, layers, heads = sizes
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, use_cache=False,
        max_position_embeddings=256,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.to(setting.device, dtype)


def batch(setting: Setting) -> Tensor:
    return torch.randint(0, 2048, (2, 8) if setting.tiny else (4, 128), device=setting.device)


def stepper(model: nn.Module, ids: Tensor) -> Step:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def adapted(name: str, base: nn.Module, setting: Setting) -> nn.Module:
    """A variant, compiled in place where it is."""
    model = copy.deepcopy(base)
    if name == "peftfx":
        adapted: nn.Module = peftfx.adapt(model, SPEC, lower=setting.lower)
        return adapted
    if name == "frozen":
        for key, p in model.named_parameters():
            p.requires_grad_(key == "model.layers.0.input_layernorm.weight")
        return setting.compiled(model)
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=TARGETS)
    made: nn.Module = peft.get_peft_model(model, config)
    return setting.compiled(made) if name == "peft + compile" else made


def same_start(models: dict[str, nn.Module]) -> None:
    """Gives PEFT's models the tensors of ours."""
    tensors = factors("peftfx", models["peftfx"])
    with torch.no_grad():
        for p in tensors.values():
            if p.abs().max() == 0:
                p.normal_(std=0.02)
        for name in ("peft", "peft + compile"):
            theirs = factors(name, models[name])
            if theirs.keys() != tensors.keys():
                raise SystemExit(f"other tensors train than PEFT's: {theirs.keys() ^ tensors}")
            for key, p in theirs.items():
                p.copy_(tensors[key])


def factors(name: str, model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained tensors of a variant by ``<module>A`` and ``<module>B``."""
    if name == "peftfx":
        return {
            n.partition(":")[0].removesuffix(".weight") + n.rpartition(".")[2]: p
            for n, p in peftfx.named_parameters(model)
        }
    found = {}
    for key, p in model.named_parameters():
        path, lora, rest = key.removeprefix("base_model.model.").partition(".lora_")
        if lora:
            found[path + rest[0]] = p
    return found


def gradients(model: nn.Module, ids: Tensor, name: str) -> Tensor:
    """All gradients of a variant in one tensor."""
    named = factors(name, model)
    grads = torch.autograd.grad(
        model(input_ids=ids, labels=ids).loss, [named[key] for key in sorted(named)]
    )
    return torch.cat([g.flatten().float() for g in grads])
