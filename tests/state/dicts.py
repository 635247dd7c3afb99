"""Situations: state dicts, files and optimizers of a model that is bound, merged, mixed or off."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor

import peftfx
from peftfx.backends import Backend
from peftfx.errors import BindError, CheckpointError, MergeError, NotAdaptedError, OptimizerError
from tests.helpers import fill
from tests.state.bench import (
    LORA,
    SPEC,
    TRAIN,
    Bench,
    Net,
    X,
    adapter,
    base,
    formula,
    prefixed,
    situation,
)

Result = tuple[Tensor, Tensor]
TRAINED = {"rules": [TRAIN]}


# -- state dicts -----------------------------------------------------------------------------------


@situation("a base's state dict: weights follow, the adapter stays")
def _(b: Bench) -> Result:
    run = b.run()
    own = adapter(b.model)
    other = base(5).state_dict()
    assert not any(run.load_state_dict(prefixed(other, b.prefix), strict=True))
    return run(X), formula(other, own)


@situation("a base's state dict, then off")
def _(b: Bench) -> Result:
    run = b.run()
    run.load_state_dict(prefixed(base(5).state_dict(), b.prefix))
    with peftfx.disabled(run):
        return run(X), base(5)(X)


@situation("a base's state dict, then released")
def _(b: Bench) -> Result:
    run = b.run()
    run.load_state_dict(prefixed(base(5).state_dict(), b.prefix))
    peftfx.release(run)
    return run(X), base(5)(X)


@situation("a base's state dict before training: what is trained in full starts from it")
def _(b: Bench) -> Result:
    b.backend = Backend(SPEC, "aot_eager")
    b.backend.bind(b.model, (X,))
    run = b.formed()
    run.load_state_dict(prefixed(base(5).state_dict(), b.prefix))
    return run(X), base(5)(X)


@situation("an adapted state dict into another bound model")
def _(b: Bench) -> Result:
    run = b.run()
    state, expected = run.state_dict(), b.expected()
    fresh = Bench(b.form, base(5))
    other = fresh.run()
    fill(peftfx.parameters(fresh.model), 8)
    other.load_state_dict(state, strict=True)
    return other(X), expected


@situation("an adapted state dict without metadata")
def _(b: Bench) -> Result:
    run = b.run()
    state, expected = {k: v.clone() for k, v in run.state_dict().items()}, b.expected()
    fill(peftfx.parameters(b.model), 8)
    run.load_state_dict(state)
    return run(X), expected


@situation("a state dict of what is trained in full alone, without metadata")
def _(b: Bench) -> Result:
    b.spec = TRAINED
    run = b.run()
    state, expected = {k: v.clone() for k, v in run.state_dict().items()}, b.expected()
    fill(peftfx.parameters(b.model), 8)
    run.load_state_dict(state)
    with peftfx.disabled(run):
        assert torch.equal(b.model(X), base()(X))
    return run(X), expected


@situation("an adapted state dict, assigned, then trained")
def _(b: Bench) -> Result:
    run = b.run()
    state = {k: v.clone() for k, v in run.state_dict().items()}
    fill(peftfx.parameters(b.model), 8)
    run.load_state_dict(state, assign=True)
    run(X).square().sum().backward()
    optimizer = torch.optim.SGD(peftfx.parameters(run), lr=0.1)
    before = adapter(b.model)
    optimizer.step()
    assert all(not torch.equal(v, before[n]) for n, v in adapter(b.model).items())
    return run(X), b.expected()


@situation("an optimizer made before a state dict was assigned", OptimizerError)
def _(b: Bench) -> Any:
    run = b.run()
    optimizer = torch.optim.SGD(peftfx.parameters(run), lr=0.1)
    run.load_state_dict({k: v.clone() for k, v in run.state_dict().items()}, assign=True)
    run(X).square().sum().backward()
    optimizer.step()


@situation("a part of an adapter", RuntimeError)
def _(b: Bench) -> Any:
    run = b.run()
    state = {k: v for k, v in run.state_dict().items() if not k.endswith("up.peftfx.lora.A")}
    run.load_state_dict(state, strict=True)


@situation("an adapted state dict into a plain model", RuntimeError)
def _(b: Bench) -> Any:
    Net().load_state_dict(prefixed(b.run().state_dict(), ""), strict=True)


@situation("a state dict while merged", BindError)
def _(b: Bench) -> Any:
    run = b.run()
    peftfx.merge(run)
    run.load_state_dict(prefixed(base().state_dict(), b.prefix))


@situation("a state dict while off", BindError)
def _(b: Bench) -> Any:
    run = b.run()
    with peftfx.disabled(run):
        run.load_state_dict(prefixed(base().state_dict(), b.prefix))


@situation("the state dict of a merged model is a plain model's")
def _(b: Bench) -> Result:
    run = b.run()
    expected = b.expected()
    peftfx.merge(run)
    plain = Net()
    plain.load_state_dict(
        {k.removeprefix(b.prefix): v for k, v in run.state_dict().items()}, strict=True
    )
    return plain(X), expected


@situation("the state dict of a model that is off is the base's")
def _(b: Bench) -> Result:
    run = b.run()
    plain = Net()
    with peftfx.disabled(run):
        plain.load_state_dict(
            {k.removeprefix(b.prefix): v for k, v in run.state_dict().items()}, strict=True
        )
    return plain(X), base()(X)


# -- adapters' own states and files ----------------------------------------------------------------


def _reloaded(model: Any) -> Tensor:
    fresh = base()
    with tempfile.TemporaryDirectory() as directory:
        peftfx.save(model, directory)
        peftfx.load(fresh, directory, compile=False, example=(X,))
    found: Tensor = fresh(X)
    return found


@situation("saved while off")
def _(b: Bench) -> Result:
    run = b.run()
    with peftfx.disabled(run):
        return _reloaded(run), formula(base().state_dict(), adapter(b.model))


@situation("saved while merged")
def _(b: Bench) -> Result:
    run = b.run()
    expected = b.expected()
    peftfx.merge(run)
    return _reloaded(run), expected


@situation("saved while another is active")
def _(b: Bench) -> Result:
    run = b.run()
    expected = b.expected()
    peftfx.add(run, SPEC, "other", (X,))
    peftfx.activate(run, "other")
    fill(peftfx.parameters(run), 4)
    return _reloaded(run), expected


@situation("load_state_dict while merged", MergeError)
def _(b: Bench) -> Any:
    run = b.run()
    peftfx.merge(run)
    peftfx.load_state_dict(run, adapter(b.model))


@situation("load while merged", MergeError)
def _(b: Bench) -> Any:
    run = b.run()
    with tempfile.TemporaryDirectory() as directory:
        peftfx.save(run, directory)
        peftfx.merge(run)
        peftfx.load(run, directory)


@situation("load_state_dict into a part of a sum")
def _(b: Bench) -> Result:
    """The sum is of the new values at once: ``0.5·a + 0.5·b`` of LoRA's updates."""
    b.spec = {"rules": [LORA]}
    run = b.run()
    peftfx.add(run, b.spec, "b", (X,))
    fill(peftfx.parameters(run, "b"), 3)
    peftfx.activate(run, {"default": 0.5, "b": 0.5})
    run(X)
    new = {n: torch.full_like(t, 0.1) for n, t in peftfx.state_dict(run).items()}
    peftfx.load_state_dict(run, new)
    both = peftfx.state_dict(run), peftfx.state_dict(run, "b")
    joined = {n: torch.cat([s[n] for s in both], int(n.endswith("B"))) for n in new}
    halves = {n: t / 2 if n.endswith("B") else t for n, t in joined.items()}
    return run(X), formula(base().state_dict(), halves)


