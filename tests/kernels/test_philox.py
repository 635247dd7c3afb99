"""The random numbers: known answers, Triton's own sequence, and what masks promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftfx.kernels.philox.op import dropout, keep_mask, philox, stream, uniform

CPU = torch.device("cpu")


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(v, dtype=torch.int64) for v in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the vectors that Salmon et al. publish for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    found = philox(words(*key), words(*counter))  # type: ignore[arg-type]
    assert tuple(int(w) for w in found) == expected


@pytest.mark.parametrize("seed", [0, 7, 123456789012345, 2**62 - 1])
def test_equal_to_triton(seed: int) -> None:
    triton = pytest.importorskip("triton")
    from tests.kernels.triton_rand import draw

    assert triton
    for site in (0, 5):
        key = int(stream(torch.tensor(seed), site))
        assert torch.equal(draw(key, 128), uniform(torch.tensor(seed), site, (128,), CPU))


@given(
    st.integers(0, 2**62), st.integers(0, 300), st.floats(0.05, 0.9), st.integers(0, 9),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)  # fmt: skip
def test_compiled_loop(seed: int, site: int, p: float, n: int, dtype: torch.dtype) -> None:
    """The C loop gives the definition's masks, on any layout."""
    from peftfx.kernels.philox.cpu import compiled

    assert compiled() is not None  # this machine has a C compiler
    x = torch.randn(n, 3, dtype=dtype).t()
    out = torch.ops.peftfx.dropout(x, torch.tensor(seed), p, site)
    keep = keep_mask(x, torch.tensor(seed), p, site)  # written out in torch
    expected = torch.where(keep, x * (1.0 / (1.0 - p)), torch.zeros_like(x))
    assert torch.equal(out, expected) and out.stride() == expected.stride()


@pytest.mark.parametrize("threads", [1, 2, 7, 1000])
def test_threads(threads: int) -> None:
    """Parts of the mask by several threads are the mask; nothing is written behind it."""
    from peftfx.kernels.philox.cpu import compiled

    loop, count = compiled(), 300_001
    assert loop is not None
    out = torch.full((count + 8,), 7, dtype=torch.uint8)
    loop(out.data_ptr(), count, int(stream(torch.tensor(5), 3)), 0.4, threads)
    expected = keep_mask(torch.empty(count), torch.tensor(5), 0.4, 3)
    assert torch.equal(out[:count].bool(), expected) and out[count:].eq(7).all()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No compiler, or one that fails: the same masks by the definition, and a word in the log."""
    from peftfx.kernels.philox import cpu

    x, seed = torch.randn(4, 5), torch.tensor(3)
    expected = torch.ops.peftfx.dropout(x, seed, 0.5, 1)
    monkeypatch.setenv("PEFTFX_CACHE", str(tmp_path))
    for setting in ({"CC": "false"}, {"CC": "", "PATH": str(tmp_path)}):
        for name, value in setting.items():
            monkeypatch.setenv(name, value)
        cpu.compiled.cache_clear()
        assert cpu.compiled() is None
        assert torch.equal(torch.ops.peftfx.dropout(x, seed, 0.5, 1), expected)
    cpu.compiled.cache_clear()


def test_through_inductor() -> None:
    """The definition's mask under Inductor too, and the backward regenerates it."""
    from peftfx.dynamo import compile_inductor
    from peftfx.passes.claims import INDUCTOR_CLAIMS
    from peftfx.passes.lower import LowerPass

    x, seed = torch.randn(640, 70, requires_grad=True), torch.tensor(123456789012345)
    lower = LowerPass(INDUCTOR_CLAIMS)

    def run(x: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        return torch.ops.peftfx.dropout(x, seed, 0.4, 3)

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        return compile_inductor(gm, inputs, lower, None, {"force_disable_caches": True})

    compiled = torch.compile(run, backend=backend)
    out = compiled(x, seed)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, dropout(x, seed, 0.4, 3))
    assert torch.equal(grad != 0, out != 0)
    assert {c.claim for c in lower.choices} == {"definition"}


def test_one_mask_for_a_backward() -> None:
    """dX and dA of a site share the mask that a backward makes: one op in its graph."""
    from peftfx.dynamo import compile_inductor
    from peftfx.passes.claims import INDUCTOR_CLAIMS
    from peftfx.passes.lower import LowerPass

    graphs: list[torch.fx.Graph] = []

    class Kept(LowerPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            super().__call__(graph)
            graphs.append(graph)

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        lower = Kept(INDUCTOR_CLAIMS)
        return compile_inductor(gm, inputs, lower, None, {"force_disable_caches": True})

    x, w = torch.randn(6, 5, requires_grad=True), torch.randn(7, 5)
    a, b = torch.randn(2, 5, requires_grad=True), torch.randn(7, 2, requires_grad=True)
    scale, seed = torch.tensor(0.5), torch.tensor(11)

    def run(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.peftfx.low_rank_linear(
            x, w, None, a, b, None, scale, seed, 0.4, 3
        )[0]
        return out

    found = torch.autograd.grad(torch.compile(run, backend=backend)(x, a, b).sum(), (x, a, b))
    expected = torch.autograd.grad(run(x, a, b).sum(), (x, a, b))
    torch.testing.assert_close(found, expected)
    target = torch.ops.peftfx.keep_mask.default
    assert [len(g.find_nodes(op="call_function", target=target)) for g in graphs] == [1, 1]


@given(st.integers(0, 2**62), st.integers(0, 300), st.floats(0.05, 0.9))
def test_mask(seed: int, site: int, p: float) -> None:
    x, key = torch.empty(40, 50), torch.tensor(seed)
    mask = keep_mask(x, key, p, site)
    assert abs(float(mask.float().mean()) - (1 - p)) < 0.06
    assert torch.equal(mask, keep_mask(x.view(2000), key, p, site).view(40, 50))
    assert not torch.equal(mask, keep_mask(x, key, p, site + 1))


def test_op_masks_its_gradient_alike() -> None:
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor(3)
    y = torch.ops.peftfx.dropout(x, seed, 0.4, 2)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad != 0, y != 0)
    assert torch.autograd.gradcheck(lambda t: torch.ops.peftfx.dropout(t, seed, 0.4, 2), (x,))
    torch.library.opcheck(torch.ops.peftfx.dropout.default, (x, seed, 0.4, 2))
    torch.library.opcheck(torch.ops.peftfx.keep_mask.default, (x.detach(), seed, 0.4, 2))
