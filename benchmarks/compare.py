"""Variants of one model side by side: first whether they agree, then how long they take."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import Sites, drawn
from benchmarks.registry import Row, Setting
from benchmarks.variants import Adapter, Variant, same_start, variant
from benchmarks.verify import dropped, gate, usual
from peftfx.kernels.low_rank_linear.configs import Shape
from peftfx.kernels.timing import Run
from peftfx.passes.claims.cost import Call, least

WAYS = {"forward": False, "forward and backward": True}


@dataclass
class Stand:
    """Variants of one model on one input ``x``, and a gradient ``dys`` for each output."""

    setting: Setting
    dtype: torch.dtype
    adapter: Adapter
    base: nn.Module
    x: Tensor
    dys: list[Tensor]
    variants: dict[str, Variant]
    missing: dict[str, str]

    @classmethod
    def of(
        cls, setting: Setting, dtype: torch.dtype, make: Callable[[], nn.Module],
        shape: Sequence[int], adapter: Adapter, names: Sequence[str],
    ) -> Stand:  # fmt: skip
        """Draws model and input, and makes those variants of which all that they need is there."""
        torch._dynamo.reset()
        base = drawn(make, setting, dtype)
        x = torch.randn(*shape, device=setting.device).to(dtype)
        adapter = replace(adapter, example=(x,))
        variants, missing = {}, {}
        for name in names:
            try:
                variants[name] = variant(name, base, adapter, setting)
            except ModuleNotFoundError as error:
                missing[name] = str(error)
        same_start(variants)
        with torch.no_grad():
            dys = [torch.randn_like(y) for y in outputs(Variant(base, []), x)]
        return cls(setting, dtype, adapter, base, x.requires_grad_(), dys, variants, missing)

    def gate(self) -> dict[str, float]:
        """How far variants are from plain products in fp64, gradients included.

        They may be off by twice what plain products in their own dtype are.
        """
        given = {name: one for name, one in self.variants.items() if one.factors}
        expected = self.both(self.plain(torch.float64), torch.float64)
        p = self.adapter.dropout
        if not p:
            narrow = self.both(self.plain(self.dtype))
            bound = max(usual(narrow), 2 * gate("plain torch", narrow, expected, bound=0.5))
            return {name: gate(name, self.both(v), expected, bound) for name, v in given.items()}
        # masks differ: what can be seen is whether there is as much noise as there should be
        base = copy.deepcopy(self.base).double()
        update = expected[0] - outputs(Variant(base, []), self.x.double())[0]
        return {
            n: dropped(n, outputs(v, self.x)[0], expected[0], update, p) for n, v in given.items()
        }

    def plain(self, dtype: torch.dtype) -> Variant:
        """The products written out, in *dtype*, without dropout, with the variants' factors."""
        base = copy.deepcopy(self.base).to(dtype)
        made = variant("plain torch", base, replace(self.adapter, dropout=0.0), self.setting)
        like = next(v for v in self.variants.values() if v.factors)
        with torch.no_grad():
            for ours, theirs in zip(made.factors, like.factors, strict=True):
                ours.copy_(theirs)
        return made

    def both(self, one: Variant, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Outputs, and the gradients of x and of the factors."""
        x, dys = self.x, self.dys
        if dtype is not None:
            x, dys = x.detach().to(dtype).requires_grad_(), [dy.to(dtype) for dy in dys]
        ys = outputs(one, x)
        return [*ys, *torch.autograd.grad(ys, [x, *one.factors], dys)]

    def rows(self, case: str) -> list[Row]:
        """The gate, and then a row for each way."""
        errors, found = self.gate(), []
        for way, backward in WAYS.items():
            run = self.both if backward else functools.partial(outputs, x=self.x)
            runs: dict[str, Run] = {n: functools.partial(run, v) for n, v in self.variants.items()}
            values, spread = self.setting.measure(runs, capture=False)
            row = Row(case, values, way, errors=errors, spread=spread, missing=self.missing)
            row.work = work(self.base, self.x, self.adapter.rank, backward)
            row.least = self.setting.floor(row.work["flops"], row.work["bytes"], self.dtype)
            row.megabytes = peaks(runs) if self.setting.gpu else {}
            found.append(row)
        return found


def outputs(one: Variant, x: Tensor) -> list[Tensor]:
    """What the variant's model makes of x."""
    made = one.model(x)
    return [made] if isinstance(made, Tensor) else list(made)


def work(model: nn.Module, x: Tensor, rank: int, backward: bool) -> dict[str, float]:
    """Operations and bytes that adapted linears on so many rows cannot go below."""
    flops = size = 0
    for sites in (m for m in model.modules() if isinstance(m, Sites)):
        k, outs = sites.sizes
        count = len(outs)
        shape = Shape(x.shape[:-1].numel(), k, sum(outs), rank * count, x.dtype, count)
        for op in ("low_rank_linear", *["low_rank_backward"] * backward):
            price = least(Call(op, shape, outs, (rank,) * count, True, x.itemsize))
            flops, size = flops + price.flops, size + price.bytes
    return {"flops": flops, "bytes": size}


def peaks(runs: Mapping[str, Run]) -> dict[str, float]:
    """What each run takes at its peak, in megabytes, beside what lay there before it."""
    found = {}
    for name, run in runs.items():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        found[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
    return found


def peak_on_cpu(run: Run) -> int:
    """The most bytes of a CPU's memory that *run* has allocated at once, beside what there was."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as found:
        run()
    now = most = 0
    recorded: Any = found.profiler
    for event in recorded.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
