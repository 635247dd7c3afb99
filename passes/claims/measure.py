"""What ``peftfx tune`` does: rates of a device, tiles for calls, and times of the calls by form.

:mod:`.cost` compares those times before it computes any.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from peftfx.errors import GraphError
from peftfx.kernels.devices import Device, describe
from peftfx.kernels.low_rank_linear.calls import Operands, Sizes, drawn
from peftfx.kernels.low_rank_linear.configs import Config, Shape, config
from peftfx.kernels.low_rank_linear.forms import compute
from peftfx.kernels.low_rank_linear.runner import FEW, Configs
from peftfx.kernels.low_rank_linear.tune import exact, tune, verify
from peftfx.kernels.measured import Table
from peftfx.kernels.rates import rates
from peftfx.kernels.timing import clock, medians
from peftfx.passes.claims import CLAIMS
from peftfx.passes.claims.cost import Call

LLAMA_8B = ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))


def measure(
    device: torch.device,
    sizes: Sequence[Sizes],
    dtype: torch.dtype,
    minutes: float = 8.0,
    trials: int = 40,
    rounds: int = 15,
) -> Iterator[tuple[str, Table]]:
    """Measures *device*, each of *sizes* in every form, then tiles, as long as there is time.

    Every call has its times before the first tile is tried, and calls share the time that is left.

    Yields:
        What was found, for people, and as an entry for :mod:`peftfx.kernels.measured`.

    Raises:
        GraphError: kernels or forms give something else than fp64 does; all else was measured.
    """
    deadline = time.monotonic() + 60 * minutes
    kernels, ratios = describe(device), []
    figures = rates(device, rounds)
    yield ", ".join(f"{name} {value:.4g}" for name, value in figures.items()), Table(figures)
    wrong: list[str] = []
    for one in sizes:
        if not one.drops and time.monotonic() < deadline:
            operands = Operands.of(one, dtype, drawn(device))
            yield from _sound(wrong, one, _calls(operands, device, config, rounds))
    for number, one in enumerate(sizes if kernels is not None else ()):
        now = time.monotonic()
        if now > deadline:
            break
        share = now + (deadline - now) / (len(sizes) - number)
        operands, tiles = Operands.of(one, dtype, drawn(device)), dict[str, Config]()
        assert kernels is not None
        tuned = tune(kernels, operands, clock(device), trials, rounds, share)
        for found in _sound(wrong, one, tuned):
            tiles[found.key] = found.best
            if found.kernel == "fwd" and len(one.outs) == 1 and one.rows > FEW:
                ratios.append(_library(operands, device, rounds) / found.seconds)
            yield str(found), Table(tiles={found.key: asdict(found.best)})
        if tiles and not one.drops:
            yield from _sound(wrong, one, _calls(operands, device, _tiles(tiles), rounds))
    if ratios:
        name = "triton" if dtype.itemsize == 2 else "triton_fp32"
        ratio = statistics.median(ratios)
        yield f"{name} {ratio:.3f} of the library's rate", Table({name: ratio})
    if wrong:
        raise GraphError("; ".join(wrong), remedy="PEFTFX_FORMS=accumulate takes the library's")


def _sound(wrong: list[str], one: Sizes, found: Iterator[Any]) -> Iterator[Any]:
    """What is *found*, up to the first thing that is wrong, which is kept for the end."""
    try:
        yield from found
    except GraphError as error:
        wrong.append(f"{one}: {error}")


def _tiles(found: dict[str, Config]) -> Configs:
    def tile(kernel: str, device: Device, shape: Shape) -> Config:
        return found.get(f"{kernel}/{shape.key}") or config(kernel, device, shape)

    return tile


def _library(operands: Operands, device: torch.device, rounds: int) -> float:
    """Seconds of the frozen product alone."""
    run = {"": lambda: F.linear(operands.x, operands.weights[0])}
    return medians(clock(device), run, rounds)[""]


def _calls(
    operands: Operands, device: torch.device, configs: Configs, rounds: int
) -> Iterator[tuple[str, Table]]:
    """Times forward and backward in each form that can take them; one that is wrong has no time."""
    expected, ys = exact(operands), len(operands.A) + 1
    S = expected[ys - 1].to(operands.x.dtype)
    wanted = (expected[:ys], expected[ys:])
    for (op, args), values in zip(operands.ops(S).items(), wanted, strict=True):
        key, runs = Call.of(op, args).key, forms(op, args, configs)
        wrong = {name: verify(tree_leaves(run()), values) for name, run in runs.items()}
        right = {name: run for name, run in runs.items() if wrong[name] is None}
        if not right:
            raise GraphError(f"no form of {key} is right: {wrong}")
        times = {n: 1e3 * t for n, t in medians(clock(device), right, rounds).items()}
        text = ", ".join(
            f"{name} " + (f"{times[name]:.3f} ms" if name in times else f"WRONG: {why}")
            for name, why in wrong.items()
        )
        yield f"{key}: {text}", Table(calls={key: times})


def forms(op: str, args: tuple[Any, ...], configs: Configs) -> dict[str, Callable[[], Any]]:
    """A call in each form that can take it; kernels as a graph's own code launches them."""
    found: dict[str, Callable[[], Any]] = {}
    for claim in CLAIMS:
        if op not in claim.ops or claim.emit is None or claim.check(op, args) is not None:
            continue
        if claim.name in ("triton", "opaque"):
            how = {"descriptors": claim.name == "opaque", "configs": configs}
            found[claim.name] = functools.partial(compute, op, args, **how)
        else:
            found[claim.name] = functools.partial(claim.emit, op, *args)
    return found
