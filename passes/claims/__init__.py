"""Claims: what can compute an op. The definition is last, and always can.

Of the claims that can, the lowering takes the cheapest (:mod:`.cost`), or the first where no price
is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from peftfx import dynamo
from peftfx.kernels.linear_cross_entropy import op as losses
from peftfx.kernels.low_rank_linear import op as low_rank
from peftfx.kernels.philox import op as philox
from peftfx.kernels.prefix_attention import op as prefix
from peftfx.kernels.shrink import op as producers
from peftfx.kernels.sparse_add import op as sparse
from peftfx.passes.claims import fused
from peftfx.passes.claims.kernels import Kept, Triton
from peftfx.passes.claims.library import Accumulate, Folded
from peftfx.passes.claims.shrink import Shrink


class Claim(Protocol):
    """Something that can compute an op: a kernel, or another form of its products."""

    @property
    def name(self) -> str: ...

    @property
    def ops(self) -> tuple[str, ...]: ...

    def check(self, op: str, args: Sequence[Any]) -> str | None:
        """None if the claim can compute this call (fake tensors for tensors), else the reason."""
        ...

    @property
    def emit(self) -> Callable[..., Any] | None:
        """The form, called with the op's name and arguments, traceable. None: the op stays as it
        is, and its own kernel is called."""
        ...


@dataclass(frozen=True)
class Definition:
    """The op's own definition: always right, never refused."""

    name: str = "definition"
    ops: tuple[str, ...] = (
        *low_rank.DEFINITIONS, *prefix.DEFINITIONS, *fused.DEFINITIONS, *producers.DEFINITIONS,
        "dropout",
    )  # fmt: skip

    def check(self, op: str, args: Sequence[Any]) -> str | None:
        return None

    def emit(self, op: str, *args: Any) -> Any:
        tables = (
            low_rank.DEFINITIONS, prefix.DEFINITIONS, fused.DEFINITIONS, producers.DEFINITIONS,
        )  # fmt: skip
        return next((t[op] for t in tables if op in t), philox.dropout)(*args)


@dataclass(frozen=True)
class InductorRandom:
    """Masks by Inductor's own generator, which is the same Philox, inside the fused loop.

    Written out, ten rounds of integer arithmetic would be inlined again and again.
    """

    name: str = "inductor's random"
    ops: tuple[str, ...] = ("dropout",)

    def check(self, op: str, args: Sequence[Any]) -> str | None:
        if args[0].device.type == "cpu":
            return "it makes one number at a time on the CPU"
        if dynamo.hint(args[0].numel()) >= 2**31:
            return "an index has more than 31 bits"
        return None

    def emit(self, op: str, *args: Any) -> Any:
        x, seed, p, site = args
        numbers = dynamo.inductor_random(list(x.shape), philox.stream(seed, site))
        return philox.masked(x, numbers >= p, p)


KEPT = (
    Kept("chunks, rows by Triton", tuple(losses.SCHEMAS), kernels=True),
    Kept("chunks, rows by torch", tuple(losses.SCHEMAS)),
    Kept("sums by Triton", tuple(sparse.SCHEMAS), kernels=True),
    Kept("sparse products", tuple(sparse.SCHEMAS)),
)
CLAIMS: tuple[Claim, ...] = (
    Triton(), Triton("opaque"), fused.Fused(), Shrink(), Accumulate(), Folded(),
    *KEPT, Definition(),
)  # fmt: skip
INDUCTOR_CLAIMS: tuple[Claim, ...] = (InductorRandom(), *CLAIMS)
