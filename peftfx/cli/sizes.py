"""How many values each method trains, on the shapes of Llama 2 7B.

The model is a skeleton of its modules on the meta device, without transformers: nothing is
allocated, and the count takes a second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftfx.errors import PlanError
from peftfx.layout import Layout
from peftfx.methods.method import Method
from peftfx.plans import resolve
from peftfx.roles import Roles
from peftfx.roles.outputs import Output
from peftfx.spec import Spec

VOCABULARY, WIDTH, INNER, LAYERS, HEADS = 32000, 4096, 11008, 32, 32
_HEADS = {"kv_heads": HEADS, "head_dim": WIDTH // HEADS, "value_dim": WIDTH // HEADS}
PLACES = Layout(  # what a run would show
    tokens={"model.embed_tokens.weight": {"encoder": ""}},
    attention={f"model.layers.{i}.self_attn.q_proj.weight": _HEADS for i in range(LAYERS)},
)


def _outputs() -> dict[str, list[Output]]:
    """What a run would show of the modules' outputs."""
    shown: dict[str, list[Output]] = {}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for part, last in (("attention", "self_attn.o_proj"), ("mlp", "mlp.down_proj")):
            module, beside = f"{layer}.{last.partition('.')[0]}", f"{layer}.{last}.weight"
            roles = (part, f"residual.{part}")
            shown[module] = [Output(role, (WIDTH, WIDTH), beside) for role in roles]
        shown[layer] = [Output("block", (WIDTH, WIDTH), f"{layer}.mlp.down_proj.weight")]
    return shown


ROLES = Roles(outputs=_outputs())


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH))
        self.variance_epsilon = 1e-5


def _block() -> nn.Module:
    def linears(**shapes: tuple[int, int]) -> nn.Module:
        made = nn.Module()
        for name, (inputs, outputs) in shapes.items():
            made.add_module(name, nn.Linear(inputs, outputs, bias=False))
        return made

    square = (WIDTH, WIDTH)
    block = nn.Module()
    block.self_attn = linears(q_proj=square, k_proj=square, v_proj=square, o_proj=square)
    block.mlp = linears(gate_proj=(WIDTH, INNER), up_proj=(WIDTH, INNER), down_proj=(INNER, WIDTH))
    block.input_layernorm, block.post_attention_layernorm = _Norm(), _Norm()
    return block


def llama() -> nn.Module:
    """The modules of ``LlamaForCausalLM`` at 7B, by their names and shapes, on the meta device."""
    with torch.device("meta"):
        model, inner = nn.Module(), nn.Module()
        inner.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        inner.layers = nn.ModuleList(_block() for _ in range(LAYERS))
        inner.norm = _Norm()
        model.model = inner
        model.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    return model


def size(model: nn.Module, method: type[Method]) -> dict[str, Any]:
    """The rule of the method's example on *model*, and how many values it trains.

    It is none where the model has nothing that the method trains; ``reason`` tells what is missing.
    """
    rule = {"method": method.name, **method.example}
    try:
        plan = resolve(model, Spec.parse({"rules": [rule]}), ROLES, PLACES)
    except PlanError as error:
        return {"rule": rule, "trainable": 0, "reason": error.message}
    return {"rule": rule, "trainable": plan.trainable, "share": plan.trainable / plan.total}
