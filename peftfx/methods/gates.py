"""Gates: how far what an adapter adds is let through, of what the site is given.

    g = σ(G·h + b)      G [1, K], for each token, or averaged over those of a sequence

UniPELT, Mao et al., 2022 (arXiv 2110.07577), whose gates of adapters, LoRA and prefixes are
averages. An average knows of later tokens and of padding, and in each step of a generation it is
that step's: a decoder is better served by gates of tokens. A gate starts half open.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.errors import NotAdaptedError
from peftfx.methods.method import Param


def params(width: int) -> dict[str, Param]:
    """Its tensors, for an h of that width."""
    zeros = torch.nn.init.zeros_
    return {"gate": Param((1, width), zeros), "gate_bias": Param((1,), zeros)}


def opened(gate: str, h: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """g of h ``[..., S, K]``, in h's dtype: ``[..., S, 1]``, of a sequence ``[..., 1, 1]``."""
    g = torch.sigmoid(F.linear(h, p["gate"].to(h.dtype), p["gate_bias"].to(h.dtype)))
    if gate == "token":
        return g
    if isinstance(h.ndim, int) and h.ndim < 3:  # an fx graph alone does not tell
        raise NotAdaptedError(
            f"a gate of sequences [B, S, K] is given {tuple(h.shape)}", remedy="gate: token"
        )
    return g.mean(-2, keepdim=True)
