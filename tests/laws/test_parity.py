"""Every method that HF PEFT has, on many architectures: forward, gradients, files, merge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.loha.layer import make_weight_cp
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from peftfx.binding import bound
from peftfx.methods import lookup, names
from peftfx.methods.lokr import divisors
from peftfx.peft_format import Directory
from tests.architectures import ARCHITECTURES, Architecture, by_name
from tests.helpers import fill, output, relative
from tests.methods import BY_ID, ROWS, Row, targets
from tests.soft_prompts import TASKS

BREAKS = {"mixtral"}  # its experts' loop reads values: torch breaks the base's graph too
CASES = [
    pytest.param(row, name, id=f"{row}-{name}", marks=[pytest.mark.sweep] if i else [])
    for row in ROWS
    for i, name in enumerate(dict.fromkeys(row.on))
]


def example_of(arch: Architecture) -> Any:
    values = arch.example()
    return tuple(values.values()) if arch.name == "sequential" else values


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's trainable parameters by the keys of its files."""
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    plain = {n.replace(".default", ""): p for n, p in found.items()}
    return {n.replace("magnitude_vector.weight", "magnitude_vector"): p for n, p in plain.items()}


def reference(row: Row, arch: Architecture, base: nn.Module) -> nn.Module:
    assert row.peft is not None
    config = row.peft(targets(row, arch))
    model: nn.Module = peft.get_peft_model(copy.deepcopy(base), config).eval()
    fill(trained(model).values())
    with torch.no_grad():
        for name, p in trained(model).items():
            if any(part in name for part in ("ia3_l", "magnitude")):
                p.add_(1.0)
    return model


def _cp(t1: Tensor, a1: Tensor, b1: Tensor, t2: Tensor, a2: Tensor, b2: Tensor, scale: Any) -> Any:
    """PEFT's ``make_weight_cp``, differentiated by torch."""
    first, second = (
        torch.einsum("ijkl,jr,ip->prkl", t, b, a) for t, a, b in ((t1, a1, b1), (t2, a2, b2))
    )
    return first * second * scale


def test_peft_differentiates_tucker_loha_wrongly() -> None:
    """Its hand-written backward takes the other side's factors for ``w1_a`` and ``w2_a``."""
    shapes = [(2, 2, 3, 3), (2, 5), (2, 4), (2, 2, 3, 3), (2, 5), (2, 4)]
    given = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    scale = torch.tensor(1.5)
    theirs = torch.autograd.grad(make_weight_cp(*given, scale=scale).square().sum(), given)
    right = torch.autograd.grad(_cp(*given, scale).square().sum(), given)
    wrong = {i for i, (a, b) in enumerate(zip(theirs, right, strict=True)) if relative(a, b) > 1e-6}
    assert wrong == {1, 4}


def keys(model: nn.Module) -> dict[str, str]:
    placements = bound(model)[1].adapters["default"].plan.placements
    return {
        f"{p.site.name}:{p.method.name}.{name}": key
        for p, names in zip(placements, Directory().keys_of(placements), strict=True)
        for name, key in names.items()
    }


