"""Roles by dataflow: what the table of architectures says, both ways, and plain modules."""

from __future__ import annotations

import re
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peftfx.errors import PlanError, RoleError
from peftfx.plans import make_plan
from peftfx.roles import roles
from peftfx.select import ROLES
from peftfx.site import sites
from peftfx.trace import Trace, trace
from tests.architectures import (
    ARCHITECTURES,
    FAMILIES,
    MIXTURES,
    PLAIN,
    Architecture,
    by_name,
)
from tests.architectures.architecture import hf
from tests.architectures.blocks import BLOCKS
from tests.architectures.encoders import BERT
from tests.e2e.test_architectures import example_of

ALL = pytest.mark.parametrize("arch", ARCHITECTURES, ids=str)
FLEX = ("llama", "bert", "bart", "vit")  # in the default suite
WRITTEN = [
    pytest.param(a, how, marks=[pytest.mark.sweep] if how != "eager" and a.name not in FLEX else [])
    for a in ARCHITECTURES for how in a.attention
]  # fmt: skip


def check(arch: Architecture, **more: object) -> None:
    """Whether the roles that are found are those of the table: none is missing, none is extra."""
    model = arch.build(**more)
    traced = trace(model, example_of(arch))
    told = roles(traced)
    check_layers(model, traced)
    found = {r: {n for n, names in told.found.items() if r in names} for r in ROLES}
    expected = {r: set(arch.having(model, r)) for r in ROLES}
    assert found == expected
    paths = [path for path, _ in model.named_modules()]
    acted = {(o.role, path) for path, outputs in told.outputs.items() for o in outputs}
    assert acted == {
        (role, p) for role, globs in {**arch.outputs, "block": BLOCKS[arch.name]}.items()
        for p in paths
        if any(fnmatchcase(p, g) for g in globs)
    }  # fmt: skip
    for glob, rows in arch.rows.items():
        fused = [n for n in told.rows if fnmatchcase(n.removesuffix(".weight"), glob)]
        assert fused
        assert all(told.rows[n] == rows for n in fused)
    known = {n.removesuffix(".weight").removesuffix(".bias") for n in told.rows}
    assert all(any(fnmatchcase(n, g) for g in arch.rows) for n in known)
    assert told.stacks == arch.stacks


def check_layers(model: nn.Module, traced: Trace) -> None:
    """Whether the layers of each list are numbered in the order that they run in."""
    layer = {s.module: s.layer for s in sites(model)}
    seen: dict[str, list[int]] = {}
    for op in traced.ops.values():
        number = layer.get(op.module)
        if number is not None and op.params:
            outer = op.module[: op.module.index(f".{number}.")]
            seen.setdefault(outer, []).append(number)
    for numbers in seen.values():
        assert numbers == sorted(numbers)


@ALL
def test_as_the_table_says(arch: Architecture) -> None:
    check(arch)


@pytest.mark.parametrize("arch, how", WRITTEN, ids=lambda v: str(v))
def test_however_attention_is_written(arch: Architecture, how: str) -> None:
    check(arch, attn_implementation=how)


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3"])
def test_however_experts_are_run(name: str, how: str) -> None:
    check(next(a for a in ARCHITECTURES if a.name == name), experts_implementation=how)


def _bfloat16(arch: Architecture) -> Architecture:
    def example() -> dict[str, Tensor]:
        values = arch.example().items()
        return {k: v.bfloat16() if v.is_floating_point() else v for k, v in values}

    return replace(arch, build=lambda: arch.build().bfloat16(), example=example)


# torch's grouped products want experts that are larger than the table's
NARROW = [a for a in ARCHITECTURES if a not in (*PLAIN, *MIXTURES)]


@pytest.mark.sweep
@pytest.mark.parametrize("arch", NARROW, ids=str)
def test_in_bfloat16(arch: Architecture) -> None:
    check(_bfloat16(arch))


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "falcon", "deepseek-v3", "t5", "bart"])
def test_with_a_cache_and_a_mask(name: str) -> None:
    arch = by_name(name)
    mask = torch.tensor([[0, 0, *[1] * 7], [1] * 9])
    check(replace(arch, example=lambda: {**arch.example(), "attention_mask": mask}), use_cache=True)


@pytest.mark.parametrize("name, labels", [("bert", (2,)), ("llama", (2, 9))])
def test_with_a_loss(name: str, labels: tuple[int, ...]) -> None:
    arch = by_name(name)
    labels_of = {"labels": torch.ones(labels, dtype=torch.long)}
    check(replace(arch, example=lambda: {**arch.example(), **labels_of}))


def test_a_pooler_is_no_head() -> None:
    model = hf("BertConfig", "BertModel", **BERT)()
    told = roles(trace(model, by_name("bert").example()))
    assert not any("head" in found for found in told.found.values())
    assert ("head", "pooler.dense.weight") in [(role, name) for role, name, _ in told.unclear]


def test_readme_lists_the_table() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    listed = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))
    names = {family: ", ".join(map(str, rows)) for family, rows in FAMILIES.items()}
    assert {family: listed.get(family) for family in FAMILIES} == names


class Product(nn.Module):
    """Attention whose queries are a product of two linears', and a linear with no residual."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.k = (nn.Linear(8, 8) for _ in range(3))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.a(x) * self.b(x), self.k(x)
        y = nn.functional.scaled_dot_product_attention(q, k, k)
        return self.down(nn.functional.gelu(self.up(y)))


@pytest.mark.parametrize(
    "role, reason",
    [
        ("attention.query", "its query is made of several weights"),
        ("attention", "its query is made of several weights"),
        ("mlp.up", "up.weight (an activation follows, but there is no residual)"),
        ("router", "the model shows head"),
    ],
)
def test_what_is_not_told_is_refused_with_the_nearest(role: str, reason: str) -> None:
    rule = {"method": "lora", "role": role}
    with pytest.raises(RoleError) as caught:
        make_plan(Product(), {"rules": [rule]}, (torch.randn(2, 5, 8),))
    assert reason in str(caught.value)


def test_a_stack_of_a_model_that_has_one_is_refused() -> None:
    rule = {"method": "lora", "role": "mlp", "stack": "decoder"}
    with pytest.raises(PlanError, match="one stack of layers alone"):
        make_plan(by_name("llama").build(), {"rules": [rule]})


def test_a_stack_is_chosen() -> None:
    rule = {"method": "lora", "role": "attention.query", "stack": "decoder", "layers": "last 1"}
    plan, _ = make_plan(by_name("bart").build(), {"rules": [rule]})
    assert [p.site.module for p in plan] == ["model.decoder.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize(
    "name, count, stage", [("swin", 2, "layers.1."), ("convnext", 2, "stages.1."),
                           ("segformer", 2, "stages.1.")],
)  # fmt: skip
def test_layers_are_stages_where_there_are_stages(name: str, count: int, stage: str) -> None:
    model = by_name(name).build()
    within = [s for s in sites(model) if s.layer is not None and f"{stage}" in s.module]
    assert within and {(s.layer, s.layers) for s in within} == {(1, count)}
