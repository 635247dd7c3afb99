"""What a benchmark is made of: parts, their cases, and the row of numbers that each case gives."""

from __future__ import annotations

import functools
import importlib
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftfx.kernels.timing import Clock, Run, clock

PARTS = (  # modules of benchmarks.parts, in the order in which they run
    "tests", "figures", "products", "forms", "k_augmented", "linear", "lorafusion", "layer",
    "decode", "training", "train_step", "first_step", "marks", "prefix_attention",
)  # fmt: skip


@dataclass
class Row:
    """One case: a number for each variant, and all that is needed to judge it.

    Args:
        way: what of the case is timed, where rows differ in that: forward, forward and backward.
        over: the variant that the others are divided by.
        errors: how far each variant's results are from the reference's, from the gate.
        spread: (80th - 20th percentile) / median, of each variant.
        least: what the roofline allows a form of the op, in ``unit``, by the device's own rates.
        work: floating-point operations and bytes that no form can go below.
        megabytes: what each variant takes at its peak, beside what lay there before the run.
        chosen: the variant that the lowering takes.
        missing: why a variant has no number.
    """

    case: str
    values: dict[str, float]
    way: str = ""
    unit: str = "ms"
    over: str | None = "frozen"
    errors: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    least: float | None = None
    work: dict[str, float] = field(default_factory=dict)
    megabytes: dict[str, float] = field(default_factory=dict)
    chosen: str = ""
    missing: dict[str, str] = field(default_factory=dict)


Measure = Callable[[], list[Row]]


@dataclass(frozen=True)
class Setting:
    """Where and how large: ``tiny`` runs every line in seconds and measures nothing of interest."""

    device: torch.device
    tiny: bool = False
    rounds: int = 15
    rates: Mapping[str, float] = field(default_factory=dict)  # of the part `figures`
    commit: str = ""  # of the sources, where git cannot be asked

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def lower(self) -> str:
        """The inner compiler; on a CPU a tiny run does not wait for Inductor's."""
        return "aot_eager" if self.tiny and not self.gpu else "inductor"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes that GPUs are measured in, and CPUs: in 16 bits where these have products.

        Without AVX-512 torch makes those number by number: 1 to 10 % of the rate of float32.
        """
        if self.gpu:
            return (torch.bfloat16,)
        wide = "AVX512" in torch.backends.cpu.get_cpu_capability()
        return (torch.bfloat16, torch.float32) if wide else (torch.float32,)

    def compiled(self, model: nn.Module) -> nn.Module:
        """*model* compiled in place, with what peftfx's graphs are compiled with."""
        model.compile(backend=self.lower)
        return model

    def clock(self, capture: bool = True) -> Clock:
        return clock(self.device, capture=capture)

    def measure(
        self, runs: Mapping[str, Run], capture: bool = True
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Median milliseconds of *runs*, which take turns, and their spread."""
        watch = self.clock(capture)
        ready = {name: watch.ready(run) for name, run in runs.items()}
        times = watch.seconds(ready, 1 if self.tiny else self.rounds)
        median = {name: statistics.median(t) for name, t in times.items()}
        spread = {n: (_quantile(t, 0.8) - _quantile(t, 0.2)) / median[n] for n, t in times.items()}
        return {n: 1e3 * m for n, m in median.items()}, spread

    def floor(self, flops: float, size: float, dtype: torch.dtype) -> float | None:
        """Milliseconds that the roofline allows for so many operations and bytes."""
        name = "tflops" if dtype.itemsize == 2 else "tflops_fp32"
        if name not in self.rates:
            return None
        return 1e3 * max(flops / self.rates[name] / 1e12, size / self.rates["gigabytes"] / 1e9)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[round(q * (len(values) - 1))]


@dataclass(frozen=True)
class Part:
    """A part of the benchmark: a module with ``TARGET``, ``DEVICES`` and ``cases``."""

    name: str
    about: str  # its docstring, shown above its table
    target: str  # what is aimed at, "" where it is only for orientation
    devices: tuple[str, ...]
    cases: Callable[[Setting], Mapping[str, Measure]]  # by name; each gives its rows


@functools.cache
def part(name: str) -> Part:
    """The part of that name; its module is imported now."""
    module: Any = importlib.import_module(f"benchmarks.parts.{name}")
    return Part(name, module.__doc__.strip(), module.TARGET, module.DEVICES, module.cases)