@pytest.mark.parametrize(("row", "name"), CASES)
def test_equal_to_peft(
    row: Row, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft.tuners.loha.layer, "make_weight_cp", _cp)
    arch = by_name(name)
    base, x = arch.build(), arch.example()
    theirs = reference(row, arch, base)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    peftfx.load(ours, tmp_path / "theirs", trainable=True, compile=False, example=example_of(arch))
    expected = output(theirs, x)
    assert relative(expected, output(base, x)) > 1e-3  # the adapter does something

    assert relative(output(ours, x), expected) < 1e-5  # eager, by the marks
    backend = Backend(None, "aot_eager")
    compiled = torch.compile(ours, backend=backend, fullgraph=name not in BREAKS)
    out = output(compiled, x)
    assert relative(out, expected) < 1e-5

    expected.square().mean().backward()
    out.square().mean().backward()
    want = {n: p.grad for n, p in trained(theirs).items() if p.grad is not None}
    known = keys(ours)
    got = {known[n]: p.grad for n, p in peftfx.named_parameters(ours)}
    assert set(got) == set(want)
    largest = max(float(g.abs().max()) for g in want.values())
    for key, grad in want.items():
        own = got[key]
        assert own is not None and float((own - grad).abs().max()) <= 1e-5 * largest, key

    peftfx.save(ours, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert relative(output(again, x), expected) < 1e-6
    before = peftfx.state_dict(ours)
    fresh = copy.deepcopy(base)
    peftfx.load(fresh, tmp_path / "ours", compile=False, example=example_of(arch))
    after = peftfx.state_dict(fresh)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)  # files are bit-exact

    peftfx.merge(ours, untie=True)
    assert relative(output(ours, x), expected) < 1e-5
    peftfx.unmerge(ours)
    peftfx.release(ours)
    left, right = ours.state_dict(), base.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("name", ["gpt2", "llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_tokens_beside_a_lora(name: str, tmp_path: Path) -> None:
    arch = by_name(name)
    base, x = arch.build(), arch.example()
    embedding = targets(BY_ID["tokens"], arch)[0]
    config = peft.LoraConfig(
        r=3, target_modules=list(arch.targets), trainable_token_indices={embedding: [7, 3, 11]}
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    fill(trained(theirs).values())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    peftfx.load(ours, tmp_path / "theirs", compile=False)
    expected = output(theirs, x)
    assert relative(output(ours, x), expected) < 1e-5
    peftfx.save(ours, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert relative(output(again, x), expected) < 1e-6


def test_rotated_convolutions_are_what_peft_is_when_merged(tmp_path: Path) -> None:
    """PEFT's unmerged OFT adds up overlapping windows: it differs from its own merged form."""
    arch = by_name("resnet")
    base, x = arch.build(), arch.example()
    theirs = reference(BY_ID["oft"], arch, base)
    theirs.save_pretrained(tmp_path)
    unmerged = output(theirs, x)
    merged = output(theirs.merge_and_unload(), x)  # type: ignore[operator]
    assert relative(unmerged, merged) > 1e-2
    ours = copy.deepcopy(base)
    peftfx.load(ours, tmp_path, compile=False)
    assert relative(output(ours, x), merged) < 1e-5


# PEFT's OLoRA takes the weight of an HF Conv1D for its transpose, and fails
@pytest.mark.parametrize(
    ("kind", "name"), [("pissa", "llama"), ("pissa", "gpt2"), ("olora", "bert")]
)
def test_starts_from_the_base(kind: str, name: str, tmp_path: Path) -> None:
    """PEFT changes the base weight, peftfx does not: the functions and files agree."""
    arch = by_name(name)
    base, x = arch.build(), arch.example()
    config = peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=kind, target_modules=list(arch.targets)
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for p in trained(theirs).values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    expected = output(theirs, x)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    peftfx.load(ours, tmp_path / "theirs", trainable=True, compile=False)
    assert relative(output(ours, x), expected) < 1e-5
    expected.square().mean().backward()
    output(ours, x).square().mean().backward()
    want = {n: p.grad for n, p in trained(theirs).items() if p.grad is not None}
    got = {keys(ours)[n]: p.grad for n, p in peftfx.named_parameters(ours)}
    largest = max(float(g.abs().max()) for g in want.values())
    assert all(float((got[k] - want[k]).abs().max()) <= 1e-5 * largest for k in want)

    peftfx.save(ours, tmp_path / "ours", format="peft")  # a plain LoRA of twice the rank
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert again.peft_config["default"].r == 8
    assert relative(output(again, x), expected) < 1e-5
    fresh = copy.deepcopy(base)
    peftfx.load(fresh, tmp_path / "ours", compile=False)
    before, after = peftfx.state_dict(ours), peftfx.state_dict(fresh)
    assert all(torch.equal(before[k], after[k]) for k in before)
    peftfx.release(ours)
    assert torch.equal(output(ours, x), output(base, x))


def test_vera_without_its_projection(tmp_path: Path) -> None:
    arch = by_name("bert")
    base, x = arch.build(), arch.example()
    with pytest.warns(UserWarning, match="PRNG"):
        config = peft.VeraConfig(
            r=5, projection_prng_key=3, save_projection=False, target_modules=["query", "dense"]
        )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    fill(trained(theirs).values())
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    state = torch.get_rng_state()
    peftfx.load(ours, tmp_path, compile=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert relative(output(ours, x), output(theirs, x)) < 1e-5


def test_allocated_ranks_are_read(tmp_path: Path) -> None:
    arch = by_name("llama")
    base, x = arch.build(), arch.example()
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, total_step=9, target_modules=["q_proj", "v_proj"]
    )
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config).eval()
    fill(trained(theirs).values())
    layers = "model.layers"
    theirs.peft_config["default"].rank_pattern = {
        f"{layers}.0.self_attn.q_proj.lora_E": [True, False, True, False],
        f"{layers}.0.self_attn.v_proj.lora_E": [False] * 3 + [True],
        f"{layers}.1.self_attn.q_proj.lora_E": [True] * 4,
        f"{layers}.1.self_attn.v_proj.lora_E": [True, True, True, False],
    }
    theirs.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    ours = copy.deepcopy(base)
    peftfx.load(ours, tmp_path, compile=False)
    assert relative(output(ours, x), output(again, x)) < 1e-5
    assert len({p.shape for p in peftfx.state_dict(ours).values()}) > 4


@pytest.mark.parametrize("factor", [-1, 1, 2, 4, 5, 10, 64])
def test_kronecker_sizes_are_peft_s(factor: int) -> None:
    for size in range(1, 200):
        assert divisors(size, factor) == factorization(size, factor), size


def test_every_shared_method_is_on_eight_architectures() -> None:
    """What stands beside others in PEFT's files, biases and whole modules: test_peft_options.py."""
    on: dict[str, set[str]] = {"lora": {a.name for a in ARCHITECTURES if a.targets}}
    for row in ROWS:
        on.setdefault(row.method, set()).update(row.on)
    for method in ("prompt", "ptuning", "prefix"):
        on[method] = set(TASKS)
    shared = {n for n in names() if (form := lookup(n).peft) is not None and form.type}
    few = {name: sorted(on.get(name, ())) for name in shared if len(on.get(name, ())) < 8}
    assert not few
