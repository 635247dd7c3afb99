"""One token of each of M sequences through the layers of a Llama-8B, 32 of them on a GPU, as a
CUDA graph, and 2 on a CPU; without a cache of keys and values. Rank 16 on all linears. `merged`
has the updates added to its weights, and costs what a frozen model does. Errors are those of
the last layer's output against fp64; twice those of plain products in the same dtype are allowed.
Layers are compiled one by one, where a variant is compiled.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.compare import Stand, outputs, work
from benchmarks.models import LLAMA_8B, TINY, Layer, Llama, Sites
from benchmarks.registry import Measure, Row, Setting, short
from benchmarks.variants import Adapter, Variant, variant
from benchmarks.verify import gate, usual

TARGET = "unmerged ≤1.05 of merged"
DEVICES = ("cuda", "cpu")
NAMES = ("peftfx", "peft, bf16 adapters", "peft + compile, bf16 adapters")


def cases(setting: Setting) -> Mapping[str, Measure]:
    rows: tuple[int, ...] = (1, 4, 16, 64) if setting.gpu else (1, 16)
    if setting.tiny:
        rows = (4,)
    names = {m: f"M {m}, {short(setting.dtypes[0])}" for m in rows}
    return {name: functools.partial(_token, setting, name, m) for m, name in names.items()}


def _token(setting: Setting, case: str, rows: int) -> list[Row]:
    sizes, rank = (TINY, 3) if setting.tiny else (LLAMA_8B, 16)
    if not setting.gpu:
        sizes = replace(sizes, layers=2)
    stand = Stand.of(
        setting, setting.dtypes[0], functools.partial(_layers, sizes), (rows, 1, sizes.hidden),
        Adapter(rank, by_layer=True), NAMES,
    )  # fmt: skip
    x = stand.x.detach()
    with torch.no_grad():
        variants = {"merged": merged(stand), **stand.variants}
        expected, narrow = through(stand, torch.float64), through(stand, stand.dtype)
        plain = gate("plain torch", [narrow], [expected], bound=0.5)
        bound = max(usual([narrow]), 2 * plain)
        runs = {n: functools.partial(outputs, one, x) for n, one in variants.items()}
        errors = {name: gate(name, run(), [expected], bound) for name, run in runs.items()}
        values, spread = setting.measure(runs)
    row = Row(case, values, "forward", over="merged", errors=errors, spread=spread)
    row.missing, row.work = stand.missing, work(stand.base, x, rank, backward=False)
    row.least = setting.floor(row.work["flops"], row.work["bytes"], stand.dtype)
    return [row]


def _layers(sizes: Llama) -> nn.Module:
    return nn.Sequential(*(Layer(sizes, 1) for _ in range(sizes.layers)))


def through(stand: Stand, dtype: torch.dtype) -> Tensor:
    """x through all layers, products and updates written out in *dtype*; one layer lies in memory
    at a time, for a whole model in fp64 takes four of those that are measured."""
    x = stand.x.detach().to(dtype)
    for layer, factors in zip(layers(stand.base), _by_layer(stand), strict=True):
        base = copy.deepcopy(layer).to(dtype)
        one = variant("plain torch", base, stand.adapter, stand.setting)
        for ours, theirs in zip(one.factors, factors, strict=True):
            ours.copy_(theirs)
        (x,) = outputs(one, x)
    return x


def merged(stand: Stand) -> Variant:
    """The model with W + s·B·A for each W, compiled as others are."""
    model = copy.deepcopy(stand.base)
    for layer, factors in zip(layers(model), _by_layer(stand), strict=True):
        sites = [m for m in layer.modules() if isinstance(m, Sites)]
        weights = [w for m in sites for w in m.parameters()]
        half = len(factors) // 2
        for w, a, b in zip(weights, factors[:half], factors[half:], strict=True):
            w.copy_(w.float() + stand.adapter.scale * (b.float() @ a.float()))
        stand.setting.compiled(layer)
    return Variant(model, [])


def layers(model: nn.Module) -> list[Layer]:
    return [m for m in model.modules() if isinstance(m, Layer)]


def _by_layer(stand: Stand) -> list[Sequence[Tensor]]:
    """The factors that all variants share: of each layer first the A's and then the B's."""
    found = next(v.factors for v in stand.variants.values())
    count = len(layers(stand.base))
    half = len(found) // 2
    step = half // count
    return [
        [*found[i * step : (i + 1) * step], *found[half + i * step : half + (i + 1) * step]]
        for i in range(count)
    ]
