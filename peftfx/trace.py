"""One run of a model on fake tensors, recorded as a dataflow graph.

No compiler takes part: torch functions are recorded as the model calls them, so that parameters
keep their identity, any Python control flow is fine and a thousand layers take a second. Roles and
the proof of the marks both read this one trace.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_structure,
    tree_unflatten,
)

from peftfx import dynamo
from peftfx.errors import TraceError
from peftfx.log import logger
from peftfx.site import SLOT

MATRIX = {
    "linear", "addmm", "matmul", "bmm", "mm", "baddbmm", "einsum", "__matmul__", "__rmatmul__",
    "_grouped_mm", "grouped_mm",
}  # fmt: skip
CONVS = {"conv1d", "conv2d", "conv3d"}
NORMS = {"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"}
PICKS = {"__getitem__", "index_select"}
CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous"}
COMPUTES = MATRIX | CONVS | NORMS | {"embedding"}
Example = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Value:
    """A tensor that an op was given.

    ``made`` says which op made it and which of the op's results it is (``(-1 - position, 0)`` for
    an input of the model), ``params`` which parameters it is, or is computed of alone; neither for
    a constant, both for weights that are picked out of a stack. ``gathered``: rows of a parameter,
    picked by a tensor of indices.
    """

    made: tuple[int, int] | None
    params: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    gathered: bool = False


@dataclass(frozen=True)
class Op:
    """One call of a torch function.

    ``args`` are the values of its tensor arguments in order: numbers of the ops that made them, or
    negative numbers for the model's inputs (-1 - position); ``params`` the parameters it read. The
    call itself is ``func`` with the arguments of ``leaves``, in which tensors are :class:`Value`s,
    laid out by ``structure``.
    """

    index: int
    name: str
    module: str
    args: tuple[int, ...]
    params: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    func: Callable[..., Any]
    leaves: tuple[Any, ...]
    structure: TreeSpec

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call, by position and by name."""
        return tree_unflatten(self.leaves, self.structure)

    def given(self, position: int, name: str, default: Any = None) -> Any:
        """An argument of the call, by its position or its name."""
        args, kwargs = self.arguments
        return args[position] if position < len(args) else kwargs.get(name, default)

    @property
    def values(self) -> list[Value]:
        """The tensors among the arguments."""
        return [v for v in self.leaves if isinstance(v, Value)]

    @property
    def factors(self) -> list[Value]:
        """The two tensors that a product is of: the last, for some add the result to another."""
        return self.values[-2:]


@dataclass(frozen=True)
class Call:
    """One call of a module: the ops in it are those from ``start`` up to ``stop``.

    ``input`` is the value of its first tensor argument, ``output`` that of its result or of the
    first element of the tuple that it gives; None where that is no tensor that an op made.
    """

    path: str
    start: int
    stop: int
    input: int | None
    output: int | None


@dataclass
class Trace:
    """The ops of a run and how their values flow. ``graph`` has an edge for each use."""

    ops: dict[int, Op] = field(default_factory=dict)
    graph: nx.DiGraph = field(default_factory=nx.DiGraph)  # type: ignore[type-arg]
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)  # as they ended: the inner first
    called: Counter[str] = field(default_factory=Counter)
    users: dict[str, set[str]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of parameters
    real: bool = False  # the run was on real tensors


def trace(model: nn.Module, example: Any = None) -> Trace:
    """Runs *model* once and records it; nothing of the model is changed.

    Args:
        example: inputs as a mapping, a tuple, or a pair of both. HF models need none.

    Raises:
        TraceError: there is no example, or the model fails on it.
    """
    args, kwargs = inputs_of(model, example)
    with _as_is(model):
        with dynamo.quiet_fakes():
            try:
                return _run(model, args, kwargs, fake=True)
            except Exception as error:  # it reads values, or has an op without a fake kernel
                logger.debug("the run on fake tensors failed, now on real ones: %s", error)
        try:
            return _run(model, args, kwargs, fake=False)
        except Exception as error:
            raise TraceError(
                f"{type(model).__name__} fails on its example: {error}",
                remedy="pass an example that the model takes: example={name: tensor, …}",
            ) from error


def _run(model: nn.Module, args: Any, kwargs: Any, fake: bool) -> Trace:
    recorder = _Recorder(model)
    with ExitStack() as stack:
        if fake:
            mode = dynamo.fake_mode()
            args, kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
            stack.enter_context(mode)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # flex attention compiles
        stack.enter_context(recorder.hooks())
        recorder.begin((args, kwargs))
        with recorder:
            out = model(*args, **kwargs)
    recorder.end(out)
    recorder.trace.real = not fake
    return recorder.trace


def inputs_of(model: nn.Module, example: Any) -> Example:
    """Positional and keyword inputs of an example in any of its forms."""
    if example is None:
        example = _dummy(model)
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, Tensor):
        return (example,), {}
    pair = tuple(example)
    if len(pair) == 2 and isinstance(pair[0], tuple) and isinstance(pair[1], dict):
        return pair[0], pair[1]
    return pair, {}


