"""What launches need: the launcher itself, what is passed to kernels, and what they can take."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from peftfx import dynamo
from peftfx.kernels.devices import INTERPRETER, Device
from peftfx.kernels.low_rank_linear.configs import Config, Shape, config, has
from peftfx.kernels.philox.op import offset

SITES = 3  # that one launch can join
FEW = 64  # rows for which W's bytes are all that counts
MOST_R = 64  # ranks in one tile
DEPTH = 512  # of K, that one program of the launch for few rows makes S of
POLLS = 100  # looks at a counter, some 0.1 ms, before a program does what others should have done
COUNTERS = 4  # numbers of a counter: 16 bytes, so that one behind another is as aligned
STEP_R = 32  # ranks in one step where registers are scarce: beside a wide product, and in fp32
Configs = Callable[[str, Device, Shape], Config]


@dataclass(frozen=True)
class Drop:
    """Dropout of x; none where there is no seed."""

    seed: Tensor | None = None
    p: float = 0.0
    site: int = 0


KEEP = Drop()  # no dropout


@dataclass(frozen=True)
class Runner:
    """Launches kernels: straight away, or as nodes of the graph that is being traced.

    Args:
        device: what the kernels run on.
        traced: whether a trace is going on, that is to record the launches.
        descriptors: whether kernels with tensor descriptors may be used. A trace cannot record
            them, and they want sizes that are known.
        configs: where tiles come from.
    """

    device: Device
    traced: bool = False
    descriptors: bool = True
    configs: Configs = config

    def __call__(self, kernel: Any, grid: tuple[Any, ...], **arguments: Any) -> None:
        if self.device.target == INTERPRETER:
            arguments = {k: v for k, v in arguments.items() if k not in ("num_warps", "num_stages")}
        elif self.traced:
            kernel = torch.library.wrap_triton(kernel)
        kernel[grid](**arguments)

    def describes(
        self, kernel: str, matrices: Sequence[Tensor], shape: Shape, outs: Sequence[int]
    ) -> bool:
        """Whether the form of *kernel* with descriptors is there, can read these, and pays.

        It makes one of *outs* at a time: each must fill the device, which joined ones need not.
        """
        name = f"{kernel}_descriptor"
        if not self.descriptors or self.traced or not all(describable(t) for t in matrices):
            return False
        if not has(name, self.device.target, shape.dtype):
            return False
        chosen = self.config(name, shape)
        tiles = cdiv(min(outs), chosen.block_n) * cdiv(shape.m, chosen.block_m)
        return len(outs) == 1 or tiles >= 2 * self.device.processors

    def config(self, kernel: str, shape: Shape) -> Config:
        return self.configs(kernel, self.device, shape)

    def matrix(self, t: Tensor) -> Tensor:
        """*t* as a matrix whose rows are contiguous. Pass `lower` takes the alias for a sign that
        it has to lie in memory."""
        return torch.ops.aten.alias(matrix(t)) if self.traced else matrix(t)

    def counter(self, like: Tensor) -> Tensor:
        """A counter for one launch, at 0; pass `lower` makes one fill of all in a graph."""
        return torch.full((COUNTERS,), 0, dtype=torch.int32, device=like.device)

    def parts(self, chosen: Config, programs: int, most: int) -> int:
        """How often to split a sum so that *programs* fill the device twice; from 1 to *most*."""
        if chosen.parts:
            return max(1, min(chosen.parts, most))
        return max(1, min(-(-2 * self.device.processors // max(programs, 1)), most))


@functools.cache
def kernels() -> Any:
    """The kernels by their short names; imports Triton."""
    from peftfx.kernels.low_rank_linear import triton as wide
    from peftfx.kernels.low_rank_linear.descriptors import triton as described
    from peftfx.kernels.low_rank_linear.factors import triton as thin

    return SimpleNamespace(
        fwd=wide.low_rank_linear_fwd_kernel,
        dx=wide.low_rank_linear_dx_kernel,
        decode=wide.low_rank_linear_decode_kernel,
        s=thin.low_rank_linear_s_kernel,
        dsb=thin.low_rank_linear_dsb_kernel,
        da=thin.low_rank_linear_da_kernel,
        sum=thin.low_rank_linear_sum_kernel,
        fwd_descriptor=described.low_rank_linear_fwd_descriptor_kernel,
        dx_descriptor=described.low_rank_linear_dx_descriptor_kernel,
        descriptor=described.descriptor,
    )


# -- arguments -----------------------------------------------------------------------------------


def matrix(t: Tensor) -> Tensor:
    """*t* as a matrix whose rows are contiguous."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if dynamo.surely_equal(rows.stride(1), 1) else rows.contiguous()


