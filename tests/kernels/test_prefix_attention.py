"""Prefix attention: both forms against softmax over joined keys, written anew in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peftfx import dynamo
from peftfx.kernels.prefix_attention import op, own
from tests.helpers import Seen, relative

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Case:
    """Operands with H query heads, K key heads and N prefix heads."""

    def __init__(
        self, heads: tuple[int, int, int] = (4, 2, 2), s: int = 5, t: int = 7, p: int = 3,
        d: int = 8, mask: str = "none", dtype: torch.dtype = torch.float64, seed: int = 0,
        values: int | None = None,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        h, k, n = heads

        def made(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(of)

        wide = torch.promote_types(dtype, torch.float32)
        width = values or d
        self.q, self.k, self.v = made(2, h, s, d), made(2, k, t, d), made(2, k, t, width)
        self.pk, self.pv = made(n, p, d, of=wide), made(n, p, width, of=wide)
        self.causal, self.scale = mask == "causal", 0.4
        self.mask: Tensor | None = None
        self.bias: Tensor | None = None
        if mask in ("bool", "dead rows"):
            self.mask = torch.rand(2, 1, s, t, generator=g) > 0.4
            if mask == "dead rows":
                self.mask[1, :, :2] = False  # as left padding leaves them
        if mask in ("float", "bias"):
            self.mask = made(1, h, s, t)
        if mask == "bias":
            self.bias = made(1, h, s, p)

    def args(self) -> tuple[Any, ...]:
        return (self.q, self.k, self.v, self.pk, self.pv, self.mask, self.bias, self.causal,
                self.scale)  # fmt: skip


def reference(c: Case) -> Tensor:
    """Softmax over [prefix, own] by plain arithmetic."""
    h = c.q.shape[1]
    q, k, v, pk, pv = (t.double() for t in (c.q, c.k, c.v, c.pk, c.pv))
    k, v = (t.repeat_interleave(h // t.shape[1], 1) for t in (k, v))
    pk, pv = (t.repeat_interleave(h // t.shape[0], 0).expand(2, -1, -1, -1) for t in (pk, pv))
    own = torch.einsum("bhsd,bhtd->bhst", q, k) * c.scale
    front = torch.einsum("bhsd,bhpd->bhsp", q, pk) * c.scale
    if c.mask is not None and c.mask.dtype == torch.bool:
        own = own.masked_fill(~c.mask, -torch.inf)
    elif c.mask is not None:
        own = own + c.mask.double()
    if c.bias is not None:
        front = front + c.bias.double()
    if c.causal:
        s, t = own.shape[-2:]
        later = torch.arange(t)[None, :] > torch.arange(s)[:, None]
        own = own.masked_fill(later, -torch.inf)
    weights = torch.cat([front, own], -1).softmax(-1)
    return torch.einsum("bhst,bhtd->bhsd", weights, torch.cat([pv, v], 2))


MASKS = ("none", "causal", "bool", "dead rows", "float", "bias")
HEADS = ((4, 4, 4), (4, 2, 2), (4, 4, 2), (6, 6, 1), (2, 2, 2))


@given(
    st.sampled_from(HEADS), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4),
    st.sampled_from(MASKS), st.sampled_from(list(BOUND)),
)  # fmt: skip
def test_both_forms(
    heads: tuple[int, int, int], s: int, t: int, p: int, mask: str, dtype: torch.dtype
) -> None:
    c = Case(heads, s, t, p, mask=mask, dtype=dtype)
    expected = reference(c)
    out, lse = torch.ops.peftfx.prefix_attention(*c.args())
    assert out.dtype == dtype and out.is_contiguous() and lse.shape == out.shape[:-1]
    assert relative(out, expected) < BOUND[dtype]
    assert relative(op.joined(*c.args()), expected) < BOUND[dtype]


def with_grads(c: Case, run: Any) -> list[Tensor]:
    leaves = [c.q, c.k, c.v, c.pk, c.pv]
    for leaf in leaves:
        leaf.grad = None
        leaf.requires_grad_()
    out = run(*c.args())
    out = out[0] if isinstance(out, tuple) else out
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out)
    (out * weights).sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("values", [8, 5], ids=["flash", "written out"])
def test_gradients(mask: str, values: int) -> None:
    """The merged form's own backward, with flash attention and without, against autograd's."""
    c = Case(mask=mask, values=values)
    expected = with_grads(c, lambda *_: reference(c))
    for run in (torch.ops.peftfx.prefix_attention, op.joined):
        got = with_grads(c, run)
        assert len(got) == 5
        assert all(relative(a, b) < 1e-10 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("mask", ["causal", "dead rows", "bias"])
def test_gradcheck(mask: str) -> None:
    c = Case(s=3, t=4, p=2, d=4, mask=mask)
    leaves = tuple(t.requires_grad_() for t in (c.q, c.k, c.v, c.pk, c.pv))

    def run(*tensors: Tensor) -> Tensor:
        return torch.ops.peftfx.prefix_attention(*tensors, *c.args()[5:])[0]

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("mask", ["none", "causal", "bool"])
def test_opcheck(mask: str) -> None:
    c = Case(mask=mask, dtype=torch.float32)
    for t in (c.q, c.k, c.v, c.pk, c.pv):
        t.requires_grad_()
    torch.library.opcheck(torch.ops.peftfx.prefix_attention.default, c.args())


def test_strided_operands_as_models_have_them() -> None:
    c = Case((4, 2, 2), dtype=torch.float32)
    expected = torch.ops.peftfx.prefix_attention(*c.args())[0]
    for name in ("q", "k", "v"):
        t = getattr(c, name)
        setattr(c, name, t.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(torch.ops.peftfx.prefix_attention(*c.args())[0], expected)


def test_autocast_is_attention_s() -> None:
    c = Case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = torch.ops.peftfx.prefix_attention(*c.args())
    assert out.dtype == torch.bfloat16 and relative(out, reference(c)) < BOUND[torch.bfloat16]


def test_the_rule() -> None:
    c = Case()

    def why(q: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> str:
        return op.why_joined(q, c.k, v, mask, False, dropout) or ""

    assert not why(c.q, c.v, None, 0.0)
    assert "drops" in why(c.q, c.v, None, 0.1)
    trained = torch.zeros(5, 7, requires_grad=True)
    assert "trains" in why(c.q, c.v, trained, 0.0)
    assert "widths" in why(c.q, c.v[..., :3], None, 0.0)
    elsewhere = torch.empty(1, 1, 1, 8, device="meta")
    assert "meta" in why(elsewhere, elsewhere, None, 0.0)


GPU = [  # heads of queries and keys, queries, keys, width, dtype, mask: the kernel
    ((8, 2), 64, 64, 64, torch.bfloat16, "causal", "flash"),
    ((8, 2), 1, 70, 64, torch.float16, "none", "flash"),
    ((8, 8), 33, 70, 64, torch.bfloat16, "causal", "efficient"),
    ((8, 2), 33, 70, 64, torch.bfloat16, "bool", "efficient"),
    ((4, 4), 32, 32, 16, torch.float32, "float", "efficient"),
    ((4, 1), 7, 7, 36, torch.float32, "none", "efficient"),
]


def on(device: str, heads: Any, s: int, t: int, d: int, dtype: torch.dtype, mask: str) -> Case:
    c = Case((*heads, heads[1]), s, t, 5, d, mask, dtype)
    for name in ("q", "k", "v", "pk", "pv", "mask"):
        value = getattr(c, name)
        setattr(c, name, value if value is None else value.to(device))
    return c


@pytest.mark.parametrize("case", GPU, ids=[f"{c[-2]} {c[-1]} {c[2]}" for c in GPU])
def test_shapes_that_kernels_for_gpus_are_given(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without memory, forward and backward: the kernel, and what it is given."""
    monkeypatch.setattr(own, "kernel", own.on_gpu)
    *shape, name = case
    c = on("meta", *shape)
    assert op.why_joined(c.q, c.k, c.v, c.mask, c.causal, 0.0) is None
    with Seen() as seen:
        out, lse = op.prefix_attention(*c.args())
        grads = op.prefix_attention_backward(out, out, lse, *c.args())
    assert out.shape == c.q.shape and lse.shape == c.q.shape[:-1] and lse.dtype == torch.float32
    given_ = (c.q, c.k, c.v, c.pk, c.pv)
    assert [g.shape for g in grads] == [t.shape for t in given_]
    assert [g.dtype for g in grads] == [t.dtype for t in given_]
    op_name = f"aten::_scaled_dot_product_{name}_attention"
    (args,), (back,) = seen.calls[op_name], seen.calls[f"{op_name}_backward"]
    assert all(t.stride(-1) == 1 for t in args[:3])
    if name == "efficient":
        assert args[1].shape[1] == c.q.shape[1] and back[6].shape[-1] % 32 == 0
        if args[3] is not None:
            assert args[3].shape == (*c.q.shape[:-1], c.k.shape[2])
            assert args[3].stride(-1) == 1 and all(s % 8 == 0 for s in args[3].stride()[:-1])
            assert c.mask is not None and (c.mask.shape[1] > 1 or args[3].stride(1) == 0)


