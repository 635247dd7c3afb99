"""Sites: the places of a model where a method can act.

A site is a parameter, seen together with the module that owns it. Its identity is the pair (module
path, parameter name). Where a tensor has other names too (tied, or one module under two paths),
they are the site's aliases. The output of a module that is one sublayer is a site too: it has the
module's path and no parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

CONVS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
}
OUTPUT = "output"  # the kind of a module's output
STACKS = ("encoder", "decoder", "vision", "audio", "text")


Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Site:
    """One parameter of a model and the module that owns it, or one module's output.

    ``kind`` is that of the owner: ``linear``, ``hf_conv1d`` (weight ``[in, out]``), ``embedding``,
    ``conv1d|2d|3d``, ``norm``, ``attention`` (``nn.MultiheadAttention``) or ``parameter`` (any
    other owner). ``attrs`` are the static arguments of the owner's call (stride, groups, …).

    An ``output`` is a tensor, or the first element of a tuple; ``shape`` has the width of its last
    axis and that of the module's first input, as a linear's weight would. ``rows`` says of a weight
    with several roles which of its output features have which, as half-open ranges; none where
    that is not known.
    """

    module: str
    parameter: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    attrs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    aliases: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()  # other paths of the very same module
    siblings: tuple[str, ...] = ()  # all parameters of the owner, by name
    roles: frozenset[str] = frozenset()
    layer: int | None = None
    layers: int | None = None  # how many blocks its stack has
    stack: str | None = None
    trainable: bool = field(default=True, compare=False)
    around: Mapping[str, Any] = field(default_factory=dict, compare=False)  # see peftfx.layout
    rows: Mapping[str, Rows] = field(default_factory=dict, compare=False)  # by role
    beside: str = field(default="", compare=False)  # of an output: a parameter of the sublayer
    computed: bool = False  # no parameter: it is made of others at each call

    @property
    def name(self) -> str:
        """The parameter's qualified name; the module's path for an output."""
        return ".".join(part for part in (self.module, self.parameter) if part)

    @property
    def like(self) -> str:
        """The name of a parameter that has the dtype and the device of what acts here."""
        return self.beside or self.name

    @property
    def in_features(self) -> int:
        """Width of the input (channels of all groups for a convolution, rows of a table)."""
        if self.kind in ("hf_conv1d", "embedding"):
            return self.shape[0]
        return self.shape[1] * int(self.attrs.get("groups", 1))

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.shape[1] if self.kind in ("hf_conv1d", "embedding") else self.shape[0]


def kind_of(module: nn.Module) -> str:
    """The kind of the sites that *module* owns."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    for cls, kind in CONVS.items():
        if isinstance(module, cls):
            return kind
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    if _is_hf_conv1d(module):
        return "hf_conv1d"
    if _is_norm(module):
        return "norm"
    return "parameter"


def _is_hf_conv1d(module: nn.Module) -> bool:
    # by shape of the class, not by import: transformers is not a dependency of the core
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D"
        and hasattr(module, "nf")
        and isinstance(weight, torch.Tensor)
        and weight.ndim == 2
    )


def _is_norm(module: nn.Module) -> bool:
    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
    if isinstance(module, norms) or type(module).__name__.endswith("Norm"):
        return True
    # RMS norms go by many names: one vector, nothing else, and an epsilon
    own = dict(module.named_parameters(recurse=False))
    return (
        list(own) == ["weight"]
        and own["weight"].ndim == 1
        and any("eps" in key for key in vars(module))
    )


def attrs_of(module: nn.Module, kind: str) -> Mapping[str, Any]:
    """Static call arguments of a module, as plain values that can go into a mark's key."""
    names: tuple[str, ...] = ()
    if kind.startswith("conv"):
        names = ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size")
    elif kind == "embedding":
        names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    attrs = {n: getattr(module, n) for n in names}
    if kind == "embedding" and hasattr(module, "embed_scale"):  # it multiplies what it gives
        attrs["embed_scale"] = float(module.embed_scale)  # type: ignore[arg-type]
    return attrs


def _block_of(model: nn.Module, path: str) -> dict[str, Any]:
    """The block that *path* lies in: its index in the outermost list of blocks, and their count."""
    module = model
    for part in path.split(".") if path else []:
        parent, module = module, module._modules[part]  # type: ignore[assignment]
        if part.isdigit() and _lists_blocks(parent):
            return {"layer": int(part), "layers": len(parent)}  # type: ignore[arg-type]
    return {}


def _lists_blocks(module: nn.Module) -> bool:
    """Whether the children of *module* are blocks: a list, or a sequence of one class of them."""
    if not isinstance(module, nn.Sequential):
        return isinstance(module, nn.ModuleList)
    kinds = {type(child) for child in module}
    return len(module) > 1 and len(kinds) == 1 and any(True for c in module[0].children())


def sites(model: nn.Module) -> Iterator[Site]:
    """Every parameter of every module of *model*, roles not yet known; bound adapters left out.

    A tied parameter gives one site for each module that owns it: an embedding and a head that
    share a tensor are different places to act.
    """
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if SLOT not in name.split("."):
            names.setdefault(id(p), []).append(name)
    paths = _paths(model)
    for path, module in model.named_modules():  # a module under two names comes once
        if SLOT in path.split("."):
            continue
        kind = kind_of(module)
        for pname, p in module._parameters.items():
            if p is None:
                continue
            name = f"{path}.{pname}" if path else pname
            yield Site(
                module=path,
                parameter=pname,
                kind=kind,
                shape=tuple(p.shape),
                dtype=p.dtype,
                attrs=attrs_of(module, kind),
                aliases=tuple(n for n in names[id(p)] if n != name),
                paths=tuple(q for q in paths[id(module)] if q != path),
                siblings=tuple(n for n, own in module._parameters.items() if own is not None),
                **_block_of(model, path),
                trainable=p.requires_grad,
            )
        for pname in _computed(module, kind):
            at = _block_of(model, path)
            yield Site(path, pname, kind, (), attrs=attrs_of(module, kind), computed=True, **at)


def _computed(module: nn.Module, kind: str) -> list[str]:
    """Weights and biases that are made of others: parametrized, weight-normed or pruned ones."""
    if kind == "parameter":
        return []
    names = {*getattr(module, "parametrizations", ())}
    names |= {n for n, value in vars(module).items() if isinstance(value, torch.Tensor)}
    return sorted(names & {"weight", "bias"})


def outputs(model: nn.Module, places: Iterable[tuple[str, tuple[int, int], str]]) -> Iterator[Site]:
    """The outputs of modules of *model* as sites: their paths, widths, and what is beside them."""
    paths = _paths(model)
    for path, widths, beside in places:
        owner, _, leaf = beside.rpartition(".")
        like = model.get_submodule(owner)._parameters[leaf]
        assert like is not None
        yield Site(
            module=path,
            parameter="",
            kind=OUTPUT,
            shape=widths,
            dtype=like.dtype,
            paths=tuple(p for p in paths[id(model.get_submodule(path))] if p != path),
            **_block_of(model, path),
            beside=beside,
        )


def _paths(model: nn.Module) -> dict[int, list[str]]:
    """All paths of each module, by its id."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    return paths


SLOT = "peftfx"  # the child module, under a site's owner, that holds the adapter's tensors
