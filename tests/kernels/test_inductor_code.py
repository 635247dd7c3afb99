"""What Inductor makes of the lowered ops on a GPU, read from its code; the GPU is pretended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

FORWARD = ["s", "fwd"]
BACKWARD = ["dsb", "da", "dx"]


def printed(module: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{module}", *arguments],
        # under CI Inductor takes the pretended decomposition of addmm_ for an oversight of its own
        capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0", "CI": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def code() -> dict[str, Any]:
    return printed(
        "inductor_without_gpu", "triton", "opaque", "accumulate", "triton:few", "triton:loops"
    )


def test_launches_are_inductors_own(code: dict[str, Any]) -> None:
    """One op and one group, forward and backward: each kernel once, and no call into Python."""
    found = code["triton"]
    assert found["claims"] == ["triton"] and not found["ops"] and not found["library"]
    names = [n.removeprefix("low_rank_linear_").removesuffix("_kernel") for n in found["launches"]]
    for name in FORWARD + BACKWARD:
        assert names.count(name) == 2, names
    # S and dS of each, and dB and dA of each
    assert names.count("sum") == 8 and len(names) == 18


def test_written_out_source_compiles(code: dict[str, Any]) -> None:
    compiled = code["triton"]["compiled"]
    assert len(compiled) == 6
    assert (
        compiled["low_rank_linear_fwd_kernel"] == compiled["low_rank_linear_dx_kernel"] == "wgmma"
    )


@pytest.mark.parametrize("form", ["triton", "triton:loops", "opaque", "accumulate"])
def test_no_size_is_baked_in(code: dict[str, Any], form: str) -> None:
    """Nothing but that indices fit in 31 bits is asked of a free M."""
    assert all(guard.endswith("<= 2147483647") for guard in code[form]["guards"])


@pytest.mark.parametrize("form", ["triton", "opaque", "accumulate"])
def test_cuda_graphs_can_hold_it(code: dict[str, Any], form: str) -> None:
    """``mode="reduce-overhead"``: Inductor finds nothing in the graph that forbids a recording."""
    assert code[form]["no_cuda_graph"] is None


def test_few_rows_are_one_launch_for_a_group(code: dict[str, Any]) -> None:
    """And one more loop for all counters: each launch has its own 16 bytes of what that fills."""
    found = code["triton:few"]
    assert found["launches"] == ["low_rank_linear_decode_kernel"] * 2
    assert len(found["arguments"]) == 3 and not found["library"] and not found["ops"]
    first, second = found["counters"]
    assert first.endswith(" 0)") and second == first.removesuffix("0)") + "4)"
    assert list(found["compiled"]) == ["low_rank_linear_decode_kernel"]
    assert found["no_cuda_graph"] is None


def test_what_a_loop_makes_is_written_once(code: dict[str, Any]) -> None:
    """And not for each argument of each launch; the x of dA in the loop that reads dX."""
    found = code["triton:loops"]["arguments"]
    given = {n.removeprefix("low_rank_linear_").partition("_kernel")[0]: a for n, a in found}
    loops = [set(a) for n, a in found if not n.startswith("low_rank_linear")]
    x, dys = given["s"][0], given["dsb"][:3]
    assert x == given["fwd"][0] and given["dx"][:3] == dys and dys[0] == dys[2] != dys[1]
    assert [sum({name} <= loop for loop in loops) for name in (x, *dys)] == [1] * 4
    assert [given["da"][0] in loop for loop in loops].count(True) == 1
    assert [{given["da"][0], given["dx"][9]} <= loop for loop in loops].count(True) == 1


def test_opaque_ops_stay(code: dict[str, Any]) -> None:
    found = code["opaque"]
    assert not found["launches"] and len(found["ops"]) == 4
    assert all(op.startswith("triton_low_rank") for op in found["ops"])


def test_library_products_accumulate(code: dict[str, Any]) -> None:
    found = code["accumulate"]
    assert found["claims"] == ["accumulate", "inductor's random"]
    assert not found["launches"] and not found["ops"]
    assert found["in_place"] == 1 + 1 + 3 + 3  # of each site, forward and backward


@pytest.mark.slow
def test_loops_take_factors_in() -> None:
    """DoRA's gain and IA³'s vectors, in a Llama's layer by the loops that are there anyway.

    A factor by itself passes six times over what it scales: read and written; its gradient read and
    written, and both read for the sum that is the factor's gradient.
    """
    rows, outs, scaled = 8192, 4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096, 1024 + 1024 + 14336
    found = printed("loops_without_gpu")
    frozen, lora, dora, ia3 = (sum(found[n]) for n in ("frozen", "lora", "dora", "ia3"))
    assert 0 < dora - lora < 2.2 * (rows * outs * 2)
    assert 0 < ia3 - frozen < 1.8 * (rows * scaled * 2)
    gate = [max(found[n]) for n in ("lora", "dora", "ia3")]  # and its activation, backward
    assert max(gate) < 1.001 * min(gate)
