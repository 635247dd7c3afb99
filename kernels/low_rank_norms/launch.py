"""Host side of the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from peftfx.kernels.low_rank_linear.runner import MOST_R, Runner, block_r, cdiv, precision

BLOCK_N = 16  # rows of a program: W's bytes are all that counts, so that many programs read it
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsuited(weight: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> str | None:
    """Why the kernel cannot take a call, if it cannot."""
    if weight.dtype not in DTYPES or A.dtype not in DTYPES:
        return f"there is no kernel for {weight.dtype} and {A.dtype}"
    if A.shape[0] > MOST_R:
        return f"the rank is {A.shape[0]}, one tile holds {MOST_R}"
    return None


def low_rank_norms(run: Runner, weight: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """The lengths [N] in fp32."""
    (n, k), r = weight.shape, A.shape[0]
    wide, A, B = A.float(), A.contiguous(), B.contiguous()
    out = A.new_empty(n, dtype=torch.float32)
    step = 128 if weight.element_size() == 2 and r <= 32 else 64
    from peftfx.kernels.low_rank_norms.triton import low_rank_norms_kernel as kernel

    run(
        kernel, (cdiv(n, BLOCK_N),),
        w=weight, a=A, b=B, gram=wide @ wide.t(), scale=scale, out=out, N=n, K=k, R=r,
        w_n=weight.stride(0), w_k=weight.stride(1), BLOCK_N=BLOCK_N, BLOCK_K=step,
        BLOCK_R=block_r([r]), EVEN=k % step == 0, PRECISION=precision(weight.dtype, run.device),
        EXACT="fp32" if run.device.target == "interpreter" else "ieee", num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
