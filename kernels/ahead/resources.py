"""What the kernels take on each target, by Triton version: ``resources.json``, made by compiling.

``python -m peftfx.kernels.ahead --accept`` writes the installed version's part anew.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peftfx.kernels.measured import triton_version

FILE = Path(__file__).parent / "resources.json"
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


@functools.cache
def recorded() -> Mapping[str, Table]:
    """The content of the file: Triton version → variant → launch → resources."""
    content: Mapping[str, Table] = json.loads(FILE.read_text()) if FILE.exists() else {}
    return content


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
    content = {**recorded(), minor(triton_version()): found}
    lines = ["{"]
    for version, table in sorted(content.items()):
        lines.append(f' "{version}": {{')
        for variant, launches in table.items():
            lines.append(f'  "{variant}": {{')
            rows = [f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in launches.items()]
            lines += [row + "," for row in rows[:-1]] + [rows[-1], "  },"]
        lines[-1] = "  }"
        lines.append(" },")
    lines[-1] = " }"
    FILE.write_text("\n".join([*lines, "}"]) + "\n")
    recorded.cache_clear()
