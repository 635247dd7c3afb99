"""``python -m peftfx.kernels.ahead [--accept | --producers] [TARGET:DTYPE …]``: what kernels take.

``--producers``: those of norms and gates, which no golden file is kept of.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "0"


def main(arguments: list[str]) -> None:
    import torch

    from peftfx.kernels.ahead import resources
    from peftfx.kernels.ahead.launches import launches, producers
    from peftfx.kernels.ahead.triton import compile_for
    from peftfx.kernels.devices import TARGETS

    found: resources.Table = {}
    made = producers if "--producers" in arguments else launches
    for item in [a for a in arguments if not a.startswith("--")] or resources.VARIANTS:
        target, _, name = item.partition(":")
        dtype, _, precision = name.partition("/")
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        found[item] = {
            launch.name: compile_for(TARGETS[target], launch.kernel, launch.arguments).as_dict()
            for launch in made(target, getattr(torch, dtype))
        }
    if "--accept" in arguments:
        resources.accept(found)
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
