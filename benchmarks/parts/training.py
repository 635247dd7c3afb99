"""A step of training: forward, loss, backward, fused AdamW; Llamas of 1B and 8B with random
weights in bfloat16, LoRA of rank 16 on all linears of their layers, sequences of 2048 tokens,
nothing checkpointed. Layers are compiled one by one, where a variant is compiled; embedding,
head and loss are not, in any. In `frozen` one norm of the first layer trains. Memory is what
a step takes beside weights and optimizer. Errors are those of all factors' gradients
together, against fp32; twice those of plain products are allowed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchmarks.compare import peaks
from benchmarks.models import LLAMA_1B, LLAMA_8B, TINY, Layer, Llama, Whole, drawn
from benchmarks.registry import Measure, Row, Setting
from benchmarks.variants import ALL, Adapter, Variant, same_start, variant
from benchmarks.verify import gate
from peftfx.kernels.timing import Run

TARGET = "memory ≤1.15 of 92 KiB a token and layer (8B), ≤0.5 of PEFT's, ≤0.9 of PEFT + compile's"
DEVICES = ("cuda",)


def cases(setting: Setting) -> Mapping[str, Measure]:
    models = {"1B, batch 4": (LLAMA_1B, 4, 2048), "8B, batch 2": (LLAMA_8B, 2, 2048)}
    if setting.tiny:
        models = {"tiny": (TINY, 2, 8)}
    return {name: functools.partial(_train, setting, name, *m) for name, m in models.items()}


def _train(setting: Setting, case: str, sizes: Llama, batch: int, length: int) -> list[Row]:
    torch._dynamo.reset()
    base = drawn(lambda: Whole(sizes, length), setting, torch.bfloat16)
    ids = torch.randint(0, sizes.vocabulary, (batch, length), device=setting.device)
    adapter = Adapter(example=(ids,), by_layer=True)
    variants, missing = {}, {}
    for name in ALL:
        try:
            variants[name] = variant(name, base, adapter, setting)
        except ModuleNotFoundError as error:
            missing[name] = str(error)
    errors = _gate(base, variants, ids, adapter, setting)
    runs: dict[str, Run] = {name: _step(one, ids) for name, one in variants.items()}
    values, spread = setting.measure(runs, capture=False)
    memory = peaks(runs) if setting.gpu else {}
    return [Row(case, values, errors=errors, spread=spread, megabytes=memory, missing=missing)]


def _gate(
    base: nn.Module, variants: dict[str, Variant], ids: Tensor, adapter: Adapter, setting: Setting
) -> dict[str, float]:
    """Errors against fp32: as large as those of plain products in the model's dtype, or so."""
    plain = variant("plain torch", base, adapter, setting)
    wide = variant("plain torch", copy.deepcopy(base).float(), adapter, setting)
    wide.model.checkpoints = True  # type: ignore[assignment]  # fp32 takes twice the room
    same_start({**variants, "plain": plain, "wide": wide})
    expected: list[Tensor] = []
    for row in ids.split(1):  # the loss is a mean: one sequence after the other
        found = [t / len(ids) for t in _gradients(wide, row)]
        expected = [a + b for a, b in zip(expected, found, strict=True)] if expected else found
    usual = gate("plain torch", _gradients(plain, ids), expected, bound=0.5)
    return {
        name: gate(name, _gradients(one, ids), expected, 2 * usual)
        for name, one in variants.items()
        if one.factors
    }


def _gradients(one: Variant, ids: Tensor) -> list[Tensor]:
    """The loss, and all factors' gradients in one tensor."""
    loss = one.model(ids)
    grads = torch.autograd.grad(loss, one.factors)
    return [loss.detach(), torch.cat([g.flatten().float() for g in grads])]


def _step(one: Variant, ids: Tensor) -> Run:
    trained = one.factors or [_norm(one.model)]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        one.model(ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _norm(model: nn.Module) -> nn.Parameter:
    """A trained norm in the first layer, no other variant's: there is a backward to its end."""
    assert isinstance(model, Whole)
    layer = model.layers[0]
    assert isinstance(layer, Layer)
    made = nn.Parameter(layer.norms[0].detach().clone())
    layer.norms[0] = made
    return made
