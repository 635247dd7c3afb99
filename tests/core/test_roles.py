"""Roles by dataflow: what the table of architectures says, both ways, and plain modules."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from peftfx.roles import roles
from peftfx.select import ROLES
from peftfx.site import sites
from peftfx.trace import trace
from tests.architectures import ARCHITECTURES, FAMILIES, Architecture
from tests.e2e.test_architectures import example_of

ALL = pytest.mark.parametrize("arch", ARCHITECTURES, ids=str)
WRITTEN = [(a, how) for a in ARCHITECTURES for how in a.attention]


def check(arch: Architecture, **more: object) -> None:
    """Whether the roles that are found are those of the table: none is missing, none is extra."""
    model = arch.build(**more)
    told = roles(trace(model, example_of(arch)))
    found = {r: {n for n, names in told.found.items() if r in names} for r in ROLES}
    expected = {r: set(arch.having(model, r)) for r in ROLES}
    assert found == expected
    paths = [path for path, _ in model.named_modules()]
    acted = {(o.role, path) for path, outputs in told.outputs.items() for o in outputs}
    assert acted == {
        (role, p) for role, globs in arch.outputs.items() for p in paths
        if any(fnmatchcase(p, g) for g in globs)
    }  # fmt: skip
    for glob, rows in arch.rows.items():
        fused = [n for n in told.rows if fnmatchcase(n.removesuffix(".weight"), glob)]
        assert fused
        assert all(told.rows[n] == rows for n in fused)
    known = {n.removesuffix(".weight").removesuffix(".bias") for n in told.rows}
    assert all(any(fnmatchcase(n, g) for g in arch.rows) for n in known)
    assert told.stacks == arch.stacks


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


@ALL
def test_layers_are_numbered_as_they_run(arch: Architecture) -> None:
    model = arch.build()
    traced = trace(model, example_of(arch))
    layer = {s.module: s.layer for s in sites(model)}
    seen: dict[str, list[int]] = {}
    for op in traced.ops.values():
        if layer.get(op.module) is not None and op.params:
            outer = op.module[: op.module.index(f".{layer[op.module]}.")]
            if seen.setdefault(outer, [])[-1:] != [layer[op.module]]:
                seen[outer].append(layer[op.module])
    for numbers in seen.values():
        assert numbers == sorted(numbers)


def test_readme_lists_the_table() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    listed = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))
    names = {family: ", ".join(map(str, rows)) for family, rows in FAMILIES.items()}
    assert {family: listed.get(family) for family in FAMILIES} == names
