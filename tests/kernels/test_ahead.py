"""Kernels compiled without their GPU: they fit, nothing spills, tensor cores are used.

``python -m peftfx.kernels.ahead --accept`` takes what is compiled now for the golden file. Here the
installed Triton compiles; ``make test-triton`` has another one do it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peftfx.kernels.ahead.launches import launches, tiles
from peftfx.kernels.ahead.resources import VARIANTS, compiled, minor, recorded, sources
from peftfx.kernels.devices import TARGETS
from peftfx.kernels.low_rank_linear.configs import rules, shipped
from peftfx.kernels.measured import triton_version

WIDE = ("fwd", "fwd_descriptor", "dx", "dx_descriptor")
BEST = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "v_mfma"}


MAIN = ("sm_80:bfloat16", "sm_100:bfloat16", "gfx942:bfloat16")  # beside Hopper's


def holds(variant: str, compiled: dict[str, dict[str, Any]]) -> None:
    """What every compiled kernel must hold to."""
    target, _, dtype = variant.partition(":")
    for name, found in compiled.items():
        kernel = name.split()[0]
        assert found["spills"] == 0, name
        assert found["shared_memory"] <= TARGETS[target].shared_memory, name
        if kernel == "sum" or (dtype == "float32" and target != "gfx942"):
            continue  # no products; exact fp32 products, which CUDA's tensor cores do not have
        assert found["instruction"], name
        if kernel in WIDE and dtype in ("bfloat16", "float16"):
            assert found["instruction"] == BEST[target], name


def check(variant: str) -> None:
    now = compiled([variant])[variant]
    holds(variant, now)
    golden = recorded()[minor(triton_version())].table[variant]
    changed = {k: (golden.get(k), v) for k, v in now.items() if golden.get(k) != v}
    assert not changed and set(golden) == set(now), "python -m peftfx.kernels.ahead --accept"


def test_hopper() -> None:
    check("sm_90:bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("variant", MAIN)
def test_other_targets(variant: str) -> None:
    check(variant)


@pytest.mark.sweep
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ("sm_90:bfloat16", *MAIN)])
def test_other_dtypes(variant: str) -> None:
    check(variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sm_90:bfloat16", "gfx942:float32"])
def test_producers(variant: str) -> None:
    holds(variant, compiled(["--producers", variant])[variant])


@pytest.mark.parametrize("version", ["3.6", "3.9"])
def test_recorded(version: str) -> None:
    """Of a Triton that is not here too: every variant is there, made from these sources and for
    these launches, and what is said of it is sound."""
    found = recorded()[version]
    assert found.sources == sources(), "python -m peftfx.kernels.ahead --accept, with that Triton"
    assert set(found.table) == set(VARIANTS)
    for variant, golden in found.table.items():
        holds(variant, golden)
        target, _, name = variant.partition(":")
        dtype = getattr(torch, name.partition("/")[0])
        assert set(golden) == {launch.name for launch in launches(target, dtype)}


def test_the_installed_triton_is_recorded() -> None:
    """Else nothing would be compared with anything."""
    assert minor(triton_version()) in recorded()


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_shipped_tile_is_compiled(target: str, dtype: torch.dtype) -> None:
    """No tile of ``configs.json`` is for calls that nobody makes here."""
    used = tiles(target, dtype)
    for kernel in shipped()[target]:
        for rule in rules(kernel, target, dtype):
            assert (kernel, rule.config) in used, (kernel, rule)
