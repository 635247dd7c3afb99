"""Where a traced model takes its tokens in, and where it attends.

Methods that act on the token sequence or at attention calls have no weight of their own to sit at.
Their sites are the table that the token ids go into, and the weights that queries come from; what
else they have to know of the model (``Site.around``) is read off the same trace.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import networkx as nx
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from peftfx.roles.flow import ADDS
from peftfx.site import Site
from peftfx.trace import CONVS, MATRIX, Op, Trace, inputs_of

SUBTRACTS = {"sub", "sub_", "__sub__", "__rsub__", "rsub"}
RANGES = {"arange", "cumsum"}
ANGLES = {"cos", "polar"}
CALL = "scaled_dot_product_attention"
_BAKED = ("kv_heads", "head_dim", "value_dim", "window", "relative")


@dataclass(frozen=True)
class Layout:
    """Facts by the name of the parameter that stands for a place.

    ``tokens``: ``ids`` is the name of the model's input, ``encoder`` the path of the module that
    takes the ids where it is not the model itself (None: a decoder takes them), ``placeholder`` an
    id without a meaning of its own.

    ``attention``: ``kv_heads``, ``head_dim`` and ``value_dim``; ``scope`` is the path of the module
    that attends, ``window`` how many tokens it looks back, ``relative`` whether it adds learned
    values for distances, ``positions`` the modules that positions enter this stack by. What a
    mark's key has to say of them goes to the site's ``attrs``.

    Both: ``stacks`` is 2 for an encoder-decoder.
    """

    tokens: Mapping[str, Mapping[str, Any]]
    attention: Mapping[str, Mapping[str, Any]]

    def sites(self, known: Iterable[Site], acts: str) -> list[Site]:
        """Those of *known* where a method of that kind can act, with what is around them."""
        facts = self.tokens if acts == "tokens" else self.attention
        found = []
        for site in known:
            if site.name not in facts:
                continue
            around = dict(facts[site.name])
            if acts == "tokens":
                found.append(replace(site, around=around, roles=site.roles | {"tokens"}))
                continue
            if any(role.startswith("cross_attention") for role in site.roles):
                around["positions"] = ()  # the memory has its own
            attrs = {name: around.pop(name) for name in _BAKED if around.get(name)}
            found.append(replace(site, around=around, attrs={**site.attrs, **attrs}))
        return found


def layout(model: nn.Module, trace: Trace, example: Any = None) -> Layout:
    """The layout of *model*, by its trace on *example*."""
    return _Reader(model, trace, example).read()


class _Reader:
    def __init__(self, model: nn.Module, trace: Trace, example: Any) -> None:
        self.model, self.trace, self.example = model, trace, example
        self.ops, self.graph = trace.ops, trace.graph
        self._above: dict[int, frozenset[int]] = {}

    def read(self) -> Layout:
        return Layout(dict(self._tokens()), dict(self._attention()))

    def _ancestors(self, at: int) -> frozenset[int]:
        found = self._above.get(at)
        if found is None:
            found = self._above[at] = frozenset({at, *nx.ancestors(self.graph, at)})
        return found

    # -- tokens ----------------------------------------------------------------------------------

    def _tokens(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The first table that is read by an input of the model, not by positions."""
        for op in self.ops.values():
            if op.name != "embedding" or not op.args:
                continue
            above = self._ancestors(op.args[0])
            inputs = [n for n in above if n < 0]
            if not inputs or self._ranges(above):
                continue
            name = self._input_name(-1 - inputs[0])
            table = f"{op.module}.weight"
            if name is None or len(inputs) > 1 or table not in op.params or len(op.shapes[0]) != 3:
                return
            found = {"ids": name, "encoder": self._encoder(op.module), "stacks": self._stacks()}
            yield table, {**found, "placeholder": self._placeholder(table)}
            return

    def _input_name(self, position: int) -> str | None:
        """The name under which the model takes its tensor input of that number."""
        args, kwargs = inputs_of(self.model, self.example)
        names = list(inspect.signature(self.model.forward).parameters)
        given = [*zip(names, args, strict=False), *kwargs.items()]
        flat = [(n, v) for n, v in given for t in tree_leaves(v) if isinstance(t, Tensor)]
        name, value = flat[position]
        return name if isinstance(value, Tensor) else None

    def _stacks(self) -> int:
        return 1 + bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    def _encoder(self, path: str) -> str | None:
        """The path of an encoder that takes the ids, "" where there is none, None for a decoder."""
        if self._stacks() == 1:
            return ""
        encoder = self.model.get_encoder()  # type: ignore[operator]
        found = next((p for p, m in self.model.named_modules() if m is encoder), None)
        return found if found and path.startswith(found + ".") else None

    def _placeholder(self, table: str) -> int:
        """An id without a meaning of its own: neither padding nor a mark of any kind."""
        config = getattr(self.model, "config", None)
        values = config.to_dict() if config is not None else {}
        special = {v for k, v in values.items() if k.endswith(("_token_id", "_token_index"))
                   and isinstance(v, int)}  # fmt: skip
        module = self.model.get_submodule(table.rpartition(".")[0])
        special.add(getattr(module, "padding_idx", None))  # type: ignore[arg-type]
        return next(i for i in range(len(special) + 1) if i not in special)

    # -- attention -------------------------------------------------------------------------------

    def _attention(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        first: dict[str, Op] = {}  # of each stack: what comes before it is that stack's own
        for op in self.ops.values():
            if op.name != CALL or len(op.args) < 3:
                continue
            query, key = self._projection(op.args[0]), self._projection(op.args[1])
            if query is None or key is None:
                continue
            name = next((p for p in query.params if p == f"{query.module}.weight"), None)
            if name is None:
                continue
            stack = ".".join(takewhile(lambda part: not part.isdigit(), op.module.split(".")))
            first.setdefault(stack, op)
            facts = self._heads(op, query, key)
            if facts is not None:
                facts["window"] = self._window(op.module)
                facts["positions"] = self._positions(op, first[stack])
                facts |= {"relative": self._relative(op), "scope": op.module}
                yield name, facts | {"stacks": self._stacks()}

    def _projection(self, start: int) -> Op | None:
        """The product with a weight that *start* comes from."""
        queue, seen = [start], {start}
        while queue:
            op = self.ops.get(queue.pop(0))
            if op is None:
                continue
            if op.name in MATRIX | CONVS and any(len(self.trace.shapes[p]) > 1 for p in op.params):
                return op
            fresh = [a for a in self.graph.predecessors(op.index) if a not in seen]
            seen.update(fresh)
            queue += fresh
        return None

    def _heads(self, op: Op, query: Op, key: Op) -> dict[str, Any] | None:
        """Numbers and widths of heads, checked against the widths of the projections."""
        shapes = [self._shape(a) for a in op.args[:3]]
        if any(s is None or len(s) != 4 for s in shapes):
            return None
        q, k, v = (s or () for s in shapes)
        heads, width, value = q[1], q[3], v[3]
        columns = self._shape(key.index)
        if columns is None:
            return None
        if query is key:  # one product for all three
            kv, rest = divmod(columns[-1] - heads * width, width + value)
        else:
            kv, rest = divmod(columns[-1], width)
        if rest or kv < 1 or heads % kv or k[1] not in (kv, heads):
            return None
        return {"kv_heads": kv, "head_dim": width, "value_dim": value}

    def _window(self, path: str) -> int | None:
        """How many tokens HF's attention looks back: the module says so, or its configuration."""
        scope = self.model.get_submodule(path)
        told = scope if hasattr(scope, "sliding_window") else getattr(scope, "config", None)
        return getattr(told, "sliding_window", None)

    def _shape(self, at: int) -> tuple[int, ...] | None:
        if at < 0:
            return tuple(self.trace.inputs[-1 - at].shape)
        shapes = self.ops[at].shapes
        return shapes[0] if len(shapes) == 1 else None

    def _relative(self, op: Op) -> bool:
        """Whether the mask holds values of a table of distances."""
        return len(op.args) > 3 and any(
            (o := self.ops.get(a)) is not None and o.name == "embedding"
            for a in self._ancestors(op.args[3])
        )

    # -- positions -------------------------------------------------------------------------------

    def _positions(self, call: Op, first: Op) -> tuple[tuple[str, str], ...]:
        """Modules by which positions come to the queries of an attention call.

        ``rotary``: angles are made of positions, between the attention before and this one.
        ``table``: rows are read by position, before the first attention of the stack.
        """
        rotary = {op.module: "rotary" for op in self._near(call.args[0]) if op.name in ANGLES}
        tables = {
            op.module: "table"
            for op in self._near(first.args[0])
            if f"{op.module}.weight" in op.params and self._by_position(op)
        }
        return tuple((rotary | tables).items())

    def _near(self, start: int) -> Iterator[Op]:
        """What *start* is made of, up to other attention calls."""
        queue, seen = [start], {start}
        while queue:
            op = self.ops.get(queue.pop())
            if op is None or op.name == CALL:
                continue
            yield op
            fresh = [a for a in self.graph.predecessors(op.index) if a not in seen]
            seen.update(fresh)
            queue += fresh

    def _by_position(self, op: Op) -> bool:
        owner = self.model.get_submodule(op.module)
        if not isinstance(owner, nn.Embedding):
            return False
        if op.name in ADDS:
            return True  # rows are added as they lie: the table of a model that slices it
        if op.name not in ("embedding", "__getitem__"):
            return False
        above = self._values(op.args[0]) if op.args else set()
        if any(self._difference(n) for n in above):
            return False
        inputs = [self._input_name(-1 - n) or "" for n in above if n < 0]
        return bool(self._ranges(above)) or any("position" in name for name in inputs)

    def _values(self, start: int) -> set[int]:
        """What the values of *start* come from; what is gathered does not come from its index."""
        queue, seen = [start], {start}
        while queue:
            at = queue.pop()
            if at in self.ops and self.ops[at].name == "gather":
                continue
            fresh = [a for a in self.graph.predecessors(at) if a not in seen]
            seen.update(fresh)
            queue += fresh
        return seen

    def _ranges(self, above: Iterable[int]) -> list[int]:
        return [n for n in above if (o := self.ops.get(n)) is not None and o.name in RANGES]

    def _difference(self, at: int) -> bool:
        op = self.ops.get(at)
        return op is not None and op.name in SUBTRACTS and len(op.args) == 2
