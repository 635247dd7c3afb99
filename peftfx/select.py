"""Selectors: which sites a rule means."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftfx.errors import SpecError, nearest
from peftfx.methods.method import Method
from peftfx.site import KINDS, STACKS, Site

SELECTORS = ("name", "role", "kind", "layers", "stack", "except")
_ATTENTION = ("query", "key", "value", "output")
ROLES = (
    *(f"attention.{r}" for r in _ATTENTION),
    *(f"cross_attention.{r}" for r in _ATTENTION),
    "mlp.up", "mlp.gate", "mlp.down",
    "attention", "cross_attention", "mlp",
    "residual.attention", "residual.cross_attention", "residual.mlp", "residual",
    "block",
    "embedding.token", "embedding.position", "embedding.patch", "embedding",
    "head", "norm", "conv", "router", "experts", "tokens",
)  # fmt: skip
_LAYERS = re.compile(r"(\d{1,6})-(\d{1,6})|(last|first|every) (\d{1,6})|(\d{1,6})")


@dataclass(frozen=True)
class Selector:
    """All of what is given has to hold. Names are globs in which ``*`` crosses dots."""

    name: tuple[str, ...] = ()
    role: tuple[str, ...] = ()
    kind: tuple[str, ...] = ()
    layers: str | int | tuple[int, ...] | None = None
    stack: tuple[str, ...] = ()
    except_: tuple[str, ...] = ()

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Selector:
        """The selector in the selector keys of a rule. Errors begin with the key's name."""
        texts = {k: _texts(k, given.get(k)) for k in SELECTORS if k != "layers"}
        for key, known in (("role", ROLES), ("kind", KINDS), ("stack", STACKS)):
            for value in texts[key]:
                if value not in known:
                    raise SpecError(f"{key} {value!r} is not known", remedy=nearest(value, known))
        layers = _layers(given.get("layers"))
        excluded = texts.pop("except")
        return cls(**texts, layers=layers, except_=excluded)

    def to_dict(self) -> dict[str, Any]:
        """The keys as a spec file has them."""
        content: dict[str, Any] = {}
        for key in SELECTORS:
            value = getattr(self, "except_" if key == "except" else key)
            if key == "layers" and value is not None:
                content[key] = list(value) if isinstance(value, tuple) else value
            elif key != "layers" and value:
                content[key] = value[0] if len(value) == 1 else list(value)
        return content

    def __str__(self) -> str:
        return ", ".join(f"{k}: {v}" for k, v in self.to_dict().items()) or "everything"

    @functools.cached_property
    def _names(self) -> Globs:
        return Globs(self.name)

    @functools.cached_property
    def _excluded(self) -> Globs:
        return Globs(self.except_)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The globs that are tried on every name."""
        return (*self._names.others, *self._excluded.others)

    def asks(self, role: str) -> bool:
        """Whether *role* is asked for, by its name or its group's (``attention``, ``mlp``)."""
        return role in self.role or role.rpartition(".")[0] in self.role

    def matches(self, site: Site, method: type[Method] | Method, layer_count: int) -> bool:
        """Whether *site* is meant. *layer_count* is the number of blocks in its stack."""
        within = method.acts == "parameter"
        return (
            (not self.name or self._names.match(_names_of(site, within)))
            and (not self.role or any(self.asks(r) for r in site.roles))
            and (not self.kind or site.kind in self.kind)
            and (self.layers is None or site.layer in self._indexes(layer_count))
            and (not self.stack or site.stack in self.stack)
            and not (self.except_ and self._excluded.match(_paths_of(site)))
            and (within or site.kind != "parameter" or self._asks_for_bare(site))
        )

    def _asks_for_bare(self, site: Site) -> bool:
        """A bare parameter may be anything: it is meant if its name, its kind or a role says so."""
        ends = any(glob.endswith(site.parameter) for glob in self.name)
        return ends or "parameter" in self.kind or bool(self.role)

    def _indexes(self, count: int) -> range | tuple[int, ...]:
        layers = self.layers
        if isinstance(layers, int):
            return (layers,)
        if isinstance(layers, tuple):
            return layers
        assert isinstance(layers, str)
        found = _LAYERS.fullmatch(layers)
        assert found is not None
        first, last, word, number, single = found.groups()
        if single is not None:
            return (int(single),)
        if first is not None:
            return range(int(first), int(last) + 1)
        n = int(number)
        if word == "last":
            return range(max(count - n, 0), count)
        return range(min(n, count)) if word == "first" else range(0, count, n)


