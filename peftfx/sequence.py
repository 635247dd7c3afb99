"""Longer sequences: how virtual tokens get their place in a model's inputs.

A traced graph has lengths in it, so the inputs are lengthened before anything sees them: by the
``forward`` of the model (of its encoder, where it has one), through a subclass made for the class
at hand. Placeholder ids take the front; the mark at the embedding writes the virtual tokens over
them. Since it is ``forward`` that does so, whatever calls the model meets it.

Whether there is something to write is a fact of the call: at later steps of a generation the cache
has the virtual tokens already. It is kept for each thread, beside the entry of the mark, while
``forward`` runs. A mark that fires when nothing is kept was reached around ``forward``: it refuses.
"""

from __future__ import annotations

import functools
import inspect
import threading
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfx.errors import BindError, NotAdaptedError
from peftfx.standing import stand_in

Part = Literal["whole", "encoder", "decoder"]
_FEED = "_peftfx_feed"
_PLAIN = "_peftfx_plain_class"
_SILENT = -100  # the label that HF's losses leave out


class State(threading.local):
    """What the mark of an entry does in the call at hand: ``now`` is ``write`` or ``skip``."""

    def __init__(self) -> None:
        self.now: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return State, ()  # a copy starts outside of any call


@dataclass(eq=False)
class Feed:
    """How one module's inputs are lengthened, for the mark that is on of *entries*."""

    entries: list[Any]
    part: Part
    ids: str
    placeholder: int
    names: tuple[str, ...]  # of the parameters that may be given by position
    generates: bool  # a causal language model

    @property
    def entry(self) -> Any:
        """The entry whose mark is on, None where all are off."""
        on = [e for e in self.entries if e.key]
        if len(on) > 1:
            raise NotAdaptedError(
                "two prompts are active, and nothing says which comes first",
                site=on[0].site,
                remedy="activate one",
            )
        return on[0] if on else None


def feed(model: nn.Module, entry: Any, around: Any) -> None:
    """Makes *model* lengthen its inputs for *entry*; ``around`` is :attr:`Site.around`."""
    _adapt(model, entry, "decoder" if around["encoder"] else "whole", around)
    if around["encoder"]:
        _adapt(model.get_submodule(around["encoder"]), entry, "encoder", around)


def fed(model: nn.Module, entry: Any, around: Any) -> bool:
    """Whether what :func:`feed` did is still in place."""
    parts = [model, *([model.get_submodule(around["encoder"])] if around["encoder"] else [])]
    feeds = [m.__dict__.get(_FEED) for m in parts if hasattr(type(m), _PLAIN)]
    return len(feeds) == len(parts) and all(
        f is not None and any(e is entry for e in f.entries) for f in feeds
    )


def lengthens(model: nn.Module) -> bool:
    """Whether *model* itself lengthens its inputs."""
    return _FEED in model.__dict__


def entrances(model: nn.Module) -> list[nn.Module]:
    """Modules of *model* that lengthen their own inputs since they are called by themselves."""
    found = [(m, m.__dict__.get(_FEED)) for m in model.modules()]
    return [m for m, feed in found if feed is not None and feed.part == "encoder"]


def tidy(model: nn.Module) -> None:
    """Takes off what :func:`feed` did for entries that are not in the model any more."""
    alive = {id(m) for m in model.modules()}
    for module in model.modules():
        feed = module.__dict__.get(_FEED)
        if feed is None:
            continue
        feed.entries = [e for e in feed.entries if id(e) in alive]
        if not feed.entries:
            del module.__dict__[_FEED]
            module.__class__ = getattr(type(module), _PLAIN)


def _adapt(module: nn.Module, entry: Any, part: Part, around: Any) -> None:
    kinds = inspect.Parameter
    given = inspect.signature(module.forward).parameters.values()
    by_position = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    names = tuple(p.name for p in given if p.kind in by_position)
    known = module.__dict__.get(_FEED)
    if known is not None:
        known.entries += [] if any(e is entry for e in known.entries) else [entry]
        return
    if "forward" in module.__dict__:
        raise BindError(
            "the model's forward is replaced on the object, so that its class does not decide",
            site=entry.site,
            remedy="bind first, and wrap forward afterwards",
        )
    # the encoder names its ids itself; HF calls them input_ids everywhere
    ids = around["ids"] if around["ids"] in names else "input_ids"
    generates = hasattr(module, "can_generate") and bool(module.can_generate())  # type: ignore
    module.__dict__[_FEED] = Feed([entry], part, ids, around["placeholder"], names, generates)
    kind: Any = type(module)
    module.__class__ = _lengthening(kind)


