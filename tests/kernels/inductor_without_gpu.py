"""Inductor's code for a GPU, made on a machine that has none: ``python -m … FORM …``.

Prints JSON for each form (``triton``, ``opaque``, ``accumulate``): what the lowering chose, the
kernels in the code, and what other sizes of M would have to hold. Nothing is run. ``triton:few`` is
the forward of 8 rows, ``triton:loops`` ops between loops of Inductor's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from peftfx import dynamo
from peftfx.kernels.devices import assume
from peftfx.passes.claims import INDUCTOR_CLAIMS
from peftfx.passes.lower import LowerPass

OPS = torch.ops.peftfx


def pretend() -> None:
    """Lets Inductor and Triton believe in an H200."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        types.SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
    )
    properties = types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, warp_size=32, regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, gcnArchName="",
        shared_memory_per_block_optin=232_448, total_memory=1 << 37, name="NVIDIA H200",
    )  # fmt: skip
    for owner in (CudaInterface, CudaInterface.Worker):
        owner.get_device_properties = staticmethod(lambda device=None: properties)
    CudaInterface.get_compute_capability = staticmethod(lambda device=None: 90)
    CudaInterface.is_available = staticmethod(lambda: True)
    CudaInterface.current_device = staticmethod(lambda: 0)
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.current_device = lambda: 0
    # a build without CUDA refuses to copy even what is fake
    dynamo.in_memory().prim_meta_impl = lambda t, strides: torch.empty_like(t)
    torch._decomp.decomposition_table[torch.ops.aten.addmm_.default] = lambda y, *rest: y


def both_directions(
    x: Any, w: list[Any], a: list[Any], b: list[Any], scale: Any, seed: Any, dy: Any, *_: Any
) -> Any:
    """One site with dropout, and a group of three; forward and backward."""
    y, s = OPS.low_rank_linear(x, w[0], None, a[0], b[0], None, scale, seed, 0.1, 2)
    mask = [True, True, True]
    one = OPS.low_rank_backward(dy, x, s, w[0], a[0], b[0], scale, seed, 0.1, 2, mask)
    none, scales = [None] * 3, [scale] * 3
    ys, t = OPS.low_rank_linear_group(x, w, none, a, b, none, scales)
    many = OPS.low_rank_group_backward(ys, x, t, w, a, b, scales, mask)
    return torch.utils._pytree.tree_leaves((y, one, ys, many))


def forward_twice(x: Any, w: list[Any], a: list[Any], b: list[Any], scale: Any, *_: Any) -> Any:
    """A group of three, and one site."""
    none, scales = [None] * 3, [scale] * 3
    ys, _ = OPS.low_rank_linear_group(x, w, none, a, b, none, scales)
    return [*ys, OPS.low_rank_linear(x, w[0], None, a[0], b[0], None, scale, None, 0.0, 2)[0]]


def between_loops(x: Any, w: list[Any], a: list[Any], b: list[Any], scale: Any, *rest: Any) -> Any:
    """Loops make what a group reads, and what its backward does, and read what they give."""
    w, a, b, none, scales = w[1:], a[1:], b[1:], [None] * 2, [scale] * 2
    relu, neg, mul = (getattr(torch.ops.aten, n) for n in ("relu", "neg", "mul"))
    h, other = relu(x), rest[-1]
    ys, s = OPS.low_rank_linear_group(h, w, none, a, b, none, scales)
    dys = [mul(y, 2.0) for y in ys]
    dx, *factors = OPS.low_rank_group_backward(dys, neg(other), s, w, a, b, scales, [True] * 3)
    return torch.utils._pytree.tree_leaves((mul(h, 3.0), mul(dx, other), factors))


KINDS = {"": both_directions, "few": forward_twice, "loops": between_loops}