def _texts(key: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else value
    if (
        not isinstance(values, Sequence)
        or not values
        or not all(isinstance(v, str) and 0 < len(v) <= 1024 for v in values)
    ):
        raise SpecError(f"{key} is {value!r}", remedy="give a text or a list of texts")
    return tuple(values)


def _layers(value: Any) -> str | int | tuple[int, ...] | None:
    if value is None:
        return None
    whole = [value] if isinstance(value, int) else value
    if isinstance(whole, (list, tuple)) and whole:
        if all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in whole):
            return value if isinstance(value, int) else tuple(whole)
    elif isinstance(value, str):
        found = _LAYERS.fullmatch(value)
        backwards = found and found.group(1) and int(found.group(1)) > int(found.group(2))
        if (found and not backwards and value.split()[-1] != "0") or value == "0":
            return value
    raise SpecError(
        f"layers is {value!r}",
        remedy="write 0-5, [0, 2, 4], `last 4`, `first 2` or `every 2`",
    )


def _names_of(site: Site, within: bool) -> set[str]:
    """What a glob may match: parameter names and their modules, under every path of the module.

    *within*, for methods that act on the tensor itself: also the names it is tied to, and all
    modules around.
    """
    tried: set[str] = set()
    same = [f"{path}.{site.parameter}" for path in site.paths]
    if site.caller is not None:  # its name means the projection of its result too
        tried.add(site.caller)
    for name in (site.name, *(site.aliases if within else same)):
        module = name.rpartition(".")[0]
        tried |= {name, module}
        while within and module:
            module = module.rpartition(".")[0]
            tried.add(module)
    tried.discard("")
    return tried


def _paths_of(site: Site) -> set[str]:
    """What ``except`` may match: the site and the modules around it, and no tied other name."""
    path, tried = site.module, {site.name}
    while path:
        tried.add(path)
        path = path.rpartition(".")[0]
    return tried


class Globs:
    """Globs as a set: names, and ends of names (``*.name``), are looked up; the others are tried.

    So a spec that lists every module of a large model takes no time of their number's square.
    """

    def __init__(self, globs: Iterable[str]) -> None:
        plain = {g for g in globs if _SPECIAL.isdisjoint(g.removeprefix("*."))}
        self.names = {g for g in plain if not g.startswith("*.")}
        self.ends = {g[2:] for g in plain - self.names}
        self.others = tuple(g for g in globs if g not in plain)

    def match(self, names: Iterable[str]) -> bool:
        """Whether one of the globs matches one of the *names*."""
        return any(
            name in self.names
            or (bool(self.ends) and any(end in self.ends for end in _ends(name)))
            or any(glob_matches(g, name) for g in self.others)
            for name in names
        )


_SPECIAL = frozenset("*?[")


def _ends(name: str) -> Iterator[str]:
    """What stands behind each dot."""
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


@functools.lru_cache(maxsize=65536)
def glob_matches(glob: str, name: str) -> bool:
    """``*`` any run, ``?`` one character, ``[ab]`` one of a set. Time is |glob|·|name| at most."""
    tokens = _tokens(glob)
    if sum(t != "*" for t in tokens) > len(name):
        return False
    at, star, back = 0, -1, 0
    i = 0
    while i < len(name):
        if at < len(tokens) and tokens[at] != "*" and _fits(tokens[at], name[i]):
            at, i = at + 1, i + 1
        elif at < len(tokens) and tokens[at] == "*":
            star, back, at = at, i, at + 1
        elif star >= 0:
            back += 1
            at, i = star + 1, back
        else:
            return False
    return all(t == "*" for t in tokens[at:])


@functools.lru_cache(maxsize=1024)
def _tokens(glob: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\[[^\]]+\]|.", glob, re.DOTALL))


def _fits(token: str, char: str) -> bool:
    if len(token) > 1:
        return (char in token[2:-1]) is not True if token[1] == "!" else char in token[1:-1]
    return token in ("?", char)
