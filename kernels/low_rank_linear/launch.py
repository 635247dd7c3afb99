"""Host side of the kernels: what is allocated, the grids, the order of the launches.

Every size may be symbolic and nothing here asks for its value. What is chosen by a size (tiles, the
number of parts) is chosen by its hint, and every choice is right for every size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftfx import dynamo
from peftfx.kernels.low_rank_linear.configs import Shape
from peftfx.kernels.low_rank_linear.runner import (
    DEPTH,
    KEEP,
    POLLS,
    STEP_R,
    Drop,
    Runner,
    alike,
    block_r,
    cdiv,
    columns,
    dropping,
    joined,
    kernels,
    matrix,
    one_launch,
    precision,
    shift,
    thin_r,
    three,
)


def forward(
    run: Runner,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    lora_biases: Sequence[Tensor | None],
    scales: Sequence[Tensor],
    drop: Drop = KEEP,
    base: Tensor | None = None,
    S: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Outputs of up to three sites on one x, and S; with *base* and no weights, that y plus one's.

    One launch where few rows make it worth it, else two: S, then all outputs. One where *S* is
    given, which makes A needless.
    """
    rows, ranks, weights = run.matrix(x), [b.shape[1] for b in B], alike(weights)
    outs, R = [b.shape[0] for b in B], sum(ranks)
    M, K, count = rows.shape[0], rows.shape[1], len(B)
    shape = Shape(dynamo.hint(M), K, sum(outs), R, x.dtype, count, drop.seed is not None)
    s = x.new_empty((*x.shape[:-1], R)) if S is None else matrix(S)
    ys = [x.new_empty((*x.shape[:-1], n)) for n in outs]
    shifts = [
        shift(b, low, scale, x.dtype)
        for b, low, scale in zip(biases, lora_biases, scales, strict=True)
    ]
    has_bias = any(b is not None for b in shifts)
    filled = [x.new_zeros(n, dtype=torch.float32) if b is None else b
              for b, n in zip(shifts, outs)] if has_bias else [s] * count  # fmt: skip
    common: dict[str, Any] = {
        "M": M, "K": K, "s_row": R if S is None else s.stride(0), "HAS_BIAS": has_bias,
        "BLOCK_R": block_r(ranks, STEP_R), "PRECISION": precision(x.dtype, run.device),
    }  # fmt: skip
    few = base is None and S is None and one_launch(shape, ranks)
    if not few and S is None:
        _s(run, rows, joined(A, x.dtype), s, shape, drop)
    B = [b.contiguous() for b in B]
    if base is None and not few and run.describes("fwd", [rows, *weights], shape, outs):
        starts = [sum(ranks[:i]) for i in range(count)]
        for start, w, b, bias, scale, y in zip(starts, weights, B, filled, scales, ys):
            _described(run, rows, s[..., start:], w, b, bias, scale, y, shape, common)
        return ys, s
    shared = {
        **common, "s": s, **three("b", B), **three("bias", filled), **three("scale", scales),
        **three("y", ys), **three("N", outs), **three("R", ranks), "COUNT": count,
    }  # fmt: skip
    source = rows if base is None else run.matrix(base)
    chosen = run.config("decode" if few else "fwd" if base is None else "add", shape)
    m, n, k = chosen.block_m, chosen.block_n, chosen.block_k
    shared |= {
        "x": source, "x_row": source.stride(0), **three("w", weights or [rows]),
        "w_n": weights[0].stride(0) if weights else 0,
        "w_k": weights[0].stride(1) if weights else 0,
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "EVEN": K % k == 0, **chosen.run,
    }  # fmt: skip
    if few:
        width, tiles_m = block_r(ranks), cdiv(M, m)
        parts = min(chosen.parts or cdiv(K, DEPTH), cdiv(K, k))
        depth = cdiv(K, parts * k) * k
        parts = cdiv(K, depth)
        run(
            kernels().decode,
            ((count * parts + columns(outs, n)) * tiles_m,),
            **{**shared, "BLOCK_R": width}, **three("a", [a.contiguous() for a in A]),
            low_parts=s.new_empty((parts, M, R), dtype=torch.float32), parts=parts, depth=depth,
            count=run.counter(x), STEP=max(16, 16 * k // width), POLLS=POLLS,
        )  # fmt: skip
    else:
        grid = (columns(outs, n) * cdiv(M, m),)
        run(kernels().fwd, grid, GROUP_M=chosen.group_m, HAS_W=base is None, **shared)
    return ys, s


def _described(
    run: Runner,
    rows: Tensor,
    s: Tensor,
    w: Tensor,
    b: Tensor,
    bias: Tensor,
    scale: Tensor,
    y: Tensor,
    shape: Shape,
    common: dict[str, Any],
) -> None:
    """Fills the y of one site by the kernel with descriptors."""
    chosen = run.config("fwd_descriptor", shape)
    m, n, k = chosen.block_m, chosen.block_n, chosen.block_k
    run(
        kernels().fwd_descriptor,
        (min(cdiv(w.shape[0], n) * cdiv(rows.shape[0], m), run.device.processors),),
        x=kernels().descriptor(rows, [m, k]), s=s, w=kernels().descriptor(w, [n, k]), b=b,
        bias=bias, scale=scale, y=y, N=w.shape[0], R=b.shape[1], **common,
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=chosen.group_m, **chosen.run,
    )  # fmt: skip


def _s(run: Runner, rows: Tensor, a: Tensor, s: Tensor, shape: Shape, drop: Drop) -> None:
    """Fills S [M, R]; splits K where the rows alone do not fill the device."""
    M, K, R = rows.shape[0], rows.shape[1], shape.r
    chosen = run.config("s", shape)
    wide = thin_r([R], rows.dtype)
    programs = cdiv(shape.m, chosen.block_m) * cdiv(R, wide)
    parts = run.parts(chosen, programs, cdiv(K, chosen.block_k))
    depth = cdiv(K, parts * chosen.block_k) * chosen.block_k
    parts = cdiv(K, depth)
    out = s if parts == 1 else s.new_empty((parts, M, R), dtype=torch.float32)
    run(
        kernels().s,
        (cdiv(M, chosen.block_m), cdiv(R, wide), parts),
        x=rows, a=a, out=out, M=M, K=K, R=R, x_row=rows.stride(0), depth=depth,
        **dropping(drop, s), BLOCK_M=chosen.block_m, BLOCK_R=wide, BLOCK_K=chosen.block_k,
        EVEN=K % chosen.block_k == 0,
        PRECISION=precision(rows.dtype, run.device), **chosen.run,
    )  # fmt: skip
    if parts > 1:
        _sum(run, shape, out, [s], M * R, [(0, parts, 0, M * R, R, 0, R)])


def _sum(
    run: Runner,
    shape: Shape,
    parts: Tensor,
    outs: Sequence[Tensor],
    plane: Any,
    pieces: Sequence[tuple[Any, ...]],
) -> None:
    """Adds planes of *parts* up, into *outs*.

    A piece of them: its first plane and how many, where it starts in each and its size, its
    columns, and in the result where it starts and how far rows are apart.
    """
    first, planes, start, size, width, to, row = zip(*pieces, strict=True)
    chosen = run.config("sum", shape)
    largest = functools.reduce(torch.sym_max, size)
    run(
        kernels().sum,
        (cdiv(largest, chosen.block_m), len(outs)),
        parts=parts, **three("out", outs), plane=plane, first1=three("f", first)["f1"],
        first2=three("f", first)["f2"], **three("E", size), **three("P", planes),
        **three("C", width), **three("row", row), **three("from", start), **three("to", to),
        BLOCK=chosen.block_m, COUNT=len(outs), **chosen.run,
    )  # fmt: skip


def backward(
    run: Runner,
    dys: Sequence[Tensor],
    x: Tensor,
    S: Tensor,
    weights: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scales: Sequence[Tensor],
    mask: Sequence[bool],
    drop: Drop = KEEP,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dX, dA, dB of up to three sites on one x. What *mask* leaves out comes back empty."""
    need_x, need_a, need_b = mask
    rows, low, weights = run.matrix(x.to(dys[0].dtype)), matrix(S), alike(weights)
    wide = [run.matrix(dy) for dy in dys]
    A, B = [a.contiguous() for a in A], [b.contiguous() for b in B]
    ranks, outs = [a.shape[0] for a in A], [b.shape[0] for b in B]
    M, K, R, count = rows.shape[0], rows.shape[1], sum(ranks), len(A)
    shape = Shape(dynamo.hint(M), K, sum(outs), R, rows.dtype, count, drop.seed is not None)
    das, dbs = [torch.empty_like(a) for a in A], [torch.empty_like(b) for b in B]
    ds = rows.new_empty((M, R))
    _ds_db(run, wide, low, B, scales, ds, dbs, shape)
    if need_a:
        _da(run, rows, ds, das, shape, drop)
    dx = x.new_empty(x.shape if need_x else 0)
    if need_x:
        _dx(run, wide, rows, ds, weights, joined(A, rows.dtype), dx, shape, drop)
    empty = x.new_empty(0)
    return (
        dx,
        das if need_a else [empty.to(a.dtype) for a in A],
        dbs if need_b else [empty.to(b.dtype) for b in B],
    )


def _dx(
    run: Runner,
    wide: Sequence[Tensor],
    rows: Tensor,
    ds: Tensor,
    weights: Sequence[Tensor],
    a: Tensor,
    dx: Tensor,
    shape: Shape,
    drop: Drop,
) -> None:
    """Fills dX [M, K]."""
    M, R, K = ds.shape[0], ds.shape[1], a.shape[1]
    outs = [dy.shape[1] for dy in wide]
    described = bool(weights) and run.describes("dx", [*wide, *weights], shape, [K])
    name = "dx_descriptor" if described else "dx" if weights else "add"
    chosen = run.config(name, shape)
    m, n, k = chosen.block_m, chosen.block_n, chosen.block_k
    tiles = cdiv(M, m) * cdiv(K, n)
    shared: dict[str, Any] = {
        "ds": ds, "a": a, "dx": dx, "M": M, "K": K, **three("N", outs), "R": R, "ds_row": R,
        **dropping(drop, ds), "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k,
        "BLOCK_R": block_r([R], STEP_R), "GROUP_M": chosen.group_m, "COUNT": len(wide),
        "PRECISION": precision(dx.dtype, run.device), **chosen.run,
    }  # fmt: skip
    if described:
        left = three("dy", [kernels().descriptor(dy, [m, k]) for dy in wide])
        right = three("w", [kernels().descriptor(w, [k, n]) for w in weights])
        grid = (min(tiles, run.device.processors),)
        run(kernels().dx_descriptor, grid, **left, **right, **shared)
        return
    w = weights or [ds]
    run(
        kernels().dx,
        (tiles,),
        **three("dy", wide), **three("w", w), **three("dy_row", [t.stride(0) for t in wide]),
        w_n=w[0].stride(0), w_k=w[0].stride(1), HAS_W=bool(weights),
        EVEN=all(n % chosen.block_k == 0 for n in outs), **shared,
    )  # fmt: skip


def _ds_db(
    run: Runner,
    wide: Sequence[Tensor],
    low: Tensor,
    B: Sequence[Tensor],
    scales: Sequence[Tensor],
    ds: Tensor,
    dbs: Sequence[Tensor],
    shape: Shape,
) -> None:
    """Fills dS [M, ΣR] and every dB, of one pass over each dY."""
    M, R = ds.shape
    ranks, outs = [b.shape[1] for b in B], [b.shape[0] for b in B]
    chosen = run.config("dsb", shape)
    thin, most = thin_r(ranks, ds.dtype), max(ranks)
    tiles = [cdiv(n, chosen.block_n) for n in outs]
    parts = run.parts(chosen, sum(tiles) * cdiv(most, thin), max(1, shape.m // chosen.block_m))
    depth = cdiv(M, parts * chosen.block_m) * chosen.block_m
    sizes = [n * r for n, r in zip(outs, ranks, strict=True)]
    planes_s = ds.new_empty((sum(tiles), M, most), dtype=torch.float32)
    planes_b = ds.new_empty((parts, sum(sizes)), dtype=torch.float32)
    run(
        kernels().dsb,
        (sum(tiles), parts, cdiv(most, thin)),
        **three("dy", wide), s=low, **three("b", B), **three("scale", scales), ds=planes_s,
        db=planes_b, M=M, **three("N", outs), **three("R", ranks),
        **three("dy_row", [t.stride(0) for t in wide]), s_row=low.stride(0), ds_plane=M * most,
        db_plane=sum(sizes), depth=depth, BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n,
        BLOCK_R=thin, COUNT=len(B), PRECISION=precision(ds.dtype, run.device), **chosen.run,
    )  # fmt: skip
    first, column, pieces = 0, 0, []
    for count, r in zip(tiles, ranks, strict=True):
        pieces.append((first, count, 0, M * r, r, column, R))
        first, column = first + count, column + r
    _sum(run, shape, planes_s, [ds] * len(B), M * most, pieces)
    pieces = [(0, parts, sum(sizes[:i]), size, size, 0, size) for i, size in enumerate(sizes)]
    _sum(run, shape, planes_b, dbs, sum(sizes), pieces)


def _da(
    run: Runner, rows: Tensor, ds: Tensor, das: Sequence[Tensor], shape: Shape, drop: Drop
) -> None:
    """Fills every dA [R, K], of one pass over x."""
    M, K, R = rows.shape[0], rows.shape[1], ds.shape[1]
    chosen = run.config("da", shape)
    thin = thin_r([R], rows.dtype)
    programs = cdiv(K, chosen.block_k) * cdiv(R, thin)
    parts = run.parts(chosen, programs, max(1, shape.m // chosen.block_m))
    depth = cdiv(M, parts * chosen.block_m) * chosen.block_m
    planes = ds.new_empty((parts, R, K), dtype=torch.float32)
    run(
        kernels().da,
        (cdiv(K, chosen.block_k), parts, cdiv(R, thin)),
        x=rows, ds=ds, da=planes, M=M, K=K, R=R, x_row=rows.stride(0), ds_row=R, depth=depth,
        **dropping(drop, ds), BLOCK_M=chosen.block_m, BLOCK_K=chosen.block_k, BLOCK_R=thin,
        PRECISION=precision(rows.dtype, run.device), **chosen.run,
    )  # fmt: skip
    ranks = [da.shape[0] for da in das]
    pieces = [(0, parts, sum(ranks[:i]) * K, r * K, K, 0, K) for i, r in enumerate(ranks)]
    _sum(run, shape, planes, das, R * K, pieces)
