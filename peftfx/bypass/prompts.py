"""Situations: prompts and prefixes, which are not local, in ways that go around the backend."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peftfx.backends import Backend
from peftfx.bind import release
from peftfx.binding import binding_of, entry_of
from peftfx.bypass.bench import Bench, Result, config, situation, values
from peftfx.operations import add, disabled

SPECS: dict[str, Any] = {
    "prompt": {"rules": [{"method": "prompt", "name": "body.table", "length": 3}]},
    "prefix": {"rules": [{"method": "prefix", "name": "*.query", "length": 3}]},
}
IDS = torch.tensor([[1, 4, 8, 2], [3, 9, 0, 7]])


class Attention(nn.Module):
    """Causal attention with two heads, and a switch."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))
        self.breaks = False

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (2, 3)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        if self.breaks:
            torch._dynamo.graph_break()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).flatten(2)


class Body(nn.Module):
    """A table and two layers of attention, each run as ``style`` says."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.style = "plain"

    def forward(self, ids: Tensor) -> Tensor:
        return self.after(self.table(ids))

    def after(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.style == "break":
                torch._dynamo.graph_break()
            if self.style in ("reentrant", "checkpoint"):
                from torch.utils.checkpoint import checkpoint

                x = x + checkpoint(layer, x, use_reentrant=self.style == "reentrant")
            else:
                x = x + (_uncompiled(layer, x) if self.style == "disabled" else layer(x))
        return x


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


class Text(nn.Module):
    """A body and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(ids))


def _model() -> Text:
    torch.manual_seed(0)
    return Text()


def _bound(kind: str, seed: int = 1, **options: Any) -> tuple[Text, Backend]:
    model, backend = _model(), Backend({**SPECS[kind], **options}, "eager")
    backend.bind(model, (IDS,))
    values(model, seed)
    return model, backend


def _expected(kind: str, seed: int = 1) -> Tensor:
    """The adapted result by plain arithmetic."""
    model, _ = _bound(kind, seed)
    binding = binding_of(model)
    assert binding is not None
    held = [entry_of(model, p).tensors() for p, _ in binding.installed]
    plain = _model()
    x = plain.body.table(IDS)
    if kind == "prompt":
        rows = held[0]["embeddings"].expand(2, -1, -1)
        return plain.head(plain.body.after(torch.cat([rows, x], 1))).detach()
    for layer, front in zip(plain.body.layers, held, strict=True):
        assert isinstance(layer, Attention)
        heads = []
        for h in range(2):
            part = slice(3 * h, 3 * h + 3)
            q, k, v = (f(x)[..., part] for f in (layer.query, layer.key, layer.value))
            own = (q @ k.transpose(1, 2)).masked_fill(torch.ones(4, 4).triu(1) > 0, -torch.inf)
            scores = torch.cat([q @ front["keys"][h].t(), own], -1) * 3**-0.5
            values_ = torch.cat([front["values"][h].expand(2, -1, -1), v], 1)
            heads.append(scores.softmax(-1) @ values_)
        x = x + torch.cat(heads, -1)
    return plain.head(x).detach()


Run = Callable[[Bench, Text, Backend], Tensor]
WAYS: dict[str, Run] = {}


def _way(name: str) -> Callable[[Run], Run]:
    def add_to_table(run: Run) -> Run:
        WAYS[name] = run
        return run

    return add_to_table


@_way("never compiled")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    return model(IDS)


@_way("compiled")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    return b.compile(model, backend)(IDS)


@_way("compiled in place")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    model.compile(backend=backend, fullgraph=b.fullgraph)
    return model(IDS)


@_way("forward called directly")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    model.compile(backend=backend, fullgraph=b.fullgraph)
    return model.forward(IDS)


@_way("a function around the model")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    return b.compile(lambda ids: model(ids) * 1.0, backend)(IDS)


@_way("the body called by itself")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    return model.head(model.body(IDS))


@_way("the body compiled by itself")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    return model.head(b.compile(model.body, backend)(IDS))


@_way("each layer compiled")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    for layer in model.body.layers:
        layer.compile(backend=backend, fullgraph=b.fullgraph)
    return model(IDS)


@_way("stance force_eager")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    compiled = b.compile(model, backend)
    with torch.compiler.set_stance("force_eager"):
        return compiled(IDS)


