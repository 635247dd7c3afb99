"""Times and memory of the compared methods: all models in one process, their steps interleaved."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftfx
from peftfx.errors import MergeError
from peftfx.kernels.devices import host


def batch_of(rows: list[tuple[str, str]], tokenizer: Any, tokens: int) -> dict[str, Tensor]:
    """One batch as in training."""
    labels = sorted({label for _, label in rows})
    encoded = tokenizer(
        [text for text, _ in rows], truncation=True, padding="max_length", max_length=tokens,
        return_tensors="pt",
    )  # fmt: skip
    return {**encoded, "labels": torch.tensor([labels.index(label) for _, label in rows])}


class Candidate:
    """A method on a model of its own, ready to be timed."""

    def __init__(self, spec: Path, make: Callable[[], nn.Module], batch: Any, lower: str) -> None:
        self.batch = batch
        self.model = make()
        peftfx.adapt(self.model, spec, lower=lower)  # type: ignore[arg-type]
        adapter = peftfx.Spec.load(spec)
        if any(getattr(rule.method, "mask", "") in ("fisher", "sam") for rule in adapter.rules):
            peftfx.calibrate(self.model, [batch])
        groups = peftfx.parameter_groups(self.model, lr=1e-5)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)

    def step(self) -> None:
        """A training step: forward, backward, update."""
        self.model.train()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def infer(self) -> None:
        """Logits of the batch, without gradients."""
        self.model.eval()
        self.model(**{k: v for k, v in self.batch.items() if k != "labels"})

    def infer_merged(self) -> float | None:
        """Seconds of the merged model; None where a method does not merge."""
        try:
            peftfx.merge(self.model)
        except MergeError:
            return None
        try:
            return seconds(self.infer)
        finally:
            peftfx.unmerge(self.model)

    def peak(self) -> int:
        """Bytes that a training step needs at most: what stays, and what it allocates on top."""
        stays = {id(p): p.nbytes for p in self.model.parameters()}
        stays |= {id(b): b.nbytes for b in self.model.buffers()}
        for state in self.optimizer.state.values():
            stays |= {id(t): t.nbytes for t in state.values() if isinstance(t, Tensor)}
        return sum(stays.values()) + allocated(self.step)


def allocated(run: Callable[[], None]) -> int:
    """The most bytes that *run* holds at once of what it allocates, as torch's profiler counts."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    moves = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(itertools.accumulate((size for _, size in sorted(moves)), initial=0))


def seconds(run: Callable[[], None]) -> float:
    """How long *run* takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(specs: dict[str, Path], model: str, sizes: Any, rows: Any) -> dict[str, Any]:
    """Seconds of each round, and bytes, for the methods and for the frozen base.

    Args:
        specs: the spec file of each method.
        model: directory of the base.
        rows: labelled texts, of which the first batch is used.
    """
    import transformers

    def make() -> nn.Module:
        torch.manual_seed(0)
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=sizes.classes
        )

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    batch = batch_of(rows[:32], tokenizer, sizes.tokens)
    candidates: dict[str, Candidate] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, spec in specs.items():
        start = time.perf_counter()
        made = candidates[name] = Candidate(spec, make, batch, sizes.lower_timed)
        for _ in range(2):
            made.step()
            made.infer()
            made.infer_merged()
        found[name] = {"peak": made.peak(), "step": [], "unmerged": [], "merged": []}
        print(f"{name} compiled in {time.perf_counter() - start:.0f} s", flush=True)
    order, shuffle = list(candidates), random.Random(0)
    for _ in range(sizes.rounds):
        shuffle.shuffle(order)
        for name in order:
            found[name]["step"].append(seconds(candidates[name].step))
        for name in order:
            found[name]["unmerged"].append(seconds(candidates[name].infer))
            found[name]["merged"].append(candidates[name].infer_merged())
    return {
        "device": host().name,  # its threads too
        "torch": torch.__version__,
        "methods": found,
    }
