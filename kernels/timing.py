"""Times of several runs, taken in turns, so that what slows the machine slows them all.

Runs are compared within one call of :meth:`Clock.seconds` and nowhere else.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

Run = Callable[[], Any]
WARM = 3  # turns that are not counted
FILL = 1 << 30  # bytes that are written to have them in the L2 cache and nothing else
FASTEST = 10e12  # bytes a second that no memory is faster than


class Clock(Protocol):
    """How runs are prepared and timed on one kind of device."""

    def ready(self, run: Run) -> Run:
        """*run* in the form that is timed."""
        ...

    def seconds(self, runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
        """The times of each of *runs*, which take turns."""
        ...


class Wall:
    """The clock on the wall, for the CPU."""

    def ready(self, run: Run) -> Run:
        return run

    def seconds(self, runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(WARM + rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                took = time.perf_counter() - start
                if turn >= WARM:
                    found[name].append(took)
        return found


class Events:
    """A GPU's own events. The host's time is left out, and the L2 cache is cold.

    Args:
        capture: whether runs are captured as graphs, and replays are timed. Else the device is
            kept busy before each run for as long as the host takes to launch it.
    """

    def __init__(self, capture: bool = True) -> None:
        self.other = torch.empty(FILL, dtype=torch.int8, device="cuda")
        self.capture = capture

    def ready(self, run: Run) -> Run:
        if not self.capture:
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def seconds(self, runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
        pairs: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
        ahead = {name: self._ahead(run) for name, run in runs.items()}
        for _ in range(rounds):
            for name, run in runs.items():
                for _ in range(ahead[name]):
                    self.other.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                pairs[name].append((start, end))
        torch.cuda.synchronize()
        return {
            name: [start.elapsed_time(end) / 1e3 for start, end in taken]
            for name, taken in pairs.items()
        }

    def _ahead(self, run: Run) -> int:
        """Warms *run* up; how often to fill the cache so that this lasts until it is launched."""
        for _ in range(WARM):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            took = time.perf_counter() - start
        return 1 + min(200, int(1.5 * took * FASTEST / FILL))


def clock(device: torch.device, capture: bool = True) -> Clock:
    """The clock for runs on *device*."""
    return Events(capture) if device.type == "cuda" else Wall()


def medians(clock: Clock, runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """The median time of each of *runs*, in seconds, as they take turns."""
    ready = {name: clock.ready(run) for name, run in runs.items()}
    return {name: statistics.median(t) for name, t in clock.seconds(ready, rounds).items()}


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """‖got - expected‖ / ‖expected‖ in fp64; NaN where there is one in *got*."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))