def alike(weights: Sequence[Tensor]) -> list[Tensor]:
    """*weights* [N, K], with the same strides: one launch has only one pair of them."""
    if len({w.stride() for w in weights}) > 1:
        return [w.contiguous() for w in weights]
    return list(weights)


def describable(t: Tensor) -> bool:
    """Whether a tensor descriptor can be made of the matrix *t*: 16 bytes are its measure."""
    return (
        isinstance(t.shape[0], int)
        and t.shape[0] > 0
        and t.stride(1) == 1
        and t.stride(0) * t.itemsize % 16 == 0
        and t.stride(0) >= t.shape[1]
        and (t.device.type == "meta" or t.data_ptr() % 16 == 0)
    )


def joined(A: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The A's of several sites as one [ΣR, K]."""
    return A[0].contiguous() if len(A) == 1 else torch.cat([a.to(dtype) for a in A])


def three(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """Arguments *name*0 … *name*2; those that no site has repeat the first."""
    return {f"{name}{i}": values[i if i < len(values) else 0] for i in range(SITES)}


def dropping(drop: Drop, other: Tensor) -> dict[str, Any]:
    """Arguments of a kernel that may drop; *other*, of the launch's own, is where no seed is."""
    seed = other if drop.seed is None else drop.seed.to(other.device)
    return {
        "seed": seed, "stream": offset(drop.site), "p": float(drop.p),
        "rest": 1.0 / (1.0 - drop.p), "DROPS": drop.seed is not None,
    }  # fmt: skip


def shift(
    bias: Tensor | None, lora_bias: Tensor | None, scale: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """What is added to every row: the bias and the scaled bias of B, [N] fp32."""
    if lora_bias is None:
        return None if bias is None else bias.float()
    low = (lora_bias * scale).to(dtype).float()
    return low if bias is None else bias.float() + low


def precision(dtype: torch.dtype, device: Device) -> str:
    """How products are made: those of fp32 as torch is told to make them."""
    if device.target == INTERPRETER:
        return "fp32"
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return "tf32" if dtype == torch.float32 and tf32 and device.target.startswith("sm_") else "ieee"


def one_launch(shape: Shape, ranks: Sequence[int]) -> bool:
    """Whether the forward is the kernel for few rows."""
    return shape.m <= FEW and max(ranks) <= most_r(shape.dtype) and not shape.drops


def block_r(ranks: Sequence[int], most: int = MOST_R) -> int:
    """Width of a tile of ranks: a power of two from 16 to *most*."""
    return min(most, max(16, 1 << (max(ranks) - 1).bit_length()))


def thin_r(ranks: Sequence[int], dtype: torch.dtype) -> int:
    """Width of a tile of ranks in a thin product."""
    return block_r(ranks, most_r(dtype))


def most_r(dtype: torch.dtype) -> int:
    """Ranks in one tile."""
    return STEP_R if dtype == torch.float32 else MOST_R


def columns(outs: Sequence[int], block: int) -> int:
    """How many columns of tiles the sites have."""
    return sum(cdiv(n, block) for n in outs)


def cdiv(a: Any, b: Any) -> Any:
    return -(-a // b)
