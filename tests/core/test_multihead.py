"""``nn.MultiheadAttention`` written out: torch's semantics, every method, every way to call it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from peftfx.errors import BindError, MergeError, NotAdaptedError
from peftfx.methods import lookup
from tests.helpers import fill, relative
from tests.methods import ROWS

E, H, L, S, B = 6, 2, 5, 4, 3
INF = float("-inf")
LORA = {"method": "lora", "rank": 2}


class Net(nn.Module):
    """Attention of *x* over itself, or over what else is given; the call's own options."""

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ...]:
        out, weights = self.layer(q, k, v, **options)
        return (out,) if weights is None else (out, weights)


def bound(layer: nn.MultiheadAttention, rule: dict[str, Any], *x: Tensor) -> tuple[Any, Backend]:
    model = Net(layer).eval()
    backend = Backend({"rules": [{"name": ["layer.*"], **rule}]}, "eager")
    backend.bind(model, x)
    fill(peftfx.parameters(model), scale=0.6)
    return model, backend


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a.isnan(), b.isnan())
        assert relative(a.nan_to_num(), b.nan_to_num()) < 1e-5


def masks(draw: Any, l: int, s: int, batched: bool) -> dict[str, Any]:
    """Masks of every kind, never all of a row."""
    found: dict[str, Any] = {}
    kind = draw(st.sampled_from([None, "bool", "float"]))
    which = draw(st.sampled_from(["attn", "padding", "both"])) if kind else None
    if which in ("attn", "both"):
        shape = (B * H if batched else H, l, s) if draw(st.booleans()) else (l, s)
        hidden = torch.rand(shape) < 0.4
        hidden[..., 0] = False
        found["attn_mask"] = hidden if kind == "bool" else torch.randn(shape).masked_fill(
            hidden, INF)  # fmt: skip
    if which in ("padding", "both"):
        hidden = torch.zeros((B, s) if batched else (s,), dtype=torch.bool)
        hidden[..., -1] = True
        found["key_padding_mask"] = hidden if kind == "bool" else torch.zeros(
            hidden.shape).masked_fill(hidden, INF)  # fmt: skip
    return found