@situation("a state dict of another adapter", CheckpointError)
def _(b: Bench) -> Any:
    other = Bench("eager", spec=TRAINED)
    other.run()
    peftfx.load_state_dict(b.run(), adapter(other.model))


# -- training state --------------------------------------------------------------------------------


@situation("an optimizer of the adapter that was active before", OptimizerError)
def _(b: Bench) -> Any:
    run = b.run()
    optimizer = torch.optim.AdamW(peftfx.parameters(run), lr=0.1)
    run(X).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    peftfx.add(run, SPEC, "b", (X,))
    peftfx.activate(run, "b")
    fill(peftfx.parameters(run), 4)
    run(X).square().sum().backward()
    optimizer.step()


@situation("optimizer state through another adapter and back")
def _(b: Bench) -> Result:
    """Two AdamW steps with a detour between them are two AdamW steps."""
    plain = Bench(b.form)
    results = []
    for bench in (plain, b):
        run = bench.run()
        peftfx.add(run, SPEC, "b", (X,))
        optimizer = torch.optim.AdamW(peftfx.parameters(run), lr=0.1)
        for step in range(2):
            run(X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if bench is b and step == 0:
                peftfx.activate(run, "b")
                run(X)
                peftfx.activate(run, "default")
        results.append(run(X))
    return results[1], results[0]


@situation("an optimizer for each of two adapters")
def _(b: Bench) -> Result:
    run = b.run()
    peftfx.add(run, SPEC, "b", (X,))
    for name in ("default", "b"):
        peftfx.activate(run, name)
        fill(peftfx.parameters(run), 6)
        run(X).square().sum().backward()
        torch.optim.SGD(peftfx.parameters(run, name), lr=0.1).step()
    a, other = peftfx.state_dict(run), peftfx.state_dict(run, "b")
    assert all(torch.equal(a[n], other[n]) for n in a)
    return run(X), formula(base().state_dict(), other)


@situation("requires_grad_(False) on everything: the same result, nothing trains")
def _(b: Bench) -> Result:
    run = b.run()
    run(X)
    run.requires_grad_(False)
    assert peftfx.parameters(run) == [] and not run(X).requires_grad
    return run(X), b.expected()


@situation("requires_grad_(True) on everything", NotAdaptedError)
def _(b: Bench) -> Any:
    run = b.run()
    run(X)
    run.requires_grad_(True)
    run(X)


@situation("a head made trainable behind the plan's back", NotAdaptedError)
def _(b: Bench) -> Any:
    b.spec = {"rules": [LORA]}
    run = b.run()
    b.model.head.requires_grad_(True)  # type: ignore[union-attr, operator]
    run(X)


@situation("one tensor of the adapter frozen by hand")
def _(b: Bench) -> Result:
    run = b.run()
    run(X)
    b.model.get_parameter("up.peftfx.lora.A").requires_grad_(False)
    run(X).square().sum().backward()
    held = {n for n, p in b.model.named_parameters() if p.grad is not None}
    assert "up.peftfx.lora.A" not in held and "up.peftfx.lora.B" in held
    return run(X), b.expected()
