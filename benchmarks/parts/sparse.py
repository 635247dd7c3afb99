"""A linear with a sparse update of its weight, 0.5 % of its entries or of its rows or columns, in
bfloat16 on a GPU and float32 on a CPU: forward, and backward to x and the values. `peftfx` is
its op, or small dense products for rows and columns; `dense` scatters the update into a
matrix as large as the weight and multiplies by that. `frozen` is the linear alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Measure, Row, Setting
from benchmarks.verify import gate
from peftfx.kernels.sparse_add.op import by_columns
from peftfx.kernels.timing import Run
from peftfx.methods.method import Call
from peftfx.methods.sparse import Sparse
from peftfx.site import Site

TARGET = "≤1.10 of frozen"
DEVICES = ("cuda", "cpu")
DENSITY = 0.005


def cases(setting: Setting) -> Mapping[str, Measure]:
    m, k, n = (8192, 4096, 4096) if setting.gpu else (512, 768, 768)
    if setting.tiny:
        m, k, n = 8, 40, 24
    return {
        f"{kind}s, {m}×{k}×{n}": functools.partial(_row, setting, kind, m, k, n)
        for kind in ("element", "row", "column")
    }


def _row(setting: Setting, kind: str, m: int, k: int, n: int) -> list[Row]:
    g = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if setting.gpu else torch.float32

    def made(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=g).to(setting.device, of)

    x, weight, dy = made(m, k).requires_grad_(), made(n, k) / k**0.5, made(m, n)
    total = {"element": n * k, "row": n, "column": k}[kind]
    kept = max(round(DENSITY * total), 1)
    index = torch.randperm(total, generator=g)[:kept].sort().values.to(setting.device)
    shape = {"element": (kept,), "row": (kept, k), "column": (n, kept)}[kind]
    values = (made(*shape, of=torch.float32) / k**0.5).requires_grad_()
    held = torch.stack([index, by_columns(index, n, k)]) if kind == "element" else index
    method = Sparse(structure=kind)  # type: ignore[arg-type]
    call = Call(Site("", "weight", "linear", (n, k)), training=True)

    def ours() -> Tensor:
        y = F.linear(x, weight)
        return method.apply(y, x, {"values": values, "index": held}, call)

    def dense() -> Tensor:
        blank = torch.zeros(n, k, device=x.device)
        if kind == "element":
            update = blank.reshape(-1).index_copy(0, index, values).reshape(n, k)
        else:
            update = blank.index_copy(0 if kind == "row" else 1, index, values)
        return F.linear(x, weight) + F.linear(x, update.to(dtype))

    forms: dict[str, Callable[[], Tensor]] = {"peftfx": ours, "dense": dense}
    wanted = _step(dense, [x, values], dy)
    errors = {name: gate(name, _step(f, [x, values], dy), wanted) for name, f in forms.items()}
    runs: dict[str, Run] = {"frozen": lambda: _step(lambda: F.linear(x, weight), [x], dy)}
    runs |= {name: functools.partial(_step, form, [x, values], dy) for name, form in forms.items()}
    taken, spread = setting.measure(runs, capture=False)
    return [Row(f"{kind}s, {m}×{k}×{n}", taken, errors=errors, spread=spread)]


def _step(form: Callable[[], Tensor], leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    y = form()
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]
