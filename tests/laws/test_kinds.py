"""Every layer kind: the formula forward and backward, one full graph, merge, files, release."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import peftfx
from peftfx.backends import Backend
from peftfx.errors import MergeError
from peftfx.site import KINDS as NAMES
from tests.helpers import fill, relative
from tests.kinds import KINDS, Kind, Net

EVERY = pytest.mark.parametrize("kind", KINDS, ids=str)
SCALED = [
    (k, at)
    for k in KINDS
    for at in ("output", "input")
    if (at == "output" or k.ia3_input) and (k.id, at) != ("borrowed", "output")
]


def test_every_kind_has_a_row() -> None:
    # a norm's parameters are trained whole, and a module's output has none
    assert {k.kind for k in KINDS} | {"norm", "output"} == set(NAMES)


def net(kind: Kind) -> Net:
    torch.manual_seed(0)
    # frozen: torch rounds otherwise where gradients are due
    return Net(kind.build(), **kind.kwargs).eval().requires_grad_(False)


def laws(
    kind: Kind, rule: dict[str, Any], reference: Callable[[nn.Module, Any, Any], Tensor],
    path: Path, start: float = 1e-6, merges: bool = True,
) -> None:  # fmt: skip
    """All that holds of a rule at a layer.

    Args:
        reference: the output, of the base, the inputs and the adapter's tensors by their last name.
    """
    base, x = net(kind), kind.inputs()
    model = copy.deepcopy(base)
    backend = Backend({"rules": [rule]}, "eager")
    backend.bind(model, x)
    plain = base(*x)
    assert relative(model(*x), plain) <= start
    fill(peftfx.parameters(model), scale=0.7)
    leaves = {n.rpartition(".")[2]: p for n, p in peftfx.named_parameters(model)}
    copies = {n: p.detach().clone().requires_grad_() for n, p in leaves.items()}
    want = reference(base, x, copies)
    assert relative(want, plain) > 1e-2  # the adapter does something
    want.square().mean().backward()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for run in (model, compiled):
        out = run(*x)
        assert relative(out, want) < 1e-5
        out.square().mean().backward()
        for name, p in leaves.items():
            assert p.grad is not None and relative(p.grad, copies[name].grad) < 1e-4, name
            p.grad = None
    eager = model(*x)
    with torch.no_grad():  # torch has faster ways without gradients, which must not be taken
        assert relative(model(*x), want) < 1e-5
        assert relative(compiled(*x), want) < 1e-5
    if merges:
        peftfx.merge(model)
        assert relative(model(*x), want) < 1e-5
        peftfx.unmerge(model)
    else:
        with pytest.raises(MergeError):
            peftfx.merge(model)
    assert torch.equal(model(*x), eager)
    for format in ("peftfx", "auto"):
        peftfx.save(model, path / format, format=format)  # type: ignore[arg-type]
        fresh = copy.deepcopy(base)
        peftfx.load(fresh, path / format, compile=False, example=x)
        assert torch.equal(fresh(*x), eager)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fill(peftfx.parameters(model), seed=4)
    model.load_state_dict(state)
    assert torch.equal(model(*x), eager)
    assert torch.equal(copy.deepcopy(model)(*x), eager)
    with peftfx.disabled(model):
        assert torch.equal(model(*x), plain)
    peftfx.release(model)
    assert torch.equal(model(*x), plain)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert list(model.state_dict()) == list(base.state_dict())


def with_weight(base: nn.Module, x: Any, changed: dict[str, Tensor]) -> Tensor:
    return functional_call(base, changed, x)  # type: ignore[no-any-return]


@EVERY
def test_lora(kind: Kind, tmp_path: Path) -> None:
    name = f"layer.{kind.weight}"

    def reference(base: nn.Module, x: Any, p: dict[str, Tensor]) -> Tensor:
        scale = 3.0 / kind.rank
        if kind.delta is None:  # a grouped convolution: A sees all channels
            conv: Any = base.layer
            more = nn.functional.conv2d(nn.functional.conv2d(x[0], p["A"]), p["B"], groups=2)
            return torch.tanh(conv(*x) + scale * more)
        return with_weight(base, x, {name: base.get_parameter(name) + scale * kind.delta(**{
            k.lower(): v for k, v in p.items()})})  # fmt: skip

    rule = {"method": "lora", "name": name, "rank": kind.rank, "alpha": 3.0}
    laws(kind, rule, reference, tmp_path, merges=kind.delta is not None)


@EVERY
def test_in_an_exported_program(kind: Kind) -> None:
    base, x = net(kind), kind.inputs()
    spec = {"rules": [{"method": "lora", "name": f"layer.{kind.weight}", "rank": kind.rank}]}
    gm = peftfx.rewrite(torch.export.export(net(kind), x), spec)
    fill(peftfx.parameters(gm))
    state = {k.rpartition(".")[2]: v for k, v in peftfx.state_dict(gm).items()}
    Backend(spec, "eager").bind(base, x)
    held = {k: state[k.rpartition(".")[2]] for k in peftfx.state_dict(base)}
    turned = kind.kind in ("hf_conv1d", "embedding_bag") or kind.id == "bare bmm"
    if turned:  # the program tells of a matrix alone, and not which of its sides is the output
        assert {v.shape for v in held.values()} != {
            v.shape for v in peftfx.state_dict(base).values()
        } or kind.id == "bare bmm"
        assert relative(gm(*x), net(kind)(*x)) > 1e-3
        return
    peftfx.load_state_dict(base, held)
    assert relative(gm(*x), base(*x)) < 1e-5


@pytest.mark.parametrize(("kind", "at"), SCALED, ids=lambda v: str(v))
def test_ia3(kind: Kind, at: str, tmp_path: Path) -> None:
    name = f"layer.{kind.weight}"

    def reference(base: nn.Module, x: Any, p: dict[str, Tensor]) -> Tensor:
        """Weight and bias scaled, by the letter: one output or input feature after the other."""
        w, l = base.get_parameter(name), p["l"]
        if kind.kind == "parameter":
            turned = l.mT if kind.id == "bare bmm" else l
            return with_weight(base, x, {name: w * turned})
        values = iter(l.flatten())
        groups = getattr(base.layer, "groups", 1)
        swapped = kind.kind.startswith(("hf", "emb", "conv_t"))
        axis = int((at == "output") == swapped)
        if groups > 1 and axis == 1:  # channels of each group by themselves
            rows = [[next(values) for _ in range(w.shape[1])] for _ in range(groups)]
            scale = torch.stack([torch.stack(row) for row in rows for _ in range(len(w) // groups)])
        else:
            one = torch.stack(list(values))
            scale = one.unsqueeze(0) if axis else one.unsqueeze(1)
        changed = {name: w * scale.reshape(*scale.shape, *(1 for _ in w.shape[2:]))}
        bias, start = BIASES.get(kind.weight, (name.replace("weight", "bias"), 0))
        if at == "output" and bias in dict(base.named_parameters()):
            old = base.get_parameter(bias)
            factor = torch.ones_like(old).index_copy(
                0, torch.arange(start, start + l.numel()), l.flatten()
            )
            changed[bias] = old * factor
        return with_weight(base, x, changed)

    laws(kind, {"method": "ia3", "name": name, "at": at}, reference, tmp_path)


BIASES = {  # the parameter, and where the projection's part of it begins
    "in_proj_weight": ("layer.in_proj_bias", 0),
    "q_proj_weight": ("layer.in_proj_bias", 0),
    "v_proj_weight": ("layer.in_proj_bias", 12),
    "out_proj.weight": ("layer.out_proj.bias", 0),
}
