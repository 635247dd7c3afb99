"""Kernels compiled without their GPU: they fit, nothing spills, tensor cores are used.

``python -m peftfx.kernels.ahead --accept`` takes what is compiled now for the golden file.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peftfx.kernels.ahead.launches import tiles
from peftfx.kernels.ahead.resources import VARIANTS, compiled, minor, recorded
from peftfx.kernels.devices import TARGETS
from peftfx.kernels.low_rank_linear.configs import rules, shipped
from peftfx.kernels.measured import triton_version

WIDE = ("fwd", "fwd_descriptor", "dx", "dx_descriptor")
BEST = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "v_mfma"}


def holds(variant: str, launches: dict[str, dict[str, Any]]) -> None:
    """What every compiled kernel must hold to."""
    target, _, dtype = variant.partition(":")
    for name, found in launches.items():
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
    golden = recorded()[minor(triton_version())][variant]
    changed = {k: (golden.get(k), v) for k, v in now.items() if golden.get(k) != v}
    assert not changed and set(golden) == set(now), "python -m peftfx.kernels.ahead --accept"


def test_hopper() -> None:
    check("sm_90:bfloat16")


@pytest.mark.sweep
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "sm_90:bfloat16"])
def test_others(variant: str) -> None:
    check(variant)


@pytest.mark.parametrize("version", ["3.6", "3.9"])
def test_recorded(version: str) -> None:
    """The file has every variant, and what it has is sound: of a Triton that is not here too."""
    table = recorded()[version]
    assert set(table) == set(VARIANTS)
    for variant, launches in table.items():
        holds(variant, launches)


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_shipped_tile_is_compiled(target: str, dtype: torch.dtype) -> None:
    """No tile of ``configs.json`` is for calls that nobody makes here."""
    used = tiles(target, dtype)
    for kernel in shipped()[target]:
        for rule in rules(kernel, target, dtype):
            assert (kernel, rule.config) in used, (kernel, rule)