def _dummy(model: nn.Module) -> Mapping[str, Any]:
    """Inputs that an HF model takes: its own dummies, or made from its configuration."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise TraceError(
            f"{type(model).__name__} has to be run once, and there is no example to run it on",
            remedy="pass example={name: tensor, …}",
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs: dict[str, Tensor] = {}
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 32)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(vision, "num_channels", 3)
        inputs[main] = torch.zeros(2, channels, height, width, device=device)
    elif main == "input_features":
        length = 2 * getattr(config, "max_source_positions", 100)
        inputs[main] = torch.zeros(2, getattr(config, "num_mel_bins", 80), length, device=device)
    elif main == "input_values":
        inputs[main] = torch.zeros(2, 16000, device=device)
    else:
        text = getattr(config, "text_config", config)
        vocabulary = getattr(text, "vocab_size", 8)
        inputs[main] = (torch.arange(14, device=device).reshape(2, 7) % max(vocabulary - 3, 1)) + 2
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.full((2, 5), 2, dtype=torch.int64, device=device)
    return inputs


@contextmanager
def _as_is(model: nn.Module) -> Iterator[None]:
    """Inside the block *model* is in eval mode, uncompiled; afterwards as it was."""
    modes = [(m, m.training) for m in model.modules()]
    state = torch.get_rng_state()
    try:
        for m, _ in modes:
            m.training = False
        with dynamo.uncompiled(model):
            yield
    finally:
        for m, training in modes:
            m.training = training
        torch.set_rng_state(state)


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self.paths = {id(m): path for path, m in model.named_modules()}
        self.made: dict[int, tuple[int, int]] = {}  # id of a tensor -> what made it
        self.read: dict[int, tuple[tuple[str, ...], bool]] = {}  # -> its parameters, if gathered
        names: dict[int, tuple[str, ...]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            if SLOT not in name.split("."):
                names[id(p)] = (*names.get(id(p), ()), name)
                self.trace.shapes[name] = tuple(p.shape)
        self.read.update({key: (known, False) for key, known in names.items()})
        self.ranges = {id(b) for b in model.buffers() if _counts(b)}
        self.stack: list[tuple[str, int]] = []  # module path, its first op
        self.alive: list[Any] = []  # ids stay unique as long as their tensors live

    @contextmanager
    def hooks(self) -> Iterator[None]:
        def enter(module: nn.Module, _: Any) -> None:
            path = self.paths.get(id(module))
            if path is not None:
                self.stack.append((path, len(self.trace.ops)))
                self.trace.called[path] += 1

        def leave(module: nn.Module, args: Any, *given: Any) -> None:
            if id(module) in self.paths:
                path, start = self.stack.pop()
                *named, y = given  # torch gives no keyword arguments where forward raised
                inputs = (*args, *(v for kwargs in named for v in kwargs.values()))
                x = next((a for a in inputs if isinstance(a, Tensor)), None)
                source, made = self._maker(x), self._maker(first(y))
                if source is not None and source >= start:
                    source = None  # it was changed in place
                self.trace.calls.append(Call(path, start, len(self.trace.ops), source, made))

        pre = register_module_forward_pre_hook(enter)
        post = register_module_forward_hook(leave, with_kwargs=True, always_call=True)
        try:
            yield
        finally:
            pre.remove()
            dynamo.remove_global(post)

    def _maker(self, tensor: Tensor | None) -> int | None:
        made = self.made.get(id(tensor))
        return made[0] if made is not None and made[1] == 0 else None

    def begin(self, inputs: Any) -> None:
        for number, t in enumerate(x for x in tree_leaves(inputs) if isinstance(x, Tensor)):
            self.trace.inputs.append(t)
            self.made[id(t)] = (-1 - number, 0)
            self.trace.graph.add_node(-1 - number)
            self.alive.append(t)

    def end(self, out: Any) -> None:
        values = out.values() if isinstance(out, Mapping) else out
        for t in tree_leaves(list(values) if isinstance(out, Mapping) else values):
            if isinstance(t, Tensor) and id(t) in self.made:
                self.trace.outputs.append(self.made[id(t)][0])
        self.alive.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not results:
            if getattr(func, "__name__", "") != "__setitem__":
                return out
            results = [args[0]]
        name = getattr(func, "__name__", None) or resolve_name(func) or "?"
        if name in CASTS and out is args[0]:
            return out  # it was so before
        leaves, structure = tree_flatten((args, kwargs))
        leaves = [self._value(a) if isinstance(a, Tensor) else a for a in leaves]
        values = [a for a in leaves if isinstance(a, Value)]
        read = tuple(dict.fromkeys(p for v in values for p in v.params))
        module = self.stack[-1][0] if self.stack else ""
        for parameter in read:
            self.trace.users.setdefault(parameter, set()).add(module)
        self.alive += (*results, args)
        if values and not any(v.params or v.made for v in values):
            return out  # a constant, made of others
        guise = bool(read) and name not in COMPUTES and all(v.params or not v.made for v in values)
        picked = name in PICKS and len(values[0].params) > 0 and len(values[0].shape) > 2
        if not guise or any(v.made for v in values):
            self._add(name, module, values, read, results, (func, tuple(leaves), structure))
        if guise or picked:  # parameters in another form: whoever computes with it reads them
            indexed = any(v.gathered or not v.dtype.is_floating_point for v in values)
            self.read.update({id(t): (read, indexed) for t in results})
            return out
        whole = results[0]._base if _writes(name) else None
        if whole is not None and id(whole) in self.made:  # what it is a view of changed too
            given = (whole, results[0])
            parts = [self._value(t) for t in given]
            call = (_written, tuple(parts), tree_structure((given, {})))
            self._add("__setitem__", module, parts, (), [whole], call)
        return out

    def _add(
        self,
        name: str,
        module: str,
        values: list[Value],
        read: tuple[str, ...],
        results: list[Tensor],
        call: tuple[Callable[..., Any], tuple[Any, ...], TreeSpec],
    ) -> None:
        index = len(self.trace.ops)
        flows = tuple(v.made[0] for v in values if v.made is not None)
        shapes = tuple(tuple(t.shape) for t in results)
        self.trace.ops[index] = Op(index, name, module, flows, read, shapes, *call)
        self.trace.graph.add_node(index)
        for flow in flows:
            self.trace.graph.add_edge(flow, index)
        for slot, t in enumerate(results):
            self.made[id(t)] = (index, slot)
            self.read.pop(id(t), None)

    def _value(self, tensor: Tensor) -> Value:
        key = id(tensor)
        if key in self.ranges and key not in self.made:
            size = tensor.numel()
            call = (torch.arange, (size,), tree_structure(((size,), {})))
            self._add("arange", "", [], (), [tensor], call)
        params, gathered = self.read.get(key, ((), False))
        made = self.made.get(key)
        return Value(made, params, tuple(tensor.shape), tensor.dtype, gathered)


def first(given: Any) -> Tensor | None:
    """The tensor that a module's result is, or that the tuple begins with which it is."""
    if type(given) is tuple and given:
        given = given[0]
    return given if isinstance(given, Tensor) else None


def _writes(name: str) -> bool:
    return (
        name in ("__setitem__", "__iadd__", "__imul__")
        or re.fullmatch(r"[a-z].*[^_]_", name) is not None
    )


def _written(whole: Tensor, part: Tensor) -> Tensor:
    return whole


def _counts(buffer: Tensor) -> bool:
    """Whether a buffer counts up from 0: positions are kept so."""
    if buffer.is_floating_point() or buffer.is_meta or not 1 < buffer.numel() <= 2**20:
        return False
    return bool((buffer.flatten().cpu() == torch.arange(buffer.numel())).all())
