"""A Llama's layer with other methods than LoRA: DoRA of rank 16 on its seven linears, IA³ on keys,
values and the inner activations, bottlenecks of 64 behind attention and feed-forward. `peft` is
eager as it comes; PEFT has no bottlenecks, `plain torch` is one written out. Errors are those of
the outputs and of dX. `frozen` has dX alone.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from benchmarks.models import LLAMA_8B, TINY, Layer, Llama, drawn
from benchmarks.peers import why_no_peft
from benchmarks.registry import Measure, Row, Setting, short
from benchmarks.verify import gate, usual
from peftfx.backends import Backend

TARGET = "DoRA ≤1.10 of frozen, IA³ ≤1.05"
DEVICES = ("cuda", "cpu")
SMALL = Llama(768, 2048, 12, 4)
RULES: dict[str, dict[str, Any]] = {
    "dora": {"method": "dora", "name": "*linears*", "rank": 16, "alpha": 32},
    "ia3": {
        "method": "ia3", "name": ["qkv.linears.1", "qkv.linears.2", "down.linears.0"],
        "overrides": [{"name": "down.linears.0", "at": "input"}],
    },
    "bottleneck": {
        "method": "bottleneck", "name": ["o.linears.0", "down.linears.0"], "size": 64,
        "activation": "gelu",
    },
}  # fmt: skip


def cases(setting: Setting) -> Mapping[str, Measure]:
    found: dict[str, Measure] = {}
    for method in RULES:
        dtype = setting.dtypes[0]  # of more a CPU would compile for longer than a part may take
        name = f"{method}, {short(dtype)}"
        found[name] = functools.partial(_rows, setting, name, method, dtype)
    return found


class Written(nn.Module):
    """A linear with a bottleneck behind it, as one writes it."""

    def __init__(self, linear: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.linear = linear
        self.inner = nn.ParameterDict({n: nn.Parameter(t) for n, t in parameters.items()})

    def forward(self, x: Tensor) -> Tensor:
        y, p = self.linear(x), {n: t.to(x.dtype) for n, t in self.inner.items()}
        inner = F.gelu(F.linear(y, p["down"], p["down_bias"]))
        return y + F.linear(inner, p["up"], p["up_bias"])


def _rows(setting: Setting, case: str, method: str, dtype: torch.dtype) -> list[Row]:
    sizes, length = (LLAMA_8B, 2048) if setting.gpu else (SMALL, 512)
    if setting.tiny:
        sizes, length = TINY, 8
    torch._dynamo.reset()
    base = drawn(lambda: Layer(sizes, length), setting, dtype)
    x = torch.randn(1, length, sizes.hidden, device=setting.device).to(dtype).requires_grad_()
    models, missing = _variants(setting, base, method, x)
    dy = torch.randn_like(x)
    plain = "plain torch" if method == "bottleneck" else "peft"
    errors = {}
    if plain in models:
        got, want = (_both(models[n], x, dy) for n in ("peftfx", plain))
        errors = {"peftfx": gate("peftfx", got, want, 4 * usual(got))}
    rows = []
    for way, run in {"forward": _forward, "forward and backward": _both}.items():
        runs = {n: functools.partial(run, m, x, dy) for n, m in models.items()}
        values, spread = setting.measure(runs, capture=False)
        rows.append(Row(case, values, way, errors=errors, spread=spread, missing=missing))
    return rows


def _variants(
    setting: Setting, base: nn.Module, method: str, x: Tensor
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layer frozen and adapted, all of one start, and why a variant is missing."""

    def shared() -> nn.Module:
        return copy.deepcopy(base, {id(p): p for p in base.parameters()})

    backend, ours = Backend({"rules": [RULES[method]]}, setting.lower), shared()
    backend.bind(ours, (x,))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in peftfx.parameters(ours):
            noise = torch.randn(p.shape, generator=generator).to(p.device)
            p.add_(noise * (0.1 if p.ndim < 2 or 1 in p.shape else p.shape[-1] ** -0.5))
    models, missing = {"frozen": setting.compiled(shared()), "peftfx": ours}, {}
    made = _written(shared(), ours) if method == "bottleneck" else _by_peft(shared(), ours)
    for name in ("plain torch",) if method == "bottleneck" else ("peft",):
        if isinstance(made, str):
            missing[name] = made
            continue
        models[name] = made
        if setting.tiny:
            continue
        models[f"{name} + compile"] = setting.compiled(
            copy.deepcopy(made, {id(p): p for p in made.parameters()})
        )
    ours.compile(backend=backend, fullgraph=True)
    return models, missing


def _written(model: nn.Module, ours: nn.Module) -> nn.Module:
    values: dict[str, dict[str, Tensor]] = {}
    for name, p in peftfx.named_parameters(ours):
        path, _, leaf = name.rpartition(".")
        values.setdefault(path, {})[leaf] = p.detach().clone()
    for path in RULES["bottleneck"]["name"]:
        (found,) = (p for at, p in values.items() if at.startswith(path))
        model.set_submodule(path, Written(model.get_submodule(path), found))
    return model


def _by_peft(model: nn.Module, ours: nn.Module) -> nn.Module | str:
    why = why_no_peft()
    if why is not None:
        return why
    import peft

    with tempfile.TemporaryDirectory() as directory:
        peftfx.save(ours, directory)
        made: nn.Module = peft.PeftModel.from_pretrained(model, directory, is_trainable=True)
    return made


def _forward(model: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    out: Tensor = model(x)
    return out


def _both(model: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    out = model(x)
    return [out, *torch.autograd.grad(out, [x, *trained], dy)[:1]]
