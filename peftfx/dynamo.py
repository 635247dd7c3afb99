"""The joints with torch that lean on private names: all of them, in one place.

Tested on every supported version (2.11, 2.13, 2.15). Where a name is missing, what needs it raises
an error that points to the public way: ``backend.bind(model)`` before the first call.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, Protocol

import torch
import torch._dynamo
from torch import fx, nn
from torch._dynamo import exc
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils.hooks import RemovableHandle

from peftfx.errors import BindError, PeftfxError

Compiled = Callable[..., Any]


@dataclass(frozen=True)
class Root:
    """The module that a compile belongs to, and what it was called with."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def guard_hooks() -> None:
    """Makes Dynamo guard on hooks, process-wide. Called before anything is compiled by us.

    By default it skips guards on empty hook lists: a graph compiled for a base model would then
    serve an adapted one. Whatever was compiled before the switch lacks the guards, so it is
    dropped, once; it compiles again at its next call.
    """
    if torch._dynamo.config.skip_nnmodule_hook_guards:
        keep_guarding_hooks()
        if torch._dynamo.utils.compilation_time_metrics:
            torch._dynamo.reset()


def keep_guarding_hooks() -> None:
    """The same inside a compile, whose guards are built when the backend has returned."""
    torch._dynamo.config.skip_nnmodule_hook_guards = False


def root() -> Root | None:
    """The module whose compile is going on, None where a bare function is compiled.

    The traced frame's own ``self`` can be a submodule after a graph break, so the Python stack is
    asked for the call that entered the compiler.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and "callback" in frame.f_locals:
            return _entered(frame)
        frame = frame.f_back
    return None


def _entered(frame: FrameType) -> Root | None:
    args = frame.f_locals.get("args", ())
    kwargs = frame.f_locals.get("kwargs", {})
    fn = frame.f_locals.get("fn")
    if getattr(fn, "__globals__", {}).get("__name__") == "torch._dynamo.external_utils":
        fn = getattr(fn, "__wrapped__", None)  # 2.15: a frame around modules of torch's own
    target = getattr(fn, "__self__", None)
    if isinstance(target, nn.Module):
        return Root(target, args, kwargs)
    caller = frame.f_back
    for _ in range(4):
        if caller is None:
            break
        owner = caller.f_locals.get("self")
        if isinstance(owner, OptimizedModule):
            return Root(owner._orig_mod, args, kwargs)
        caller = caller.f_back
    return None


class _Retrace(exc.TensorifyScalarRestartAnalysis):
    """Lets a backend ask for another trace: Dynamo passes this kind through and starts again."""


def retrace() -> NoReturn:
    """Called by a backend that changed the model: abandons this graph, Dynamo traces again.

    Raises:
        BindError: the way in is gone in this version of torch.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        tracer = getattr(frame.f_locals.get("self"), "root_tx", None)
        log = getattr(tracer, "speculation_log", None)
        if log is not None:
            log.clear()  # what was speculated about the unmarked frame no longer holds
            raise _Retrace(restart_reason="peftfx bound the model")
        frame = frame.f_back
    raise BindError(
        "this version of torch does not let a backend ask for a new trace",
        remedy="call backend.bind(model) before the first call",
    )


def surface(error: PeftfxError) -> Exception:
    """*error* in a form that leaves a compile as itself instead of as BackendCompilerFailed."""
    cls = type(error)
    kind = _surfacing.get(cls)
    if kind is None:
        kind = _surfacing[cls] = type(cls.__name__, (cls, exc.ShortenTraceback), {})
    raised = kind(
        error.message, where=error.where, site=error.site, remedy=error.remedy
    ).with_traceback(error.__traceback__)
    raised.first_useful_frame = None
    return raised


_surfacing: dict[type[PeftfxError], type[Any]] = {}


def remove_global(hook: RemovableHandle) -> None:
    """Takes off a forward hook of all modules, and that it asked for keyword arguments.

    torch forgets the latter, and warns from then on of hooks on all modules where one is compiled.
    """
    hook.remove()
    nn.modules.module._global_forward_hooks_with_kwargs.pop(hook.id, None)


