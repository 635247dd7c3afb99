"""Compiles kernels without their GPU, and reads from the machine code what they will take there."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peftfx.kernels.devices import Target

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
    torch.int32: "*i32", torch.int8: "*i8",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What one program takes. ``spills``: bytes of registers that are kept in memory instead."""

    registers: int
    spills: int
    shared_memory: int
    instruction: str  # the tensor-core instruction that it uses, "" for none

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compile_for(target: Target, kernel: Any, arguments: Mapping[str, Any]) -> Resources:
    """Compiles *kernel* as it would be for a launch with *arguments* on *target*."""
    options = {k: v for k, v in arguments.items() if k in ("num_warps", "num_stages")}
    source = source_of(kernel, arguments)
    made = triton.compile(
        source, target=GPUTarget(target.backend, target.arch, target.warp), options=options
    )
    text = made.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    found = next((i for i in target.instructions if i in text), "")
    if target.backend == "cuda":
        registers, spills = _of_cubin(made.asm["cubin"])
    else:
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])  # type: ignore[index]
        spills = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])  # type: ignore[index]
    return Resources(registers, spills, made.metadata.shared, found)


def source_of(kernel: Any, arguments: Mapping[str, Any]) -> Any:
    """The kernel specialised as a launch specialises it: by dtype, by 16's that divide, by ones."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for number, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[(number,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(number,)] = [["tt.divisibility", 16]]
        elif hasattr(value, "block_shape"):
            signature[name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}{value.block_shape}>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(number,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _of_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, which is where spilled ones go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", shown)
    if usage is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {shown}")
    return int(usage[1]), max(int(usage[2]), int(usage[3]))