@pytest.mark.parametrize("kernel", ["cpu", "flash", "efficient"])
@pytest.mark.parametrize("heads", [(4, 4, 4), (8, 2, 2)])
def test_no_mask_is_made(
    kernel: str, heads: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Causal attention stays its kernel's, told that it is; nothing has queries by keys."""
    s = 1024
    if kernel != "cpu":
        monkeypatch.setattr(own, "kernel", own.on_gpu)
    dtype = torch.bfloat16 if kernel == "flash" else torch.float32
    c = Case(heads, s, s, 3, 16, "causal", dtype)
    if kernel != "cpu":
        for name in ("q", "k", "v", "pk", "pv"):
            setattr(c, name, getattr(c, name).to("meta"))
    with Seen() as seen:
        out, lse = op.prefix_attention(*c.args())
        op.prefix_attention_backward(out, out, lse, *c.args())
    assert seen.size < s * s
    of = {"cpu": "flash_attention_for_cpu", "flash": "flash_attention"}.get(
        kernel, "efficient_attention"
    )
    ran = [name for name in seen.calls if "scaled_dot_product" in name]
    assert ran == [f"aten::_scaled_dot_product_{of}{way}" for way in ("", "_backward")]
    for name in ran:
        (args,) = seen.calls[name]
        schema = getattr(torch.ops.aten, name.removeprefix("aten::")).default._schema
        assert args[[a.name for a in schema.arguments].index("is_causal")] is True
        if kernel != "efficient":  # grouped heads as they are
            grouped = [t for t in args if isinstance(t, Tensor) and t.shape == c.k.shape]
            assert len(grouped) >= 2


def test_what_no_kernel_for_gpus_takes_is_joined() -> None:
    with dynamo.fake_mode():
        for d, dtype in ((36, torch.bfloat16), (64, torch.float64), (512, torch.bfloat16)):
            q = torch.empty(1, 2, 3, d, dtype=dtype, device="cuda")
            assert f"heads of {d}" in (op.why_joined(q, q, q, None, False, 0.0) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", GPU, ids=[f"{c[-2]} {c[-1]} {c[2]}" for c in GPU])
def test_on_a_gpu(case: Any, mask: str) -> None:
    """Forward and backward, whatever kernel takes the own part."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    *shape, _, _ = case
    c = on("cuda", *shape, mask)
    cpu = on("cpu", *shape, mask)
    c.bias = None if cpu.bias is None else cpu.bias.cuda()
    out, lse = torch.ops.peftfx.prefix_attention(*c.args())
    assert relative(out.cpu(), reference(cpu)) < BOUND[c.q.dtype]
    assert lse.isfinite().all()
    expected = with_grads(cpu, lambda *_: reference(cpu))
    found = with_grads(c, torch.ops.peftfx.prefix_attention)
    for a, b in zip(found, expected, strict=True):
        assert relative(a.cpu(), b) < 2 * BOUND[c.q.dtype]


def test_a_prefix_is_no_key_at_first() -> None:
    """A prefix of zeros is not the base: its keys take a share of every row."""
    c = Case()
    c.pk, c.pv = torch.zeros_like(c.pk), torch.zeros_like(c.pv)
    out, _ = torch.ops.peftfx.prefix_attention(*c.args())
    plain = torch.nn.functional.scaled_dot_product_attention(
        c.q, c.k, c.v, scale=c.scale, enable_gqa=True
    )
    assert relative(out, plain) > 1e-2


def test_vmap_folds_into_the_batch() -> None:
    c = Case(mask="causal")
    rest = c.args()[3:]
    many = [torch.stack([t, t * 0.5]) for t in (c.q, c.k, c.v)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.peftfx.prefix_attention(q, k, v, *rest)[0]

    expected = torch.stack([run(*(t[i] for t in many)) for i in range(2)])
    assert torch.allclose(torch.vmap(run)(*many), expected)
