"""Outputs that a compiled graph leaves out: whoever asks for their numbers is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftfx.errors import LossError

_KEPT = ("aten::detach", "aten::alias", "aten::_to_copy")  # what mixed precision does to outputs


class Unmade(Tensor):
    """Logits that were never made. They have a shape, a dtype and a device, and no numbers."""

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Unmade:
        made: Unmade = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Unmade({tuple(self.shape)}, {self.dtype}): loss='chunked' makes no logits"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._schema.name in _KEPT:
            given = kwargs or {}
            dtype, device = given.get("dtype"), given.get("device")
            return cls(args[0].shape, dtype or args[0].dtype, device or args[0].device)
        raise LossError(
            f"{func._schema.name} asks for logits, and `loss='chunked'` makes none in training",
            remedy="take what needs logits from a run under torch.no_grad(), or leave the option "
            "out",
        )


def refusing(compiled: Callable[..., Any], places: Sequence[int]) -> Callable[..., Any]:
    """*compiled*, whose outputs at *places* only stand in for what was not made."""
    if not places:
        return compiled

    def run(*args: Any, **kwargs: Any) -> Any:
        found = list(compiled(*args, **kwargs))
        for place in places:
            like = found[place]
            found[place] = Unmade(like.shape, like.dtype, like.device)
        return tuple(found)

    return run
