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

CLASSES: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Embedding: "embedding",
    nn.EmbeddingBag: "embedding_bag",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.MultiheadAttention: "attention",
}
OUTPUT = "output"  # the kind of a module's output
KINDS = (*CLASSES.values(), "hf_conv1d", "norm", "parameter", OUTPUT)
STACKS = ("encoder", "decoder", "vision", "audio", "text")
PACKED = "in_proj_weight"  # of nn.MultiheadAttention: its queries, keys and values in one
PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Site:
    """One parameter of a model and the module that owns it, or one module's output.

    ``kind`` is that of the owner, one of :data:`KINDS`; ``hf_conv1d`` has the weight ``[in, out]``,
    ``attention`` is ``nn.MultiheadAttention``, ``parameter`` any owner that is of no other kind.
    ``attrs`` are the static arguments of the owner's call (stride, groups, …).

    An ``output`` is a tensor, or the first element of a tuple; ``shape`` has the width of its last
    axis and that of the module's first input, as a linear's weight would. ``rows`` says of a weight
    with several roles which of its output features have which, as half-open ranges; none where
    that is not known. A rule may take a part of them: then ``part`` has their ranges, and ``shape``
    is the part's.
    """

    module: str
    parameter: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    attrs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    aliases: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()  # other paths of the very same module
    bias: tuple[str, int, int] | None = None  # parameter of the owner, and where it begins and ends
    siblings: tuple[str, ...] = ()  # all parameters of the owner, by name
    caller: str | None = None  # the nn.MultiheadAttention whose result the owner projects
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
    def is_weight(self) -> bool:
        """Whether it is what the owner's input is multiplied with, or looked up in."""
        if self.kind == "attention":
            return self.parameter in (PACKED, *PROJECTIONS)
        if self.kind == "parameter":
            return len(self.shape) in (2, 3)
        return self.parameter == "weight"

    @property
    def part(self) -> Rows:
        """Ranges of the owner's output features that the site has; none for all."""
        return tuple((start, stop) for start, stop in self.attrs.get("part", ()))

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of the parameter, of which the site may be a part."""
        shape = list(self.shape)
        if self.part:
            shape[self.axes[0]] = int(self.attrs["width"])
        return tuple(shape)

    @property
    def rung(self) -> tuple[int, int] | None:
        """Which it is, from 0, of how many that a rule gathers; None where it gathers none."""
        at = self.attrs.get("rung")
        return None if at is None else (at[0], at[1])

    @property
    def axes(self) -> tuple[int, int]:
        """The parameter's axes of output and of input features; rows of a table are its input.

        Three axes of a bare parameter are a stack of matrices, of experts for example.
        """
        if self.kind == "parameter":
            return (-1, -2) if self.attrs.get("transposed") else (-2, -1)
        swapped = self.kind in ("hf_conv1d", "embedding", "embedding_bag")
        return (1, 0) if swapped or self.kind.startswith("conv_transpose") else (0, 1)

    @property
    def in_features(self) -> int:
        """Width of the input (channels of all groups for a convolution, rows of a table)."""
        groups = 1 if self.kind.startswith("conv_transpose") else self.groups
        return self.shape[self.axes[1]] * groups

    @property
    def out_features(self) -> int:
        """Width of the output."""
        groups = self.groups if self.kind.startswith("conv_transpose") else 1
        return self.shape[self.axes[0]] * groups

    @property
    def groups(self) -> int:
        """Groups of a convolution; a transposed one has them along its output."""
        return int(self.attrs.get("groups", 1))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Inputs of the owner beside the first which change what it computes."""
        if self.kind == "embedding_bag":
            return ("offsets", "per_sample_weights")
        return ("output_size",) if self.kind.startswith("conv_transpose") else ()


def kind_of(module: nn.Module) -> str:
    """The kind of the sites that *module* owns."""
    for cls, kind in CLASSES.items():
        if isinstance(module, cls) and (kind != "attention" or _is_plain(module)):
            return kind
    if _is_hf_conv1d(module):
        return "hf_conv1d"
    if _is_norm(module):
        return "norm"
    return "parameter"


def _is_plain(module: nn.Module) -> bool:
    """Whether an ``nn.MultiheadAttention`` computes what torch's own does."""
    cls = getattr(type(module), BASE, type(module))
    return cls.forward is nn.MultiheadAttention.forward and "forward" not in module.__dict__


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
    attrs = {n: getattr(module, n) for n in _ATTRS.get(kind.rstrip("123d"), ())}
    if kind == "embedding" and hasattr(module, "embed_scale"):  # it multiplies what it gives
        attrs["embed_scale"] = float(module.embed_scale)  # type: ignore[arg-type]
    if kind == "parameter" and getattr(module, "is_transposed", False):
        attrs["transposed"] = True  # HF's experts that lie as [expert, in, out]
    return attrs


_CONV = ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size")
_TABLE = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
_ATTRS = {
    "conv": _CONV,
    "conv_transpose": (*_CONV, "output_padding"),
    "embedding": _TABLE,
    "embedding_bag": (*_TABLE, "mode", "include_last_offset"),
}


def _bias_of(module: nn.Module, kind: str, parameter: str) -> tuple[str, int, int] | None:
    """The bias that goes with a weight."""
    name = "in_proj_bias" if kind == "attention" else "bias"
    bias = module._parameters.get(name)
    if bias is None or kind == "parameter":
        return None
    if parameter in PROJECTIONS:
        part, width = PROJECTIONS.index(parameter), bias.shape[0] // 3
        return name, part * width, (part + 1) * width
    return name, 0, bias.shape[0]


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


def _caller_of(model: nn.Module, path: str) -> str | None:
    """The path of the ``nn.MultiheadAttention`` whose output projection *path* is."""
    parent, _, leaf = path.rpartition(".")
    if leaf != "out_proj" or kind_of(model.get_submodule(parent)) != "attention":
        return None
    return parent


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
                bias=_bias_of(module, kind, pname),
                siblings=tuple(n for n, own in module._parameters.items() if own is not None),
                caller=_caller_of(model, path),
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
BASE = "_peftfx_base_class"  # what the class of an adapted module says of the one it stands for
