"""The clocks: who takes turns with whom, and that a GPU's leaves the host out."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import pytest
import torch

from peftfx.kernels import timing
from peftfx.kernels.timing import FASTEST, FILL, WARM, Events, Wall, distance, medians


class Device:
    """A stand-in for ``torch.cuda``: events are numbers of a queue, of which each launch is one."""

    def __init__(self) -> None:
        self.queue: list[str] = []
        self.captured: list[str] | None = None

    def launch(self, what: str) -> None:
        (self.queue if self.captured is None else self.captured).append(what)

    def modules(self) -> Any:
        class Event:
            def __init__(event, enable_timing: bool) -> None:
                assert enable_timing

            def record(event) -> None:
                event.at = len(self.queue)

            def elapsed_time(event, end: Any) -> float:
                return float(end.at - event.at)

        class Graph:
            def replay(graph) -> None:
                self.queue.extend(graph.held)

        @contextlib.contextmanager
        def capture(graph: Any) -> Any:
            self.captured = graph.held = []
            yield
            self.captured = None

        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        return types.SimpleNamespace(
            Event=Event, CUDAGraph=Graph, graph=capture, Stream=lambda: stream,
            current_stream=lambda: stream, stream=lambda s: contextlib.nullcontext(),
            synchronize=lambda: None,
        )  # fmt: skip


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    other = types.SimpleNamespace(zero_=lambda: made.launch("fill"))
    names = {"cuda": made.modules(), "empty": lambda *a, **k: other, "int8": torch.int8}
    monkeypatch.setattr(timing, "torch", types.SimpleNamespace(**names))
    return made


@pytest.mark.parametrize("capture", [True, False])
def test_events(device: Device, capture: bool) -> None:
    """Each run is timed alone, behind a cache that was filled; its launches are in its time."""

    def run(name: str, launches: int) -> None:
        for _ in range(launches):
            device.launch(name)

    clock = Events(capture)
    runs = {"a": clock.ready(lambda: run("a", 2)), "b": clock.ready(lambda: run("b", 5))}
    warm = len(device.queue)
    found = clock.seconds(runs, rounds=3)
    assert found == {"a": [2e-3] * 3, "b": [5e-3] * 3}
    turns = [w for w in device.queue[warm + WARM * 7 :] if w != "fill"]
    assert turns == 3 * (["a"] * 2 + ["b"] * 5)


def test_a_slow_host_is_waited_for(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host takes to launch a run, half as much again, the device spends on filling."""
    ticks = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks) * 1e-3)
    Events(capture=False).seconds({"a": lambda: device.launch("a")}, rounds=1)
    fills = device.queue.count("fill")
    assert fills == 1 + int(1.5e-3 * FASTEST / FILL) and fills * FILL / FASTEST > 1e-3


def test_wall() -> None:
    order: list[str] = []
    found = Wall().seconds({n: lambda n=n: order.append(n) for n in "ab"}, rounds=2)
    assert order == ["a", "b"] * (WARM + 2) and [len(t) for t in found.values()] == [2, 2]
    assert set(medians(Wall(), {"a": lambda: None}, 2)) == {"a"}


def test_distance() -> None:
    one = torch.tensor([3.0, 4.0])
    assert distance(one, one) == 0 and distance(torch.tensor([3.0, 4.5]), one) == 0.1
    assert not distance(torch.tensor([3.0, float("nan")]), one) < 1e9
