"""``peftfx::sparse_add``: what a linear computes, plus a sparse update of its weight.

    y + x·ΔWᵀ,   ΔW zero but at n chosen places

``y [..., N]``, ``x [..., K]``, ``values [n]``, ``index [n]`` int64: ``row * K + column`` of each
value, strictly increasing, and ``order [n]`` int64 what puts those places into the order of columns
(:func:`by_columns`), in which the backward sums. ΔW is never dense: the forward is a product with a
sparse matrix, and the backward computes the gradient at the n places alone. Products are in fp32 at
least; the result has the dtype of y.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from peftfx.kernels.definition import define
from peftfx.kernels.devices import why_plain

_library = torch.library.Library("peftfx", "FRAGMENT")
SCHEMAS = {
    "sparse_add": "(Tensor y, Tensor x, Tensor values, Tensor index, Tensor order) -> Tensor",
    "sparse_add_backward": "(Tensor dy, Tensor x, Tensor values, Tensor index, Tensor order,"
    " bool[] mask) -> (Tensor, Tensor)",
}
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

with warnings.catch_warnings():  # torch says once that sparse CSR is in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), [], (1, 1))

CHUNK = 2**22  # elements that the gathered form holds at once


def turned(index: Tensor, n: int, k: int) -> Tensor:
    """The places in ΔWᵀ: ``column * N + row``."""
    return index % k * n + index // k


def by_columns(index: Tensor, n: int, k: int) -> Tensor:
    """What puts the places *index* of a matrix [N, K] into the order of its columns."""
    return turned(index, n, k).argsort()


def sparse_add(y: Tensor, x: Tensor, values: Tensor, index: Tensor, order: Tensor) -> Tensor:
    """``y + x·ΔWᵀ``."""
    return _added(y, x, values, index)


def _added(y: Tensor, x: Tensor, values: Tensor, index: Tensor, spare: bool = False) -> Tensor:
    """``y + x·ΔWᵀ``, in y's own memory where that is to *spare*."""
    n, k = y.shape[-1], x.shape[-1]
    rows, flat = y.reshape(-1, n), x.reshape(-1, k)
    dtype, dense = torch.promote_types(x.dtype, torch.float32), torch.contiguous_format
    if index.numel() == 0 or flat.numel() == 0:
        return y.clone(memory_format=dense)
    if why_plain(y) is None:
        return _kernels().added(rows, flat, values, index).reshape(y.shape)  # type: ignore
    out = rows.to(dtype, copy=not spare, memory_format=dense)
    if products(flat.device):  # in place, by columns of outᵀ: no product of its own to be added
        update = matrix(values.to(dtype), index, n, k)
        out.t().addmm_(update, flat.to(dtype, memory_format=dense).t())
    else:
        gather(out, flat.to(dtype), values.to(dtype), index)
    return out.to(y.dtype).reshape(y.shape)


def sparse_add_backward(
    dy: Tensor, x: Tensor, values: Tensor, index: Tensor, order: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """dX and dvalues. What *mask* leaves out comes back empty."""
    n, k = dy.shape[-1], x.shape[-1]
    dtype = torch.promote_types(dy.dtype, torch.float32)
    dx, dv = x.new_empty(0), values.new_empty(0)
    if mask[0]:
        dx = x.new_zeros(x.shape, dtype=dtype)
        places = turned(index[order], n, k)
        dx = _added(dx, dy, values[order], places, spare=True).to(x.dtype)
    if mask[1]:
        rows, flat = dy.reshape(-1, n), x.reshape(-1, k)
        if index.numel() == 0 or rows.numel() == 0:
            dv = torch.zeros_like(values)
        elif why_plain(dy) is None:
            dv = _kernels().sampled(rows, flat, index, values.dtype)
        elif products(rows.device):
            empty = matrix(torch.zeros_like(values, dtype=dtype), index, n, k)
            rows, flat = rows.to(dtype), flat.to(dtype)
            dv = torch.sparse.sampled_addmm(empty, rows.t(), flat, beta=0.0).values()
        else:
            dv = sampled(rows.to(dtype), flat.to(dtype), index)
        dv = dv.to(values.dtype)
    return dx, dv


def _kernels() -> Any:
    from peftfx.kernels.sparse_add import triton

    return triton


def products(device: torch.device) -> bool:
    """Whether torch has products with sparse matrices there; on a CPU they are MKL's."""
    return device.type != "cpu" or torch.backends.mkl.is_available()


def matrix(values: Tensor, index: Tensor, n: int, k: int) -> Tensor:
    """ΔW [N, K] as a sparse matrix in rows."""
    starts = torch.arange(n + 1, device=index.device, dtype=index.dtype) * k
    return torch.sparse_csr_tensor(
        torch.searchsorted(index, starts), index % k, values, (n, k), check_invariants=False
    )


def gather(out: Tensor, x: Tensor, values: Tensor, index: Tensor) -> None:
    """Adds ``x·ΔWᵀ`` to *out* by gathering columns, a bounded number at once."""
    k, step = x.shape[1], max(CHUNK // x.shape[0], 1)
    for part, v in zip(index.split(step), values.split(step), strict=True):
        out.index_add_(1, part // k, x[:, part % k] * v)


def gathered_add(y: Tensor, x: Tensor, values: Tensor, index: Tensor, order: Tensor) -> Tensor:
    """``y + x·ΔWᵀ`` in one gathering that torch can transform and differentiate again."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    k, wide = x.shape[-1], y.to(dtype)
    return wide.index_add(-1, index // k, x[..., index % k].to(dtype) * values.to(dtype)).to(
        y.dtype
    )


def sampled(dy: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """``dYᵀ·X`` at the places of *index*, by gathering columns, a bounded number at once."""
    k, step = x.shape[1], max(CHUNK // x.shape[0], 1)
    return torch.cat([(dy[:, i // k] * x[:, i % k]).sum(0) for i in index.split(step)])


def _fake(y: Tensor, x: Tensor, values: Tensor, index: Tensor, order: Tensor) -> Tensor:
    return y.new_empty(y.shape)


def _fake_backward(
    dy: Tensor, x: Tensor, values: Tensor, index: Tensor, order: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape if mask[0] else 0)
    return dx, torch.empty_like(values) if mask[1] else values.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, values, index, order = ctx.saved_tensors
    mask = [bool(n) for n in ctx.needs_input_grad[1:3]]
    dx, dv = torch.ops.peftfx.sparse_add_backward(dy, x, values, index, order, mask)
    return dy, dx if mask[0] else None, dv if mask[1] else None, None, None


define(_library, "sparse_add", sparse_add, plain=gathered_add)
define(_library, "sparse_add_backward", sparse_add_backward)
torch.library.register_fake("peftfx::sparse_add", _fake, lib=_library)
torch.library.register_fake("peftfx::sparse_add_backward", _fake_backward, lib=_library)
torch.library.register_autograd("peftfx::sparse_add", _backward, setup_context=_setup, lib=_library)
