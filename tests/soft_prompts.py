"""HF PEFT's prompts and prefixes beside ours, with the same tensors, for tests."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from peftfx.binding import bound
from peftfx.methods.peft_prompt import PromptForm
from tests.architectures import by_name
from tests.helpers import fill

P = 5
TASKS = {
    "llama": "CAUSAL_LM", "qwen3": "CAUSAL_LM", "phi3": "CAUSAL_LM", "gpt2": "CAUSAL_LM",
    "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "mistral": "CAUSAL_LM", "roberta": "SEQ_CLS",
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "prompt": peft.PromptTuningConfig,
    "ptuning": peft.PromptEncoderConfig,
    "prefix": peft.PrefixTuningConfig,
}


def rule(name: str, method: str, **options: Any) -> dict[str, Any]:
    """The rule that means what PEFT does by default."""
    if method != "prefix":
        return {"method": method, "role": "tokens", "length": P, **options}
    stack = {"stack": "decoder"} if name == "t5" else {}
    return {"method": "prefix", "role": "attention", "length": P, **stack, **options}


def theirs(base: nn.Module, name: str, method: str, **options: Any) -> Any:
    """PEFT's model around a copy of *base*."""
    config = CONFIGS[method](task_type=TASKS[name], num_virtual_tokens=P, **options)
    torch.manual_seed(4)
    return peft.get_peft_model(copy.deepcopy(base), config).eval()


def ours(base: nn.Module, reference: Any) -> nn.Module:
    """A copy of *base* with the tensors of PEFT's model, by way of its files."""
    model = copy.deepcopy(base)
    with tempfile.TemporaryDirectory() as directory:
        reference.save_pretrained(directory)
        peftfx.load(model, directory, trainable=True, compile=False)
    return model


def pair(name: str, method: str, **base: Any) -> tuple[Any, nn.Module, nn.Module]:
    """The base, PEFT's model and ours."""
    plain = by_name(name).build()
    for key, value in base.items():
        setattr(plain.generation_config, key, value)
        setattr(plain.config, key, value)
    reference = theirs(plain, name, method)
    return plain, reference, ours(plain, reference)


def gradient(reference: Any) -> Tensor:
    """The gradient of PEFT's one tensor, taken."""
    weight = reference.prompt_encoder["default"].embedding.weight
    found: Tensor = weight.grad.clone()
    weight.grad = None
    return found


def joined_gradient(model: nn.Module) -> Tensor:
    """Ours as PEFT has it, taken. Where its layers share a slot, theirs is the sum."""
    placed = [(p.site, p.method) for p in bound(model)[1].adapters["default"].plan
              if isinstance(p.method.peft, PromptForm)]  # fmt: skip
    form = placed[0][1].peft
    assert isinstance(form, PromptForm)
    grads: dict[str, dict[str, Tensor]] = {}
    for name, p in peftfx.named_parameters(model):
        site, _, leaf = name.rpartition(".")
        if ":train" not in name and p.grad is not None:
            grads.setdefault(site, {})[leaf] = p.grad.clone()
        p.grad = None
    tensors = list(grads.values())
    if len(tensors) == 2 and placed[0][0].around["stacks"] == 2:  # T5's two layers share all
        both = {n: tensors[0][n] + tensors[1][n] for n in tensors[0]}
        tensors = [both, both]
    return form.join(placed, tensors)


def inputs(name: str, padding: str = "none", decoder: bool = True) -> dict[str, Tensor]:
    """The architecture's example, with three tokens of the second row padded."""
    x = by_name(name).example()
    if not decoder:
        x.pop("decoder_input_ids", None)
    if padding != "none":
        mask = torch.ones_like(x["input_ids"])
        mask[1, -3:] = 0
        x["attention_mask"] = mask.flip(1) if padding == "left" else mask
    return x


def seen(name: str, x: dict[str, Tensor], out: Tensor, length: int) -> Tensor:
    """Rows of the output that stand for tokens: what padding computes means nothing."""
    mask = x.get("attention_mask")
    if mask is None or TASKS[name] != "CAUSAL_LM":
        return out
    extra = out.shape[1] - mask.shape[1]
    assert extra in (0, length)
    return out[torch.nn.functional.pad(mask, (extra, 0), value=1).bool()]


PROMPT = {"rules": [rule("llama", "prompt")]}


def prompted(base: nn.Module, spec: Any = None, example: Any = None) -> nn.Module:
    """A copy of *base* with a prompt, or what *spec* says, filled with numbers."""
    model = copy.deepcopy(base)
    Backend(spec or PROMPT, "aot_eager").bind(model, example)
    fill(peftfx.parameters(model), scale=1.0)
    return model
