"""How HF PEFT writes a method: the type, options and keys of its adapter directories.

Each method states its form; :mod:`peftfx.peft_format` knows none. Option names on the left are
PEFT's (0.21).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from peftfx.errors import SpecError

if TYPE_CHECKING:
    from peftfx.methods.method import Method
    from peftfx.site import Site

Placed = Sequence[tuple["Site", "Method"]]
LINEARS = ("linear", "hf_conv1d")  # kinds that PEFT adapts as one


def suffix(name: str, tail: str) -> bool:
    """Whether PEFT's target *tail* names the module *name*."""
    return name == tail or name.endswith("." + tail)


def ends(name: str) -> Iterator[str]:
    """All of PEFT's targets that name the module *name*."""
    yield name
    while name:
        name = name.partition(".")[2]
        yield name


def named(name: str, targets: Collection[str]) -> bool:
    """Whether one of PEFT's targets names the module; *targets* is a set where there are many."""
    return any(end in targets for end in ends(name) if end)


def expression(pattern: str, name: str) -> bool:
    """``re.fullmatch`` in linear time, whatever the expression."""
    return bool(matching(pattern, (name,)))


def matching(pattern: str, names: Iterable[str]) -> set[str]:
    """The names that the expression matches whole, in linear time, whatever the expression."""
    import re2

    try:
        asked = re2.compile(pattern, _quiet())
        return {name for name in names if asked.fullmatch(name) is not None}
    except (re2.error, UnicodeEncodeError) as error:  # half a character has no bytes to match
        raise SpecError(
            f"the expression {pattern[:80]!r} is not supported: {error}",
            remedy="list the modules instead; look-around and back references are not read",
        ) from None


@functools.cache
def _quiet() -> Any:
    """Options: what is wrong with an expression is told by an error, not on standard error."""
    import re2

    options = re2.Options()
    options.log_errors = False
    return options


@dataclass(frozen=True)
class Known:
    """What is known of the model that a configuration is read for.

    ``weights`` are sites by module, ``adapted`` those that the configuration's own type means,
    ``table`` the path of the token embedding, ``tied`` whether any weight has two names.
    """

    weights: Mapping[str, Site]
    adapted: Mapping[str, Site]
    parameters: tuple[str, ...]
    modules: tuple[str, ...]
    table: str | None
    tied: bool


@dataclass(frozen=True, eq=False)
class PeftForm:
    """One method in PEFT's directories.

    Attributes:
        type: PEFT's ``peft_type``.
        keys: the key of each tensor, with ``{module}`` and ``{parameter}`` of the site.
        of_tables: its keys at embeddings, if they are others.
        joined: tensors without a key, which :meth:`pack` puts into others.
        options: PEFT's option -> ours, one value for all sites.
        varied: PEFT's option -> ours, and PEFT's option that holds other values by module.
        fixed: options that have one value wherever this method is meant.
        defaults: values that PEFT has where a configuration is silent, if not ours.
        special: options that :meth:`more` writes and :meth:`rules` reads.
        called: ours -> PEFT's, of those that are so written.
        ignored: options about the start or the bookkeeping of a training.
        optional: tensors that a file may leave out; they have the values that they start with.
        kinds: of sites that PEFT adapts by it; empty for any.
        whole: PEFT takes the modules whole, with all their parameters.
        beside: the option by which it can stand in another type's configuration.
        beside_keys: its keys there, if they are others.
        takes: options of others that can stand in this type's configuration.
        tied: PEFT adapts all that is tied to a site along with it, under one name.
    """

    type: str
    keys: Mapping[str, str]
    of_tables: Mapping[str, str] = field(default_factory=dict)
    joined: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    varied: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    special: tuple[str, ...] = ()
    called: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("linear",)
    whole: bool = False
    beside: str | None = None
    beside_keys: Mapping[str, str] = field(default_factory=dict)
    takes: tuple[str, ...] = ("modules_to_save",)
    tied: bool = False

    @property
    def said(self) -> dict[str, str]:
        """Our options that a configuration can say, and what PEFT calls them."""
        alike = {ours: theirs for theirs, ours in self.options.items()}
        return {**alike, **{ours: t for t, (ours, _) in self.varied.items()}, **self.called}

    def meant(self, content: Mapping[str, Any]) -> bool:
        """Whether a configuration of this type means this method."""
        return all(key not in content or content[key] == value for key, value in self.fixed.items())

    def refusal(self, method: Method, site: Site) -> str | None:
        """Why PEFT cannot have *method* at *site*, or None."""
        if site.part:
            return f"PEFT's {self.type} takes whole weights, and of {site.name} some rows are taken"
        if self.kinds and site.kind not in self.kinds:
            return f"PEFT's {self.type} has no {site.kind}"
        return None

    def value(self, method: Method, name: str) -> Any:
        """The value of our option *name* that PEFT is to read."""
        return getattr(method, name)

    def names(self, method: Method, site: Site) -> dict[str, str]:
        """The key of each tensor that the file has, by our name."""
        keys = {**self.keys, **(self.of_tables if site.kind == "embedding" else {})}
        return {name: keys[name] for name in method.params(site) if name not in self.joined}

    def names_beside(self, method: Method, site: Site) -> dict[str, str]:
        """The same where it stands in another type's configuration."""
        return {**self.names(method, site), **self.beside_keys}

    def more(self, placed: Placed) -> dict[str, Any]:
        """Options beyond those that the attributes name."""
        return {}

    def rules(
        self, rule: dict[str, Any], content: Mapping[str, Any], sites: Mapping[str, Site] | None
    ) -> list[dict[str, Any]]:
        """The rules of a spec that a configuration amounts to; *rule* is what is known of them.

        Args:
            sites: the weights that PEFT would adapt, by module; None where there is no model.
        """
        return [rule]

    def fresh(self, method: Method) -> tuple[Method, dict[str, Any]]:
        """The method as a configuration has it before training, and what that says of its start."""
        return method, {}

    def besides(self, placed: Placed, main: Placed, free: Sequence[str]) -> Any:
        """What it writes as the option :attr:`beside`.

        Args:
            main: what the configuration's own type acts at.
            free: names of the base's parameters that are not in a module saved whole.
        """
        raise NotImplementedError

    def rules_beside(
        self,
        method: str,
        value: Any,
        rule: Mapping[str, Any],
        content: Mapping[str, Any],
        known: Known | None,
    ) -> list[dict[str, Any]]:
        """The rules that a value of the option :attr:`beside` amounts to.

        Args:
            rule: that of the configuration's own type.
            known: None where there is no model.
        """
        raise NotImplementedError

    def pack(self, method: Method, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The site's tensors as PEFT has them, by our names."""
        return {name: p[name] for name in self.names(method, site)}

    def unpack(self, method: Method, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of :meth:`pack`; what is left out has the value that it starts with."""
        return dict(p)
