"""One run of a model on fake tensors, recorded as a dataflow graph.

No compiler takes part: torch functions are recorded as the model calls them, so that parameters
keep their identity, any Python control flow is fine and a thousand layers take a second. Roles and
the proof of the marks both read this one trace.
"""

from __future__ import annotations

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
from torch.utils._pytree import tree_leaves, tree_map_only

from peftfx import dynamo
from peftfx.errors import TraceError
from peftfx.log import logger
from peftfx.site import SLOT

VIEWS = {
    "view", "reshape", "transpose", "permute", "t", "T", "mT", "__get__", "to", "float", "half",
    "bfloat16", "type_as", "__getitem__", "unsqueeze", "squeeze", "expand", "contiguous", "chunk",
    "split", "unbind", "detach", "flatten", "narrow", "view_as", "expand_as", "movedim",
}  # fmt: skip
Example = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Op:
    """One call of a torch function.

    ``args`` are the values of its tensor arguments in order: numbers of the ops that made them, or
    negative numbers for the model's inputs (-1 - position); ``params`` the parameters it read.
    """

    index: int
    name: str
    module: str
    args: tuple[int, ...]
    params: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    constants: tuple[Any, ...] = ()


@dataclass
class Trace:
    """The ops of a run and how their values flow. ``graph`` has an edge for each use."""

    ops: dict[int, Op] = field(default_factory=dict)
    graph: nx.DiGraph = field(default_factory=nx.DiGraph)  # type: ignore[type-arg]
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
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
        self.model = model
        self.paths = {id(m): path for path, m in model.named_modules()}
        self.params: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            if SLOT not in name.split("."):
                self.params.setdefault(id(p), []).append(name)
                self.trace.shapes[name] = tuple(p.shape)
        self.stack: list[str] = []
        self.made: dict[int, int] = {}  # id of a tensor -> the op that made it
        self.derived: dict[int, tuple[str, ...]] = {}  # views of parameters
        self.alive: list[Any] = []  # ids stay unique as long as their tensors live

    @contextmanager
    def hooks(self) -> Iterator[None]:
        def enter(module: nn.Module, _: Any) -> None:
            path = self.paths.get(id(module))
            if path is not None:
                self.stack.append(path)
                self.trace.called[path] += 1

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            if id(module) in self.paths:
                self.stack.pop()

        pre = register_module_forward_pre_hook(enter)
        post = register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            pre.remove()
            post.remove()

    def begin(self, inputs: Any) -> None:
        for number, t in enumerate(x for x in tree_leaves(inputs) if isinstance(x, Tensor)):
            self.trace.inputs.append(t)
            self.made[id(t)] = -1 - number
            self.trace.graph.add_node(-1 - number)
            self.alive.append(t)

    def end(self, out: Any) -> None:
        values = out.values() if isinstance(out, Mapping) else out
        for t in tree_leaves(list(values) if isinstance(out, Mapping) else values):
            if isinstance(t, Tensor) and id(t) in self.made:
                self.trace.outputs.append(self.made[id(t)])
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
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        read: list[str] = []
        for t in tensors:
            if id(t) in self.params:
                read += self.params[id(t)]
            read += self.derived.get(id(t), ())
        index = len(self.trace.ops)
        module = self.stack[-1] if self.stack else ""
        flows = tuple(self.made[id(t)] for t in tensors if id(t) in self.made)
        name = getattr(func, "__name__", None) or resolve_name(func) or "?"
        if read and not flows and name in VIEWS:
            # a view or cast of a parameter: whoever computes with it reads that
            for t in results:
                self.derived[id(t)] = tuple(dict.fromkeys(read))
                self.alive.append(t)
            for parameter in read:
                self.trace.users.setdefault(parameter, set()).add(module)
            return out
        for parameter in read:
            self.trace.users.setdefault(parameter, set()).add(module)
        constants = tuple(a for a in args if isinstance(a, (int, float, str, slice, tuple)))
        self.trace.ops[index] = Op(
            index=index,
            name=name,
            module=module,
            args=flows,
            params=tuple(dict.fromkeys(read)),
            shapes=tuple(tuple(t.shape) for t in results),
            constants=constants,
        )
        self.trace.graph.add_node(index)
        for flow in flows:
            self.trace.graph.add_edge(flow, index)
        for t in results:
            self.made[id(t)] = index
            self.alive.append(t)
        self.alive.append(args)
        return out