def compile_options(**wanted: Any) -> dict[str, Any]:
    """Those of *wanted* that this version's ``torch.compile`` takes."""
    known = inspect.signature(torch.compile).parameters
    return {name: value for name, value in wanted.items() if name in known}


def transforming() -> bool:
    """Whether a transform of ``torch.func`` is at work: ``grad``, ``vmap``, ``jvp`` and so on."""
    return bool(torch._C._are_functorch_transforms_active())


def summed(wrapper: Any) -> list[torch.Tensor]:
    """The parameters whose gradients a DDP sums between processes."""
    return list(getattr(wrapper, "_module_parameters", ()))


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Inside the block, modules compiled in place run as if they were not."""
    held = [m for m in model.modules() if m._compiled_call_impl is not None]
    kept = [m._compiled_call_impl for m in held]
    for m in held:
        m._compiled_call_impl = None
    try:
        yield
    finally:
        for m, impl in zip(held, kept, strict=True):
            m._compiled_call_impl = impl


@contextmanager
def effects_in_checkpoints() -> Iterator[None]:
    """Inside the block, graphs are traced whose checkpointed parts have side effects.

    Those of the first run alone: when it is run again for the backward, they are left out.
    """
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        yield


def allow_effects_in_checkpoints() -> None:
    """The same from now on, process-wide: hooks in checkpointed parts of a model have some."""
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


class GraphPass(Protocol):
    """A change of a graph of AOTAutograd's, and what identifies it to a compiler's cache."""

    def __call__(self, graph: fx.Graph) -> None: ...

    def uuid(self) -> str: ...


def compile_inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    lower: GraphPass,
    mode: str | None,
    options: dict[str, Any] | None,
    joint: GraphPass | None = None,
) -> Compiled:
    """Inductor on *gm*, with *joint* on the joint graph and *lower* on the partitioned ones."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Known(CustomGraphPass):  # with it, what was compiled is cached on disk
        def __init__(self, change: GraphPass) -> None:
            self.change = change

        def __call__(self, graph: fx.Graph) -> None:
            self.change(graph)

        def uuid(self) -> Any:
            return self.change.uuid()

    patches: dict[str, Any] = dict(list_mode_options(mode)) if mode and mode != "default" else {}
    patches.update(options or {})
    if joint is not None:
        patches["joint_custom_post_pass"] = Known(joint)
    patches["post_grad_custom_pre_pass"] = Known(lower)
    _leave_alone(torch.ops.aten.addmm_.default)
    compiled: Any = compile_fx(gm, list(inputs), config_patches=patches)
    return compiled  # type: ignore[no-any-return]


def _leave_alone(op: Any) -> None:
    """Makes Inductor call *op* on tensors as they lie.

    It would find that out by itself, but would copy into other strides what a backward gives to
    *op*, and refuses to where the environment has ``CI``.
    """
    from torch._inductor.lowering import constrain_to_fx_strides, lowerings, make_fallback

    if op not in lowerings:
        make_fallback(op, constrain_to_fx_strides, warn=False)


def run_eagerly(gm: fx.GraphModule) -> Compiled:
    """*gm* as it is. Its checkpoints recompute with the random numbers of the first time.

    torch's own operator for them does not, as long as no compiler is behind it.
    """
    operator = torch.ops.higher_order.tag_activation_checkpoint
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(op="call_function", target=operator):
                node.target = _checkpoint
            module.recompile()
    return gm.forward