@_way("recompile limit reached")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    compiled = b.compile(model, backend, dynamic=False)
    with config(recompile_limit=1):
        compiled(IDS[:, :2])
        return compiled(IDS)


@_way("compiled by another backend")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    return b.compile(model, "eager")(IDS)


@_way("inside an outer compile with another backend")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    inner = b.compile(model, backend)
    return b.compile(lambda ids: inner(ids) + 0.0, "eager")(IDS)


@_way("torch.export, strict")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    return torch.export.export(model, (IDS,), strict=True).module()(IDS)


@_way("torch.export, not strict")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    return torch.export.export(model, (IDS,), strict=False).module()(IDS)


@_way("torch.jit.trace")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    return torch.jit.trace(model, (IDS,))(IDS)  # type: ignore[no-untyped-call]


@_way("torch.fx.symbolic_trace")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    return torch.fx.symbolic_trace(model)(IDS)


@_way("vmap")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    return torch.vmap(model)(IDS[:, None])[:, 0]


@_way("func.functional_call")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    return torch.func.functional_call(model, dict(model.named_parameters()), (IDS,))


class _Function(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@_way("under a TorchFunctionMode")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    compiled = b.compile(model, backend)
    with _Function():
        return compiled(IDS)


@_way("autocast to bfloat16")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return b.compile(model, backend)(IDS)


def _style(style: str) -> None:
    @_way(f"blocks in the style {style!r}")
    def _(b: Bench, model: Text, backend: Backend) -> Tensor:
        model.body.style = style
        return b.compile(model, backend)(IDS)


for _name in ("break", "disabled", "reentrant", "checkpoint"):
    _style(_name)


@_way("a graph break between the queries and their call")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    for layer in model.body.layers:
        layer.breaks = True  # type: ignore[assignment]
    return b.compile(model, backend)(IDS)


@_way("deepcopy of the model compiled in place")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    model.compile(backend=backend, fullgraph=b.fullgraph)
    model(IDS)
    return copy.deepcopy(model)(IDS)


@_way("pickled and back, then compiled")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    return b.compile(pickle.loads(pickle.dumps(model)), backend)(IDS)


@_way("torch.save and back")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)(IDS)  # type: ignore[no-any-return]


@_way("a base state dict loaded")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    model.load_state_dict(_model().state_dict())
    return b.compile(model, backend)(IDS)


@_way("in a worker thread")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    compiled = b.compile(model, backend)
    out: list[Any] = []

    def work() -> None:
        try:
            out.append(compiled(IDS))
        except Exception as error:
            out.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(out[0], Exception):
        raise out[0]
    return out[0]  # type: ignore[no-any-return]


@_way("a second instance")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    kind = "prefix" if "prefix" in str(backend.spec) else "prompt"
    other, again = _bound(kind, seed=4)
    b.compile(other, again)(IDS)
    return b.compile(model, backend)(IDS)


@_way("a released instance compiled first")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    kind = "prefix" if "prefix" in str(backend.spec) else "prompt"
    other, again = _bound(kind, seed=4)
    b.compile(other, again)(IDS)
    release(other)
    b.compile(other, "eager")(IDS)
    return b.compile(model, backend)(IDS)


@_way("off and on again")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    compiled = b.compile(model, backend)
    with disabled(model):
        compiled(IDS)
    return compiled(IDS)


@_way("another adapter added")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    compiled = b.compile(model, backend)
    compiled(IDS)
    for kind, spec in SPECS.items():
        add(model, spec, f"more_{kind}", (IDS,))
    return compiled(IDS)


@_way("hooks cleared")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    compiled = b.compile(model, backend)
    for module in model.body.modules():
        module._forward_hooks.clear()
    return compiled(IDS)


@_way("hooks cleared, run eagerly")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    for module in model.body.modules():
        module._forward_hooks.clear()
    return model(IDS)


@_way("strict: true, run eagerly")
def _(b: Bench, model: Text, backend: Backend) -> Tensor:
    kind = "prefix" if "prefix" in str(backend.spec) else "prompt"
    return _bound(kind, strict=True)[0](IDS)


def _row(kind: str, name: str, run: Run) -> None:
    @situation(f"{kind}: {name}")
    def _(b: Bench) -> Result:
        return run(b, *_bound(kind)), _expected(kind)


for _kind in SPECS:
    for _name, _run in WAYS.items():
        _row(_kind, _name, _run)
