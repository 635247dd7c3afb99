"""UniPELT's gates, of LoRA and of prefixes, against formulas; all of it: test_combined.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from peftfx.errors import CheckpointError, MergeError, NotAdaptedError, PlanError, SpecError
from peftfx.spec import Spec
from tests.architectures import by_name
from tests.helpers import fill, relative

GATES = ("token", "sequence")


def bound(base: nn.Module, rules: list[dict[str, Any]], example: Any) -> nn.Module:
    """A copy of *base* with adapters that are not at their start."""
    model = copy.deepcopy(base)
    Backend({"rules": rules}, "aot_eager").bind(model, example)
    fill(peftfx.parameters(model), scale=0.6)
    return model


def compiled(model: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=Backend(None, "aot_eager"), fullgraph=True)


def tensors(model: nn.Module, site: str = "") -> dict[str, Tensor]:
    """The adapter's parameters at a site, by their own names."""
    named = peftfx.named_parameters(model)
    return {n.rpartition(".")[2]: p for n, p in named if n.startswith(site)}


def opened(gate: str, x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """[B, S, 1] or [B, 1, 1]: the mean over a sequence is AdapterHub's."""
    g = 1 / (1 + torch.exp(-(x @ p["gate"].T + p["gate_bias"])))
    return g.mean(1, keepdim=True) if gate == "sequence" else g


def same_gradients(model: nn.Module, runs: list[Tensor]) -> None:
    """Each of *runs* has the gradients of the first."""
    found = [
        torch.autograd.grad(out.square().mean(), peftfx.parameters(model), retain_graph=True)
        for out in runs
    ]
    for got in found[1:]:
        assert all(relative(a, b) < 1e-4 for a, b in zip(got, found[0], strict=True))


@pytest.mark.parametrize("gate", GATES)
def test_of_lora(gate: str) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(6, 9)), torch.randn(2, 5, 6)
    rule = {"method": "lora", "name": "0", "rank": 3, "alpha": 6.0, "gate": gate, "bias": True}
    model = bound(base, [rule], (x,))
    p = tensors(model)
    assert p["gate"].shape == (1, 6)
    update = 2.0 * ((x @ p["A"].T) @ p["B"].T + p["bias"])
    want = base(x) + opened(gate, x, p) * update
    runs = [want, model(x), compiled(model)(x)]
    assert all(relative(out, want) < 1e-5 for out in runs)
    assert relative(base(x) + update, want) > 1e-2
    same_gradients(model, runs)


class Attention(nn.Module):
    """Four query heads over two key heads of width 4."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(6, 16), nn.Linear(16, 6)
        self.key, self.value = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2)
                   for f in (self.query, self.key, self.value))  # fmt: skip
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return self.out(y.transpose(1, 2).flatten(2))


def by_hand(base: Attention, x: Tensor, mask: Tensor, g: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    """Head by head and query by query: each sees the prefix's keys and values times its gate."""
    heads = []
    g = g.expand(-1, x.shape[1], -1)
    for h in range(4):
        at, kv = slice(4 * h, 4 * h + 4), slice(4 * (h // 2), 4 * (h // 2) + 4)
        q, k, v = base.query(x)[..., at], base.key(x)[..., kv], base.value(x)[..., kv]
        rows = []
        for s in range(x.shape[1]):
            keys = torch.cat([g[:, s, :, None] * pk[h // 2], k], 1)  # [B, P + S, D]
            values = torch.cat([g[:, s, :, None] * pv[h // 2], v], 1)
            scores = (keys @ q[:, s, :, None])[..., 0] / 2
            seen = torch.cat([torch.ones(pk.shape[1], dtype=torch.bool), mask[s]])
            rows.append((scores.masked_fill(~seen, -torch.inf).softmax(-1)[:, None] @ values)[:, 0])
        heads.append(torch.stack(rows, 1))
    return base.out(torch.cat(heads, -1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_of_prefixes(gate: str, masked: bool) -> None:
    torch.manual_seed(0)
    base, x = Attention(), torch.randn(2, 5, 6)
    causal = torch.ones(5, 5).tril() > 0
    given = (x, causal) if masked else (x,)
    rule = {"method": "prefix", "name": "query", "length": 3, "gate": gate}
    model = bound(base, [rule], given)
    p = tensors(model)
    want = by_hand(base, x, causal, opened(gate, x, p), p["keys"], p["values"])
    runs = [want, model(*given), compiled(model)(*given)]
    assert all(relative(out, want) < 1e-5 for out in runs)
    same_gradients(model, runs)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("mlp", [False, True])
def test_files_of_prefixes(gate: str, mlp: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Attention(), torch.randn(2, 5, 6)
    model = bound(base, [{"method": "prefix", "name": "query", "gate": gate, "mlp": mlp}], (x,))
    peftfx.save(model, tmp_path / "ours")
    fresh = copy.deepcopy(base)
    peftfx.load(fresh, tmp_path / "ours", compile=False, example=(x,))
    assert relative(fresh(x), model(x)) < 1e-6


def test_generation_sees_what_a_forward_sees() -> None:
    """Gates of tokens: with a cache, greedy tokens are those without one."""
    base: Any = by_name("llama").build()
    rules = [
        {"method": "prefix", "role": "attention", "length": 3, "gate": "token"},
        {"method": "lora", "role": ["attention.query", "attention.value"], "rank": 2,
         "gate": "token"},
    ]  # fmt: skip
    model: Any = bound(base, rules, None)
    ids = torch.randint(3, 61, (2, 5), generator=torch.Generator().manual_seed(1))
    cached = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    whole = ids
    for _ in range(6):
        whole = torch.cat([whole, model(whole).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, whole)


def test_refusals() -> None:
    x = torch.randn(2, 5, 6)
    with pytest.raises(PlanError, match="a gate is of a linear's input"):
        rule = {"method": "lora", "name": "0", "gate": "token"}
        bound(nn.Sequential(nn.Conv1d(5, 5, 1)), [rule], (x,))
    with pytest.raises(SpecError, match="magnitude"):
        Spec.parse({"rules": [{"method": "dora", "name": "*", "gate": "token"}]})
    base = nn.Sequential(nn.Linear(6, 9))
    rule = {"method": "lora", "name": "0", "gate": "sequence", "rank": 2}
    model = bound(base, [rule], (x,))
    with pytest.raises(MergeError, match="goes by the input"):
        peftfx.merge(model)
    with pytest.raises(NotAdaptedError, match="gate of sequences"):
        model(x[0])
    with pytest.raises(CheckpointError, match="PEFT has no gates"):
        peftfx.save(model, "/nowhere", format="peft")
    rule = {"method": "prefix", "name": "*", "gate": "token"}
    prefix: Any = Spec.parse({"rules": [rule]}).rules[0].method
    assert prefix.peft.refusal_of(prefix) == "PEFT has no gates"
