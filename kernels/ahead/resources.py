"""What the kernels take on each target, by Triton version: ``resources.json``, made by compiling.

``python -m peftfx.kernels.ahead --accept`` writes the installed version's part anew. Each part says
which sources it was made from, so that none is kept that is not of these.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftfx.kernels.measured import triton_version

FILE = Path(__file__).parent / "resources.json"
KERNELS = (
    "low_rank_linear/triton.py", "low_rank_linear/factors/triton.py",
    "low_rank_linear/descriptors/triton.py", "philox/triton.py",
)  # fmt: skip
VARIANTS = (  # target:dtype, with /tf32 where fp32 products may be made so
    "sm_80:bfloat16", "sm_80:float32", "sm_80:float32/tf32",
    "sm_90:bfloat16", "sm_90:float16", "sm_90:float32", "sm_90:float32/tf32",
    "sm_100:bfloat16", "sm_100:float32", "sm_100:float32/tf32",
    "gfx942:bfloat16", "gfx942:float32",
)  # fmt: skip
Table = dict[str, dict[str, dict[str, Any]]]  # variant → launch → resources


def minor(version: str) -> str:
    """``3.9`` of ``3.9.0``: what the file is keyed by."""
    return ".".join(version.split(".")[:2])


@dataclass(frozen=True)
class Recorded:
    """What one Triton made, and :func:`sources` of what it was made from."""

    sources: str
    table: Table


@functools.cache
def recorded() -> Mapping[str, Recorded]:
    """The content of the file, by Triton version, the oldest first."""
    content = json.loads(FILE.read_text()) if FILE.exists() else {}
    return {v: Recorded(content[v].pop("sources"), content[v]) for v in sorted(content, key=_order)}


def _order(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def sources() -> str:
    """Identifies the kernels' code and the calls that they are compiled for, comments left out."""
    from peftfx.kernels.ahead.launches import CALLS

    found = hashlib.sha256(repr(CALLS).encode())
    for name in KERNELS:
        text = (FILE.parents[1] / name).read_text()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type not in (tokenize.COMMENT, tokenize.NL):
                found.update(token.string.encode() + b"\0")
    return found.hexdigest()[:16]


def compiled(variants: Iterable[str]) -> Table:
    """Compiles *variants* now, in a process without Triton's interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "peftfx.kernels.ahead", *variants],
        capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found: Table = json.loads(done.stdout.splitlines()[-1])
    return found


def accept(found: Table) -> None:
    """Puts *found* into the file, as what the installed Triton makes."""
    content = {**recorded(), minor(triton_version()): Recorded(sources(), found)}
    lines = ["{"]
    for version in sorted(content, key=_order):
        lines += [f' "{version}": {{', f'  "sources": "{content[version].sources}",']
        for variant, launches in content[version].table.items():
            lines.append(f'  "{variant}": {{')
            rows = [f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in launches.items()]
            lines += [row + "," for row in rows[:-1]] + [rows[-1], "  },"]
        lines[-1] = "  }"
        lines.append(" },")
    lines[-1] = " }"
    FILE.write_text("\n".join([*lines, "}"]) + "\n")
    recorded.cache_clear()
