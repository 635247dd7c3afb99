"""``peftfx::fastfood``: a fixed random projection of a short vector to a long one.

    v = H·G·Π·H·B·θ / c,   block by block

Le et al., 2013 (Fastfood). H is a Hadamard matrix, B signs, G normal numbers, Π a permutation. They
come from a seed when they are needed, so that nothing is stored. ``theta [d]`` is padded to a power
of two; the D numbers of v are of as many independent blocks as they take. c makes the columns of
the projection unit vectors on average.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from peftfx.kernels.definition import define
from peftfx.kernels.philox import op as philox

_library = torch.library.Library("peftfx", "FRAGMENT")
SCHEMAS = {
    "fastfood": "(Tensor theta, Tensor seed, int size) -> Tensor",
    "fastfood_backward": "(Tensor dv, Tensor seed, int dimension) -> Tensor",
}
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def hadamard(t: Tensor) -> Tensor:
    """t with its last axis, a power of two, transformed by Hadamard's matrix (no scale)."""
    shape, half = t.shape, 1
    while half < shape[-1]:
        a, b = t.reshape(*shape[:-1], -1, 2, half).unbind(-2)
        t = torch.stack([a + b, a - b], -2).reshape(shape)
        half *= 2
    return t


CHUNK = 2**20  # numbers that are drawn at once


def length_of(dimension: int) -> int:
    """The power of two that θ is padded to."""
    return 1 << max(dimension - 1, 0).bit_length()


def drawn(
    seed: Tensor, first: int, last: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Signs B, normal numbers G and the order Π of the blocks *first* to *last*, [blocks, L]."""
    index = torch.arange(first * length, last * length, dtype=torch.int64, device=device)
    zero = torch.zeros_like(index)
    key = (philox.stream(seed.to(device), 0), zero[0])
    words = philox.philox(key, (index & 0xFFFFFFFF, index >> 32, zero, zero))
    signs, radius, angle, order = (w.reshape(last - first, length) for w in words)
    uniform = (radius.to(torch.float64) + 0.5) * 2.0**-32
    turn = (angle.to(torch.float64) + 0.5) * 2.0**-32
    normal = (-2 * uniform.log()).sqrt() * torch.cos(2 * math.pi * turn)  # Box and Muller, 1958
    return (signs & 1) * 2 - 1, normal, order.argsort(dim=-1, stable=True)


def _chunks(size: int, length: int) -> list[tuple[int, int]]:
    blocks, step = math.ceil(size / length), max(CHUNK // length, 1)
    return [(i, min(i + step, blocks)) for i in range(0, blocks, step)]


def fastfood(theta: Tensor, seed: Tensor, size: int) -> Tensor:
    """The *size* numbers that *theta* is projected to, in its dtype."""
    length = length_of(theta.shape[0])
    padded = torch.nn.functional.pad(theta, (0, length - theta.shape[0]))
    found = []
    for first, last in _chunks(size, length):
        signs, normal, order = drawn(seed, first, last, length, theta.device)
        v = hadamard(padded * signs.to(theta.dtype)).gather(-1, order)
        found.append(hadamard(v * normal.to(theta.dtype)).reshape(-1))
    return torch.cat(found)[:size] / math.sqrt(length * size)


def fastfood_backward(dv: Tensor, seed: Tensor, dimension: int) -> Tensor:
    """The transpose: the gradient of θ, ``[d]``."""
    size, length = dv.shape[0], length_of(dimension)
    total = dv.new_zeros(length)
    padded = torch.nn.functional.pad(dv, (0, -size % length))
    for first, last in _chunks(size, length):
        signs, normal, order = drawn(seed, first, last, length, dv.device)
        v = hadamard(padded[first * length : last * length].reshape(-1, length))
        v = torch.zeros_like(v).scatter(-1, order, v * normal.to(dv.dtype))
        total += (hadamard(v) * signs.to(dv.dtype)).sum(0)
    return total[:dimension] / math.sqrt(length * size)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    theta, seed, _ = inputs
    ctx.dimension = theta.shape[0]
    ctx.save_for_backward(seed)


def _backward(ctx: Any, dv: Tensor) -> tuple[Any, ...]:
    (seed,) = ctx.saved_tensors
    return torch.ops.peftfx.fastfood_backward(dv, seed, ctx.dimension), None, None


def _fake(theta: Tensor, seed: Tensor, size: int) -> Tensor:
    return theta.new_empty(size)


def _fake_backward(dv: Tensor, seed: Tensor, dimension: int) -> Tensor:
    return dv.new_empty(dimension)


define(_library, "fastfood", fastfood)
define(_library, "fastfood_backward", fastfood_backward)
torch.library.register_fake("peftfx::fastfood", _fake, lib=_library)
torch.library.register_fake("peftfx::fastfood_backward", _fake_backward, lib=_library)
torch.library.register_autograd("peftfx::fastfood", _backward, setup_context=_setup, lib=_library)
