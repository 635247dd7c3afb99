"""Ops whose kernels take them in one launch: row norms and bottlenecks.

``triton_<op>`` has the schema of ``<op>`` and runs its kernel. Where a compiler can see through
launches it is given :func:`compute` under a trace instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftfx.errors import GraphError
from peftfx.kernels.bottleneck import launch as bottleneck
from peftfx.kernels.bottleneck import op as bottleneck_op
from peftfx.kernels.devices import describe
from peftfx.kernels.low_rank_linear.forms import OPAQUE
from peftfx.kernels.low_rank_linear.runner import Runner
from peftfx.kernels.low_rank_norms import launch as norms
from peftfx.kernels.low_rank_norms import op as norms_op


@dataclass(frozen=True)
class Form:
    """What there is of one op.

    Attributes:
        launch: runs the kernel, given a :class:`Runner` and the op's arguments.
        unsuited: why it cannot take a call, None if it can.
        work: operations and bytes of each launch, by form, given op, arguments and processors.
    """

    schema: str
    definition: Callable[..., Any]
    launch: Callable[..., Any]
    unsuited: Callable[..., str | None]
    work: Callable[[str, Sequence[Any], int], dict[str, list[tuple[int, int]]]]


FORMS: dict[str, Form] = {
    "low_rank_norms": Form(
        norms_op.SCHEMA, norms_op.low_rank_norms, norms.low_rank_norms, norms.unsuited,
        norms_op.work,
    ),
    "bottleneck": Form(
        bottleneck_op.SCHEMAS["bottleneck"], bottleneck_op.bottleneck, bottleneck.bottleneck,
        bottleneck.unsuited, bottleneck_op.work,
    ),
    "bottleneck_backward": Form(
        bottleneck_op.SCHEMAS["bottleneck_backward"], bottleneck_op.bottleneck_backward,
        bottleneck.bottleneck_backward, bottleneck.unsuited_backward, bottleneck_op.work,
    ),
}  # fmt: skip


def compute(name: str, args: Sequence[Any], **how: Any) -> Any:
    """Runs the kernel of op *name*, or records its launch in the trace that is going on.

    Args:
        how: what a :class:`Runner` takes beside the device.
    """
    first: Tensor = args[0]
    device = describe(first.device)
    if device is None:
        raise GraphError(f"there is no kernel of peftfx::{name} for {first.device}")
    return FORMS[name].launch(Runner(device, **how), *args)


_library = torch.library.Library("peftfx", "FRAGMENT")


def _define(name: str, form: Form) -> None:
    def launch(*args: Any) -> Any:
        with torch.cuda.device_of(args[0]):
            return compute(name, args)

    _library.define(OPAQUE + name + form.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(OPAQUE + name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftfx::{OPAQUE}{name}", form.definition, lib=_library)


for _name, _form in FORMS.items():
    _define(_name, _form)