def _checkpoint(body: fx.GraphModule, *operands: Any, **options: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    options |= {"use_reentrant": False, "preserve_rng_state": True}
    if "_checkpoint_context_fn" in body.meta:  # what to recompute was chosen by the user
        options["context_fn"] = body.meta["_checkpoint_context_fn"]
    return checkpoint(body, *operands, **options)


def compile_aot(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    lower: Callable[[fx.Graph], None],
    joint: Callable[[fx.Graph], None] | None = None,
    table: Mapping[Any, Callable[..., Any]] | None = None,
) -> Compiled:
    """AOTAutograd on *gm*, with the same passes; its graphs run eagerly.

    Args:
        table: decompositions; none by default.
    """
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def compiler(graph: fx.GraphModule, _: Sequence[Any]) -> Compiled:
        lower(graph.graph)
        graph.recompile()
        boxed: Compiled = make_boxed_func(graph.forward)
        return boxed

    def partition(graph: fx.GraphModule, *args: Any, **options: Any) -> Any:
        if joint is not None:
            joint(graph.graph)
        return min_cut_rematerialization_partition(graph, *args, **options)

    how = {"fw_compiler": compiler, "partition_fn": partition, "decompositions": table}
    compiled: Compiled = aot_autograd(**how)(gm, list(inputs))
    return compiled


def without_autocast(nodes: Sequence[fx.Node], device: str) -> None:
    """Makes *nodes*, which follow each other in a graph, run outside of autocast."""
    graph = nodes[0].graph
    with graph.inserting_before(nodes[0]):
        mode = graph.call_function(
            torch.amp.autocast_mode._enter_autocast, (device, None, False, None)
        )
    with graph.inserting_after(nodes[-1]):
        graph.call_function(torch.amp.autocast_mode._exit_autocast, (mode,))


def under_autocast(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether *gm*, or a part of it or of a graph nested in it, is to run under autocast."""
    enter = torch.amp.autocast_mode._enter_autocast
    devices = {t.device.type for t in inputs if isinstance(t, torch.Tensor)}
    if any(torch.is_autocast_enabled(d) for d in devices - {"meta"}):
        return True
    return any(
        True
        for m in gm.modules()
        if isinstance(m, fx.GraphModule)
        for _ in m.graph.find_nodes(op="call_function", target=enter)
    )


def fake_mode() -> Any:
    """A fake-tensor mode that takes real parameters beside fake inputs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def real_tensors() -> Iterator[None]:
    """Inside the block, tensors are real and no trace records, while a compile is going on."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.no_grad():
        yield


@contextmanager
def quiet_fakes() -> Iterator[None]:
    """Inside the block, torch does not log fake kernels that fail: the caller has another way."""
    name = logging.getLogger("torch._subclasses.fake_tensor")
    level = name.level
    name.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        name.setLevel(level)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The decompositions that Inductor expects to have been done in the graphs it is given."""
    from torch._inductor.decomposition import select_decomp_table

    table: dict[Any, Callable[..., Any]] = select_decomp_table()
    return table


def surely_equal(a: Any, b: Any) -> bool:
    """Whether two sizes, symbolic or not, are known to be equal; asks without guarding."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def fake_value(node: fx.Node) -> Any:
    """The fake value of a node in a graph of AOTAutograd's.

    2.11 gives none to a draw that the backward replays (``run_with_rng_state(state, op, …)``).
    """
    if "val" not in node.meta:
        _, op, *args = node.args
        values = (n.meta.get("val") for n in node.graph.nodes)
        mode = next(v.fake_mode for v in values if hasattr(v, "fake_mode"))
        with mode:
            given = fx.node.map_arg((args, node.kwargs), fake_value)
            node.meta["val"] = op(*given[0], **given[1])  # type: ignore[operator, misc]
    return node.meta["val"]


def hint(size: Any, otherwise: int = 2048) -> int:
    """A size as it was seen, if it is symbolic; asks without guarding."""
    return size if isinstance(size, int) else int(size.node.hint or otherwise)


def inductor_random(size: list[Any], key: Any) -> Any:
    """Inductor's generator, ``tl.rand(key, index)`` on every device; for its graphs alone."""
    from torch._inductor import inductor_prims

    return inductor_prims.random(size, key, "rand")


def in_memory() -> Any:
    """An op of Inductor's, given a tensor and its strides: the same tensor, written once."""
    from torch._inductor import inductor_prims

    assert inductor_prims
    return torch.ops.prims.inductor_force_stride_order.default
