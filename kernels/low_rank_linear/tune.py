"""Tiles by trial: one axis after the other from the shipped tile, for one call's sizes.

Bounded by a number of trials and a deadline. Every trial must give what fp64 gives before its time
counts. Run by ``peftfx tune`` and by nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from peftfx.errors import GraphError
from peftfx.kernels.devices import Device
from peftfx.kernels.low_rank_linear.calls import Operands
from peftfx.kernels.low_rank_linear.configs import Config, Shape, config
from peftfx.kernels.low_rank_linear.op import DEFINITIONS
from peftfx.kernels.low_rank_linear.runner import Configs, Runner
from peftfx.kernels.timing import Clock, distance, medians

WIDE = {
    "block_m": (64, 128, 256), "block_n": (64, 128, 256), "block_k": (32, 64, 128),
    "warps": (4, 8), "stages": (2, 3, 4, 5), "group_m": (4, 8, 16),
}  # fmt: skip
AXES: dict[str, dict[str, tuple[int, ...]]] = {
    **dict.fromkeys(("fwd", "dx", "fwd_descriptor", "dx_descriptor"), WIDE),
    "add": {"block_m": (32, 64, 128), "block_n": (64, 128, 256), "warps": (4, 8)},
    "decode": {"block_n": (16, 32, 64), "block_k": (64, 128, 256), "warps": (2, 4, 8),
               "stages": (2, 3, 4, 5)},
    "s": {"block_m": (16, 32, 64, 128), "block_k": (64, 128, 256), "warps": (4, 8),
          "stages": (2, 3, 4, 5), "parts": (0, 1, 2, 4, 8)},
    "dsb": {"block_m": (32, 64, 128), "block_n": (64, 128, 256), "warps": (4, 8),
            "stages": (2, 3, 4), "parts": (0, 1, 2, 4, 8)},
    "da": {"block_m": (32, 64, 128), "block_k": (64, 128, 256), "warps": (4, 8),
           "stages": (2, 3, 4), "parts": (0, 4, 8, 16)},
}  # fmt: skip
FORWARD = ("fwd", "fwd_descriptor", "add", "decode", "s")
BOUND = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
TF32 = 2e-3


@dataclass(frozen=True)
class Tuned:
    """The best tile of one kernel for one shape class, and the shipped one beside it."""

    kernel: str
    key: str
    best: Config
    seconds: float
    shipped_seconds: float
    trials: int
    failures: dict[str, str]  # tile → why it does not count

    def __str__(self) -> str:
        given = {k: v for k, v in vars(self.best).items() if v}
        tile = " ".join(f"{name}={value}" for name, value in given.items())
        gain = self.shipped_seconds / self.seconds
        return (
            f"{self.key}: {tile}, {1e3 * self.seconds:.4f} ms, {gain:.2f}× the shipped tile's "
            f"speed, {self.trials} tried, {len(self.failures)} refused"
        )


@dataclass(frozen=True)
class Alone(Runner):
    """A runner that launches only what uses the tile of *kernel*; or all, and notes what was used.

    Every launch follows the question for its tile.
    """

    kernel: str | None = None
    asked: list[tuple[str, Shape]] = field(default_factory=list)
    used: set[tuple[str, Shape]] = field(default_factory=set)

    def config(self, kernel: str, shape: Shape) -> Config:
        self.asked.append((kernel, shape))
        return super().config(kernel, shape)

    def __call__(self, kernel: Any, grid: tuple[Any, ...], **arguments: Any) -> None:
        name, shape = self.asked[-1]
        self.used.add((name, shape))
        if self.kernel in (None, name):
            super().__call__(kernel, grid, **arguments)


def tune(
    device: Device,
    operands: Operands,
    clock: Clock,
    trials: int = 40,
    rounds: int = 15,
    deadline: float = float("inf"),
    known: Configs = config,
) -> Iterator[Tuned]:
    """Finds tiles for the kernels that a call of *operands* launches, forward and backward.

    Args:
        trials: at most so many tiles of each kernel.
        deadline: by ``time.monotonic()``. Kernels share what is left; what is not done is left out.
        known: where tiles start from.

    Raises:
        GraphError: the tiles to start from give something else than fp64 does.
    """
    expected, todo = exact(operands), []
    for descriptors in (True, False):
        run = Alone(device, configs=known, descriptors=descriptors)
        wrong = verify(results(operands, run), expected)
        if wrong is not None:
            raise GraphError(f"the kernels are wrong before anything was tuned: {wrong}")
        for kernel, shape in run.used:
            if kernel in AXES and (kernel.endswith("descriptor") or not descriptors):
                todo.append((run, kernel, shape))
    todo.sort(key=lambda use: list(AXES).index(use[1]))  # what takes the most time comes first
    for number, (run, kernel, shape) in enumerate(todo):
        now = time.monotonic()
        if now > deadline:
            return
        share = now + (deadline - now) / (len(todo) - number)
        yield _best(run, kernel, shape, operands, expected, clock, trials, rounds, share)


def _best(
    run: Alone, kernel: str, shape: Shape, operands: Operands, expected: list[Tensor],
    clock: Clock, trials: int, rounds: int, deadline: float,
) -> Tuned:  # fmt: skip
    """A walk along the axes: what is best on one is kept when the next is tried."""
    start = run.config(kernel, shape)
    S = operands.forward(Runner(run.device, configs=run.configs))[1]

    def alone(tile: Config) -> Callable[[], Any]:
        only = replace(run, kernel=kernel, configs=_with(run.configs, kernel, tile))
        if kernel in FORWARD:
            return lambda: operands.forward(only)
        return lambda: operands.backward(only, S)

    best, seconds = start, medians(clock, {"": alone(start)}, rounds)[""]
    first, tried, failures = seconds, {start}, {}
    for axis, values in AXES[kernel].items():
        for value in values:
            tile = replace(best, **{axis: value})
            if tile in tried or len(tried) > trials or time.monotonic() > deadline:
                continue
            tried.add(tile)
            why = _refused(run, (kernel, shape), tile, operands, expected)
            if why is not None:
                failures[str(tile)] = why
                continue
            found = medians(clock, {"best": alone(best), "tile": alone(tile)}, rounds)
            if found["tile"] < 0.99 * found["best"]:
                best, seconds = tile, found["tile"]
    if best != start:  # side by side once more
        found = medians(clock, {"best": alone(best), "start": alone(start)}, 2 * rounds)
        seconds, first = found["best"], found["start"]
    return Tuned(kernel, f"{kernel}/{shape.key}", best, seconds, first, len(tried), failures)


def _with(known: Configs, kernel: str, tile: Config) -> Configs:
    return lambda name, device, shape: tile if name == kernel else known(name, device, shape)


def _refused(
    run: Alone, use: tuple[str, Shape], tile: Config, operands: Operands, expected: list[Tensor]
) -> str | None:
    """Why a tile does not count, if it does not: it cannot be compiled, is not used, is wrong."""
    from triton.errors import TritonError

    trial = replace(run, configs=_with(run.configs, use[0], tile), asked=[], used=set())
    try:
        got = results(operands, trial)
    except torch.AcceleratorError:  # the device itself is in trouble
        raise
    except (TritonError, RuntimeError) as error:  # MLIR's passes fail by RuntimeError
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return verify(got, expected) if use in trial.used else "with it the kernel is not used"


def results(operands: Operands, run: Runner) -> list[Tensor]:
    """ys, S, dX, dA's, dB's of the kernels."""
    ys, s = operands.forward(run)
    dx, das, dbs = operands.backward(run, s)
    return [*ys, s, dx, *das, *dbs]


def exact(operands: Operands) -> list[Tensor]:
    """The same by the definitions, in fp64; dropout with the same mask."""

    def wide(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [wide(v) for v in value]
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floats else value

    def flat(values: Any) -> list[Tensor]:
        return [t for v in values for t in (v if isinstance(v, (list, tuple)) else [v])]

    ranks = sum(a.shape[0] for a in operands.A)
    ahead, _ = operands.ops(operands.x.new_empty(operands.x.shape[0], ranks)).items()
    forward = flat(DEFINITIONS[ahead[0]](*wide(ahead[1])))
    _, (name, args) = operands.ops(forward[-1]).items()
    return [*forward, *flat(DEFINITIONS[name](*wide(args)))]


def verify(got: list[Tensor], expected: list[Tensor]) -> str | None:
    """None if *got* is *expected* to the precision of its dtype, else what is not."""
    narrow = min((t.dtype for t in got), key=lambda dtype: torch.finfo(dtype).bits)
    bound = BOUND[narrow]
    if narrow == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        bound = TF32
    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        off = distance(one, other)
        if not off < bound:
            return f"result {number} {tuple(one.shape)} is off by {off:.2g}, above {bound:g}"
    return None