@functools.cache
def _lengthening(cls: Any) -> type[nn.Module]:
    """A subclass of *cls* whose ``forward`` lengthens its inputs first."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        feed: Feed = self._peftfx_feed
        entry = feed.entry
        if entry is None:
            return cls.forward(self, *args, **kwargs)
        state: State = entry.state
        before = state.now
        named, now = _lengthened(feed, entry, args, kwargs)
        state.now = now
        try:
            return cls.forward(self, **named)
        finally:
            state.now = before

    # Dynamo keeps what it compiled with the code object: one for each class, as without us
    code: Any = forward
    code.__code__ = code.__code__.replace()
    return stand_in(cls, _lengthening, forward=forward, **{_PLAIN: cls})


# -- what is lengthened, and how -------------------------------------------------------------------


def _lengthened(
    feed: Feed, entry: Any, args: Any, kwargs: Any
) -> tuple[dict[str, Any], str | None]:
    """The inputs by name, lengthened, and the state of the mark while they are worked on."""
    if len(args) > len(feed.names):
        raise NotAdaptedError("the model takes inputs without names: they cannot be lengthened")
    named = {**dict(zip(feed.names, args, strict=False)), **kwargs}
    length: int = entry.method.length
    if feed.part == "decoder":
        return _for_decoder(named, length), entry.state.now
    ids = named.get(feed.ids)
    if ids is None:
        raise NotAdaptedError(
            f"the model runs without {feed.ids}: the virtual tokens go in where ids are embedded",
            remedy=f"pass {feed.ids} instead of embeddings",
        )
    cache = named.get("past_key_values")
    first = feed.part == "encoder" or cache is None or fresh(cache)
    mask = named.get("attention_mask")
    if isinstance(mask, dict):
        masks = {k: _mask(m, feed, ids, cache, first, length) for k, m in mask.items()}
        named["attention_mask"] = masks
    elif mask is not None:
        named["attention_mask"] = _mask(mask, feed, ids, cache, first, length)
    positions = named.get("position_ids")
    if not first and positions is not None:
        _follow(positions, cache, mask is None, length)
    # positions count from the first virtual token, as the model does by itself
    for name in ("position_ids", "cache_position", *(["token_type_ids"] if feed.generates else [])):
        named.pop(name, None)
    if first:
        if cache is not None:
            _grow(cache, length)
        _lengthen_rows(feed, named, ids, length)
    return named, "write" if first else "skip"


def _lengthen_rows(feed: Feed, named: dict[str, Any], ids: Tensor, length: int) -> None:
    """Everything that has a value for each token."""
    for name, value in list(named.items()):
        if name == feed.ids:
            named[name] = F.pad(ids, (length, 0), value=feed.placeholder)
        elif name == "token_type_ids" and value is not None:
            named[name] = F.pad(value, (length, 0), value=0)
        elif name == "labels" and value is not None:
            if value.shape == ids.shape:
                named[name] = F.pad(value, (length, 0), value=_SILENT)
        elif name in ("start_positions", "end_positions") and value is not None:
            named[name] = value + length
        elif name in ("attention_mask", "decoder_input_ids", "decoder_attention_mask"):
            continue
        elif isinstance(value, Tensor) and value.ndim > 1 and value.shape[:2] == ids.shape:
            raise NotAdaptedError(
                f"nothing says how {name} of shape {tuple(value.shape)} is lengthened",
                remedy="leave it out, or use a method that keeps the length, e.g. prefix",
            )


def _for_decoder(named: dict[str, Any], length: int) -> dict[str, Any]:
    """Inputs of an encoder-decoder: of what it passes on, only the encoder's mask is longer."""
    mask, encoded = named.get("attention_mask"), named.get("encoder_outputs")
    if encoded is not None and (mask is None or encoded[0].shape[1] != mask.shape[1] + length):
        raise NotAdaptedError(
            "these encoder_outputs do not show that they have the virtual tokens in them",
            remedy="take them from the adapted model's encoder, and pass its attention_mask",
        )
    if mask is not None:
        named["attention_mask"] = F.pad(mask, (length, 0), value=1)
    return named