@settings(max_examples=100)
@given(st.data())
def test_computes_what_torch_computes(data: Any) -> None:
    """Against torch's own forward with the merged weights, whatever the call."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 9)))
    flag = st.booleans()
    apart, batched, first = draw(flag), draw(flag), draw(flag)
    kdim, vdim = (5, 7) if apart else (E, E)
    layer = nn.MultiheadAttention(
        E, H, bias=draw(flag), add_bias_kv=draw(flag), add_zero_attn=draw(flag), batch_first=first,
        kdim=kdim, vdim=vdim,
    )  # fmt: skip

    def tokens(length: int, width: int) -> Tensor:
        shape = (length,) if not batched else (B, length) if first else (length, B)
        return torch.randn(*shape, width)

    how = draw(st.sampled_from(["self", "memory", "apart"])) if not apart else "apart"
    q = tokens(L, E)
    k = q if how == "self" else tokens(S, kdim)
    v = k if how in ("self", "memory") else tokens(S, vdim)
    s = L if how == "self" else S
    options = masks(draw, L, s, batched)
    options["need_weights"] = draw(flag)
    options["average_attn_weights"] = draw(flag)
    if draw(flag) and how == "self":
        causal = torch.ones(L, L, dtype=torch.bool).triu(1)
        options |= {"attn_mask": causal, "is_causal": draw(flag)}
        padding = options.pop("key_padding_mask", None)
        if padding is not None:  # of the kind of the other
            options["key_padding_mask"] = padding.to(torch.bool)
    rule = {"method": "lora", "rank": 3, "except": "*.bias_?"}
    model, _ = bound(layer, rule, q, k, v)
    got = model(q, k, v, **options)
    with torch.no_grad():
        same(model(q, k, v, **options), got)
    peftfx.merge(model)
    same(got, model(q, k, v, **options))
    assert len(peftfx.plan(Net(layer), {"rules": [{"name": "layer.*", **rule}]}).placements) == (
        4 if apart else 2)  # fmt: skip


CALLS = [
    {"need_weights": False},
    {"need_weights": True, "key_padding_mask": torch.tensor([[False] * 3 + [True] * 2] * B)},
    {"need_weights": False, "attn_mask": torch.ones(L, L).triu(1) * -1e9, "is_causal": True},
    {"average_attn_weights": False},
]  # fmt: skip


@pytest.mark.parametrize("options", CALLS)
@pytest.mark.parametrize("first", [False, True])
def test_one_graph(options: dict[str, Any], first: bool) -> None:
    layer = nn.MultiheadAttention(E, H, add_bias_kv=True, batch_first=first)
    x = torch.randn(B, L, E) if first else torch.randn(L, B, E)
    model, backend = bound(layer, {"method": "lora", "rank": 2}, x, x, x)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    want = model(x, x, x, **options)
    same(compiled(x, x, x, **options), want)
    sum(t.square().mean() for t in want).backward()
    grads = {n: p.grad.clone() for n, p in peftfx.named_parameters(model)}
    for p in model.parameters():
        p.grad = None
    sum(t.square().mean() for t in compiled(x, x, x, **options)).backward()
    assert all(relative(p.grad, grads[n]) < 1e-5 for n, p in peftfx.named_parameters(model))
    with torch.no_grad():
        same(compiled(x, x, x, **options), want)
        same(model(x, x, x, **options), want)


LINEAR = [r for r in ROWS if "attention" in lookup(r.method).kinds
          and r.options.get("block", 1) != 3 and "budget" not in r.options]  # fmt: skip


@pytest.mark.parametrize("apart", [False, True], ids=["packed", "apart"])
@pytest.mark.parametrize("row", LINEAR, ids=str)
def test_every_method_for_linears(row: Any, apart: bool) -> None:
    """What holds for a linear holds for a projection: merged as applied, one graph, gradients."""
    layer = nn.MultiheadAttention(E, H, kdim=5, vdim=7) if apart else nn.MultiheadAttention(E, H)
    x = torch.randn(L, B, E)
    others = (torch.randn(S, B, 5), torch.randn(S, B, 7)) if apart else (x, x)
    base = Net(copy.deepcopy(layer)).eval()
    model, backend = bound(layer, row.rule(name="layer.*"), x, *others)
    with torch.no_grad():
        for name, p in peftfx.named_parameters(model):
            if name.rpartition(".")[2] in row.near_one:
                p.add_(1.0)
    want = model(x, *others)
    assert relative(want[0], base(x, *others)[0]) > 1e-3
    same(torch.compile(model, backend=backend, fullgraph=True)(x, *others), want)
    want[0].square().mean().backward()
    reached = {n for n, p in peftfx.named_parameters(model) if p.grad is not None}
    assert reached == {n for n, _ in peftfx.named_parameters(model)}
    try:
        peftfx.merge(model)
    except MergeError:
        assert row.options.get("bias") or not row.merges
        return
    same(model(x, *others), want)


def test_dropout_drops_what_a_projection_is_given() -> None:
    layer, x = nn.MultiheadAttention(E, H, batch_first=True), torch.randn(B, L, E)
    rule = {**LORA, "dropout": 0.5, "name": "layer.in_proj_weight"}
    model, backend = bound(layer, rule, x, x, x)
    still = model(x, x, x)
    model.train()
    compiled = torch.compile(model, backend=backend, fullgraph=True)

    def run(by: Any, seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        return by(x, x, x)  # type: ignore[no-any-return]

    same(run(compiled, 1), run(model, 1))
    for other in (run(model, 2), still):
        assert relative(run(model, 1)[0], other[0]) > 1e-2
    compiled.eval()
    same(compiled(x, x, x), still)


# -- torch's fast paths ----------------------------------------------------------------------------


def encoder(**options: Any) -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 9, 0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2).eval()


PARTS = {
    "attention": ["*.self_attn.in_proj_weight"],
    "output": ["*.out_proj"],
    "feed-forward": ["*.linear1", "*.linear2"],
    "all": ["*.self_attn.*", "*.linear?"],
}


@pytest.mark.parametrize("method", ["lora", "ia3", "dora"])
@pytest.mark.parametrize("names", PARTS.values(), ids=list(PARTS))
@pytest.mark.parametrize("padded", [False, True])
def test_fast_paths_are_not_taken(method: str, names: list[str], padded: bool) -> None:
    base = encoder()
    x = torch.randn(B, L, E)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[1:, 3:] = True
    given = {"src_key_padding_mask": padding} if padded else {}
    model = copy.deepcopy(base)
    rule = {"method": method, "name": names} | ({} if method == "ia3" else {"rank": 2})
    backend = Backend({"rules": [rule]}, "eager")
    backend.bind(model, (x,))
    fill(peftfx.parameters(model), scale=0.5)
    want = model(x, **given)
    assert want.requires_grad
    kept = torch.ones(B, L, dtype=torch.bool) if not padded else ~padding  # torch's own zeros
    with torch.no_grad():
        assert relative(model(x, **given)[kept], want[kept]) < 1e-5
        assert relative(want[kept], base(x, **given)[kept]) > 1e-3
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert relative(compiled(x, **given)[kept], want[kept]) < 1e-5
        peftfx.merge(model)
        assert relative(model(x, **given)[kept], want[kept]) < 1e-5
        peftfx.unmerge(model)
    peftfx.release(model)
    assert model.use_nested_tensor == base.use_nested_tensor
    with torch.no_grad():
        assert torch.equal(model(x, **given), base(x, **given))


def test_nested_tensors_are_refused() -> None:
    layer = nn.MultiheadAttention(E, H, batch_first=True).eval()
    x = torch.randn(B, L, E)
    model, _ = bound(layer, LORA, x, x, x)
    nested = torch.nested.nested_tensor([x[0], x[1, :3]])
    with torch.no_grad(), pytest.raises(NotAdaptedError, match="nested tensors"):
        model(nested, nested, nested, need_weights=False)


def test_a_decoder_layer() -> None:
    torch.manual_seed(0)
    base = nn.TransformerDecoderLayer(E, H, 9, 0.0, batch_first=True).eval()
    x, memory = torch.randn(B, L, E), torch.randn(B, S, E)
    model = copy.deepcopy(base)
    backend = Backend({"rules": [{"method": "lora", "name": "*", "rank": 2}]}, "eager")
    backend.bind(model, (x, memory))
    assert len(backend.spec.rules) == 1
    fill(peftfx.parameters(model), scale=0.5)
    want = model(x, memory)
    same((torch.compile(model, backend=backend, fullgraph=True)(x, memory),), (want,))
    peftfx.merge(model)
    same((model(x, memory),), (want,))


# -- what can be done to the module ----------------------------------------------------------------


def test_the_layer_is_the_model() -> None:
    layer, x = nn.MultiheadAttention(E, H).eval(), torch.randn(L, B, E)
    backend = Backend({"rules": [{"method": "lora", "name": "*", "rank": 2}]}, "eager")
    backend.bind(layer, (x, x, x))
    fill(peftfx.parameters(layer), scale=0.5)
    want = layer(x, x, x)
    same(torch.compile(layer, backend=backend, fullgraph=True)(x, x, x), want)
    peftfx.release(layer)
    assert type(layer) is nn.MultiheadAttention


def test_copies_and_pickles_stay_adapted() -> None:
    x = torch.randn(L, B, E)
    model, _ = bound(nn.MultiheadAttention(E, H), LORA, x, x, x)
    want = model(x, x, x)
    same(copy.deepcopy(model)(x, x, x), want)
    same(pickle.loads(pickle.dumps(model))(x, x, x), want)


def test_a_second_adapter_and_its_removal() -> None:
    x = torch.randn(L, B, E)
    model, _ = bound(nn.MultiheadAttention(E, H), {**LORA, "except": "*.out_proj"}, x, x, x)
    first = model(x, x, x)
    peftfx.add(model, {"rules": [{"method": "ia3", "name": "layer.out_proj"}]}, "b", (x, x, x))
    same(model(x, x, x), first)
    peftfx.activate(model, "b")
    fill(peftfx.parameters(model))
    assert relative(model(x, x, x)[0], first[0]) > 1e-2
    peftfx.activate(model, "default")
    same(model(x, x, x), first)
    peftfx.remove(model, "b")
    same(model(x, x, x), first)


def test_a_patched_forward_is_noticed() -> None:
    x = torch.randn(L, B, E)
    model, _ = bound(nn.MultiheadAttention(E, H), LORA, x, x, x)
    model.layer.forward = nn.MultiheadAttention(E, H).forward
    with pytest.raises(NotAdaptedError, match="gone"):
        model(x, x, x)


class Own(nn.MultiheadAttention):
    """A subclass that computes something of its own with the same weights."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


def test_a_subclass_takes_the_weight_form() -> None:
    x = torch.randn(L, B, E)
    layer = Own(E, H)
    names = ["layer.in_proj_weight", "layer.out_proj"]
    model, backend = bound(layer, {**LORA, "name": names}, x, x, x)
    assert {p.site.kind for p in peftfx.plan(model, backend.spec)} == {"parameter", "linear"}
    want = model(x, x, x)
    same(torch.compile(model, backend=backend, fullgraph=True)(x, x, x), want)
    with torch.no_grad():
        same(model(x, x, x), want)
    peftfx.merge(model)
    same(model(x, x, x), want)
    with pytest.raises(BindError, match="never called"):
        bound(Own(E, H), {"method": "dora", "rank": 2, "name": "layer.out_proj"}, x, x, x)


def test_rows_of_the_table_are_there() -> None:
    listed = {r.method for r in LINEAR}
    assert {"lora", "dora", "adalora", "vera", "loha", "lokr", "ia3", "hra"} <= listed