def compile_sources(code: str) -> dict[str, str]:
    """Compiles the first of each of our kernels from the source that Inductor wrote out."""
    import triton
    from torch._inductor.runtime import triton_heuristics
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    metas: list[tuple[Any, Any]] = []

    def note(*, configs: Any, triton_meta: Any, **rest: Any) -> Any:
        metas.append((configs[0], triton_meta))
        return lambda fn: fn

    triton_heuristics.user_autotune = note
    found: dict[str, str] = {}
    pattern = re.compile(r"triton\('(low_rank_\w+)', '''(.*?)'''", re.DOTALL)
    with tempfile.TemporaryDirectory() as directory:
        for name, source in pattern.findall(code):
            if name in found:
                continue
            path = Path(directory) / f"{name}.py"
            path.write_text(source)
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            options, meta = metas[-1]
            names = list(meta["signature"])
            constants = {(names.index(k),): v for k, v in meta["constants"].items()}
            made = triton.compile(
                ASTSource(getattr(module, name), meta["signature"], constants, meta["configs"][0]),
                target=GPUTarget("cuda", 90, 32), options=options,
            )  # fmt: skip
            found[name] = "wgmma" if "wgmma" in made.asm["ptx"] else "other"
    return found


def inputs(mode: FakeTensorMode, rows: Any) -> list[Any]:
    """x [M, 256], weights of three sites, their factors, a scale, a seed, a dY, another x.

    M is *rows*, or free.
    """

    def fixed(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Any:
        return torch.empty(shape, dtype=dtype, device="cuda")

    sizes = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    like = torch.empty(2048, 1, device="meta")
    rows = rows or mode.from_tensor(like, symbolic_context=sizes).shape[0]
    outs, wide = (512, 128, 128), torch.float32
    with mode:
        return [
            fixed(rows, 256),
            [fixed(n, 256) for n in outs],
            [fixed(16, 256, dtype=wide) for _ in outs],
            [fixed(n, 16, dtype=wide) for n in outs],
            fixed(1, dtype=wide),
            fixed(dtype=torch.int64),
            fixed(rows, outs[0]),
            fixed(rows, 256),
        ]


def lowered(form: str) -> dict[str, Any]:
    """The code that Inductor makes with every op in *form*."""
    os.environ["PEFTFX_FORMS"], _, kind = form.partition(":")
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    flat, tree = torch.utils._pytree.tree_flatten(inputs(mode, 8 if kind == "few" else None))

    def run(*tensors: Any) -> Any:
        return KINDS[kind](*torch.utils._pytree.tree_unflatten(tensors, tree))

    with mode, assume("NVIDIA H200"), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        gm = make_fx(run, tracing_mode="symbolic")(*flat)
        guards = len(env.guards)
        lower = LowerPass(INDUCTOR_CLAIMS, inductor=True)
        with config.patch(post_grad_custom_pre_pass=lower, compile_threads=1, fx_graph_cache=False):
            post_grad_passes(gm, is_inference=True)
            graph = GraphLowering(gm, example_inputs=flat, shape_env=env)
            with V.set_graph_handler(graph):
                graph.run(*flat)
                code = graph.codegen()[0].value
    return {
        "claims": sorted({c.claim for c in lower.choices}),
        "choices": [str(c) for c in lower.choices],
        "launches": re.findall(r"(low_rank_linear_\w+?_kernel)_\d+\.run\(", code),
        "arguments": [  # of each launch and loop, in order
            (name, re.sub(r"reinterpret_tensor\((\w+), .*?\), \d+\)", r"\1", given).split(", "))
            for name, given in re.findall(r"(\w+?)\.run\((.*)\)", code)
        ],
        "counters": re.findall(r"reinterpret_tensor\(\w+, \(4, \), \(1, \), \d+\)", code),
        "library": sorted(set(re.findall(r"extern_kernels\.(\w+)\(", code))),
        "in_place": len(re.findall(r"torch\.ops\.aten\.addmm_\.default\(", code)),
        "ops": sorted(set(re.findall(r"torch\.ops\.peftfx\.(\w+)\.default\(", code))),
        "compiled": compile_sources(code) if form.startswith("triton") else {},
        "no_cuda_graph": graph.disable_cudagraphs_reason,
        "guards": [str(g.expr) for g in env.guards[guards:]],
    }


if __name__ == "__main__":
    pretend()
    print(json.dumps({form: lowered(form) for form in sys.argv[1:]}))