def _mask(
    mask: Tensor | None, feed: Feed, ids: Tensor, cache: Any, first: bool, length: int
) -> Tensor | None:
    """The mask with columns for the virtual tokens, which everybody sees."""
    if mask is None:
        return None
    if mask.ndim == 2:
        tokens = ids.shape[1]
        if not first and not _static(cache):
            tokens = tokens + cache.get_seq_length() - length
        if feed.part == "encoder" and mask.shape[1] == tokens + length:
            return mask  # by the model around it
        if mask.shape[1] != tokens and not _static(cache):
            raise NotAdaptedError(
                f"the mask has {mask.shape[1]} columns for {tokens} tokens",
                remedy="a cache that is used again holds the virtual tokens too: start with none",
            )
        return F.pad(mask, (length, 0), value=1)
    if mask.ndim != 4 or not _static(cache):
        raise NotAdaptedError(
            f"a mask of {mask.ndim} dimensions was made before the virtual tokens came in",
            remedy="pass a mask of two dimensions: sequences, tokens",
        )
    return _ready_mask(mask, cache, first, length)


def _ready_mask(mask: Tensor, cache: Any, first: bool, length: int) -> Tensor:
    """The mask that ``generate`` makes for a static cache: [B, 1, S, slots of the cache].

    It was made for tokens that begin at slot 0; they begin after the virtual ones.
    """
    seen = 1 if mask.dtype == torch.bool else 0
    unseen = 0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    if first:
        rows = F.pad(mask, (length, 0), value=seen)  # [B, 1, S, P + slots]
        triangle = torch.ones(length, rows.shape[-1], device=mask.device).tril() > 0
        if mask.dtype != torch.bool:
            triangle = torch.zeros_like(triangle, dtype=mask.dtype).masked_fill(~triangle, unseen)
        front = triangle.expand(*mask.shape[:2], length, rows.shape[-1])
        return torch.cat([front, rows], dim=2)
    slots, steps = mask.shape[-1], mask.shape[2]
    moved = F.pad(mask[..., : slots - length], (length, 0), value=seen)
    slot = torch.arange(slots, device=mask.device)
    step = torch.arange(steps, device=mask.device)
    filled = slot <= cache.get_seq_length() + step[:, None]  # [S, slots]
    return moved & filled if mask.dtype == torch.bool else moved.masked_fill(~filled, unseen)


# -- caches ----------------------------------------------------------------------------------------


def _static(cache: Any) -> bool:
    return bool(getattr(cache, "is_compileable", False))


def fresh(cache: Any) -> bool:
    """Whether nothing is in the cache yet.

    How full a static cache is only its tensors know, which no graph may ask; one that has its
    memory has to hold something, or the virtual tokens would be left out.
    """
    if not hasattr(cache, "get_seq_length"):
        raise NotAdaptedError(f"a cache of type {type(cache).__name__} is not known")
    if not _static(cache):
        return bool(cache.get_seq_length() == 0)
    if not cache.layers[0].is_initialized:
        return True
    _hold(
        cache.get_seq_length() > 0,
        "a static cache was emptied or made beforehand, and the virtual tokens are not in it",
        "pass a new one",
    )
    return False


def _follow(positions: Tensor, cache: Any, whole: bool, length: int) -> None:
    """Holds that the tokens are those that come next: HF counts the virtual ones as its own.

    Args:
        whole: no row has padding, or there would be a mask.
    """
    tokens = cache.get_seq_length() - length
    starts = positions.reshape(-1, positions.shape[-1])[:, 0]
    _hold(
        ((starts == tokens) if whole else (starts <= tokens)).all(),
        "the tokens do not follow on those in the cache, which holds the virtual tokens too",
        "start with an empty cache",
    )


def _hold(condition: Tensor, message: str, remedy: str) -> None:
    """Refuses where *condition* is false. A graph cannot ask: it fails with torch's own error."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, f"peftfx: {message}; {remedy}")
    elif not bool(condition):
        raise NotAdaptedError(message, remedy=remedy)


def _grow(cache: Any, length: int) -> None:
    """Gives a static cache that has no memory yet room for the virtual tokens."""
    if not _static(cache):
        return
    for layer in cache.layers:
        if getattr(layer, "is_sliding", False):
            raise NotAdaptedError(
                "a static cache with a sliding window has no room for virtual tokens",
                remedy="generate with a dynamic cache",
            )
        layer.max_cache_len = layer.max_cache_len + length
