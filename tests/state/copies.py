"""Situations: copies, conversions, averages, and transforms of a bound model."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import peftfx
from peftfx.errors import BindError
from tests.helpers import fill, relative
from tests.state.bench import Bench, X, adapter, base, formula, situation

Result = tuple[Tensor, Tensor]


def _copied(b: Bench, copied: Any, used: bool) -> Result:
    """A copy keeps its own values, whatever becomes of the original."""
    run = b.run()
    if used:
        run(X)
    expected, clone = b.expected(), copied(run)
    fill(peftfx.parameters(b.model), 7)
    out = clone(X)
    out.square().sum().backward()
    assert all(p.grad is not None for p in peftfx.parameters(clone))
    torch.optim.SGD(peftfx.parameters(clone), lr=0.1).step()
    assert relative(b.model(X), run(X)) < 1e-5
    return out, expected


def _saved(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


for _name, _copy in (("deepcopy", copy.deepcopy), ("torch.save and torch.load", _saved),
                     ("pickle", lambda m: pickle.loads(pickle.dumps(m)))):  # fmt: skip
    situation(_name)(lambda b, c=_copy: _copied(b, c, False))
    situation(f"{_name}, after a call")(lambda b, c=_copy: _copied(b, c, True))


@situation("torch.load with weights_only", pickle.UnpicklingError)
def _(b: Bench) -> Any:
    buffer = io.BytesIO()
    torch.save(b.run(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@situation("a copy whose blocks are compiled")
def _(b: Bench) -> Result:
    b.run()
    expected, clone = b.expected(), copy.deepcopy(b.model)
    for block in clone.children():
        block.compile(backend=b.backend)
    return clone(X), expected


@situation("a block of a copy, called alone", BindError)
def _(b: Bench) -> Any:
    b.run()
    clone = copy.deepcopy(b.model)
    clone.up.compile(backend=b.backend)  # type: ignore[operator, union-attr]
    clone.up(X)  # type: ignore[operator]


@situation("an optimizer for a copy, of the base's parameters", peftfx.PeftfxError)
def _(b: Bench) -> Any:
    b.run()
    clone = copy.deepcopy(b.model)
    clone(X).sum().backward()
    torch.optim.SGD([clone.up.weight], lr=0.1).step()  # type: ignore[union-attr, list-item]


# -- conversions -----------------------------------------------------------------------------------


def _converted(b: Bench, dtype: torch.dtype, convert: Any) -> Result:
    run = b.run()
    expected = b.expected()
    convert(run)
    out = run(X.to(dtype))
    assert out.dtype == dtype
    return out.float(), expected


@situation("double()")
def _(b: Bench) -> Result:
    return _converted(b, torch.float64, lambda m: m.double())


@situation("half()", tolerance=1e-2)
def _(b: Bench) -> Result:
    return _converted(b, torch.float16, lambda m: m.half())


@situation("bfloat16()", tolerance=6e-2)
def _(b: Bench) -> Result:
    return _converted(b, torch.bfloat16, lambda m: m.bfloat16())


@situation("to(float64) and back")
def _(b: Bench) -> Result:
    return _converted(b, torch.float32, lambda m: m.to(torch.float64).to(torch.float32))


@situation("to(device), and disabled there")
def _(b: Bench) -> Result:
    run = b.run()
    run.to("cpu").double()
    with peftfx.disabled(run):
        return run(X.double()).float(), base()(X)


# -- averages and scalers --------------------------------------------------------------------------


@situation("AveragedModel as an exponential average")
def _(b: Bench) -> Result:
    run = b.run()
    averaged = AveragedModel(run, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    averaged.update_parameters(run)  # the first is a copy
    before = adapter(b.model)
    fill(peftfx.parameters(b.model), 3)
    averaged.update_parameters(run)
    after = adapter(b.model)
    mean = {n: 0.75 * before[n] + 0.25 * after[n] for n in before}
    return averaged(X), formula(base().state_dict(), mean)


@situation("an exponential average by hand, swapped in")
def _(b: Bench) -> Result:
    run = b.run()
    shadow = {n: p.detach().clone() for n, p in peftfx.named_parameters(run)}
    fill(peftfx.parameters(b.model), 3)
    for name, p in peftfx.named_parameters(run):
        shadow[name].lerp_(p.detach(), 0.25)
    run(X)
    with torch.no_grad():
        for name, p in peftfx.named_parameters(run):
            p.copy_(shadow[name])
    return run(X), formula(base().state_dict(), shadow)


@situation("GradScaler")
def _(b: Bench) -> Result:
    """A scaled step is the step: 0.1 times the gradient that autograd has of the formula."""
    run = b.run()
    values = {n: t.requires_grad_() for n, t in adapter(b.model).items()}
    formula(base().state_dict(), values).square().mean().backward()
    stepped = {n: (t - 0.1 * t.grad).detach() for n, t in values.items()}
    optimizer = torch.optim.SGD(peftfx.parameters(run), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(run(X).square().mean()).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(peftfx.parameters(run), 1e6)
    scaler.step(optimizer)
    scaler.update()
    return run(X), formula(base().state_dict(), stepped)


@situation("GradScaler skips a step of infinite gradients")
def _(b: Bench) -> Result:
    run = b.run()
    expected = b.expected()
    optimizer = torch.optim.SGD(peftfx.parameters(run), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale((run(X) * 1e38).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**12
    return run(X), expected


# -- torch.func ------------------------------------------------------------------------------------


@situation("functional_call with another's values")
def _(b: Bench) -> Result:
    run = b.run()
    other = Bench("eager")
    other.run()
    fill(peftfx.parameters(other.model), 5)
    values = {b.prefix + n: p for n, p in other.model.named_parameters()}
    return functional_call(run, values, (X,)), other.expected()


@situation("func.grad")
def _(b: Bench) -> Result:
    run = b.run()
    values = {n: p.detach() for n, p in run.named_parameters() if p.requires_grad}
    found = grad(lambda p: functional_call(run, p, (X,)).square().sum())(values)
    own = {n: t.requires_grad_() for n, t in adapter(b.model).items()}
    formula(base().state_dict(), own).square().sum().backward()
    wanted = own["up.weight:lora.B"].grad
    assert wanted is not None
    return found[b.prefix + "up.peftfx.lora.B"], wanted


@situation("vmap over inputs")
def _(b: Bench) -> Result:
    return vmap(b.run())(X), b.expected()


@situation("vmap over stacked adapters")
def _(b: Bench) -> Result:
    run = b.run()
    members = []
    for seed in (1, 2, 3):
        fill(peftfx.parameters(b.model), seed)
        named = run.named_parameters()
        members.append({n: p.detach().clone() for n, p in named if p.requires_grad})
        members[-1]["expected"] = b.expected()
    expected = torch.stack([m.pop("expected") for m in members])
    stacked = {n: torch.stack([m[n] for m in members]) for n in members[0]}
    return vmap(lambda p: functional_call(run, p, (X,)))(stacked), expected
