"""Philox 4×32-10: random numbers as a function of (seed, site, index), never stored.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The sequence is that of
``triton.language.rand(seed, offset)``, so that a kernel regenerates the very same mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftfx.kernels.definition import define

ROUNDS = 10
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_SCALE = 4.6566127342e-10  # tl.rand's: just under 2^-31, so that the result stays below 1


def philox(
    key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words for each counter. All tensors are int64 and hold unsigned 32-bit values."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        # a product wraps around in int64; its two halves are right all the same
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def offset(site: int) -> int:
    """What a site adds to the seed, to have a stream of its own."""
    return (site * _WEYL[0]) & 0x7FFFFFFF


def stream(seed: Tensor, site: int) -> Tensor:
    """The 31-bit key of a site's own stream; int64, shape ``[]``."""
    return (seed + offset(site)) & 0x7FFFFFFF


def uniform(seed: Tensor, site: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Uniform fp32 numbers in [0, 1) of *shape*: ``tl.rand(stream(seed, site), row-major index)``.

    Args:
        seed: int64, shape ``[]``.
        site: keeps apart the places that share a seed.
    """
    count = 1
    for size in shape:
        count = count * size
    index = torch.arange(count, dtype=torch.int64, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    key = (stream(seed.to(device), site), zero)
    word, _, _, _ = philox(key, (index & _MASK, index >> 32, zero, zero))
    signed = torch.where(word >= 2**31, 2**32 - 1 - word, word)  # x < 0 ? -x - 1 : x
    return (signed.to(torch.float32) * _SCALE).reshape(list(shape))


def keep_mask(like: Tensor, seed: Tensor, p: float, site: int) -> Tensor:
    """Where *like* is kept: bool of its shape, True with probability ``1 - p``. Also an op."""
    return uniform(seed, site, like.shape, like.device) >= p


def masked(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """x where *keep* is, scaled by ``1 / (1 - p)``; zero elsewhere, whatever x is there."""
    return torch.where(keep, x * (1.0 / (1.0 - p)), torch.zeros_like(x))


def dropout(x: Tensor, seed: Tensor, p: float, site: int) -> Tensor:
    """x with a share *p* of its elements zeroed and the others scaled by ``1 / (1 - p)``.

    Also the op ``peftfx::dropout``, whose backward regenerates the mask from the seed.
    """
    return masked(x, torch.ops.peftfx.keep_mask(x, seed, p, site), p)


def uniform_like(like: Tensor, seed: Tensor, site: int) -> Tensor:
    """Uniform fp32 numbers in [0, 1) of the shape of *like*. Also an op, without a gradient."""
    return uniform(seed, site, like.shape, like.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.p, ctx.site = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (seed,) = ctx.saved_tensors
    return torch.ops.peftfx.dropout(grad, seed, ctx.p, ctx.site), None, None, None


library = torch.library.Library("peftfx", "FRAGMENT")
library.define(
    "dropout(Tensor x, Tensor seed, float p, int site) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "keep_mask(Tensor like, Tensor seed, float p, int site) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "uniform_like(Tensor like, Tensor seed, int site) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _definition in (dropout, keep_mask, uniform_like):
    define(library, _definition.__name__, _definition)
    torch.library.register_fake(f"peftfx::{_definition.__name__}", _definition, lib=library)
torch.library.register_autograd("peftfx::dropout", _backward, setup_context=_setup, lib=library)
