"""Factors of a method that Inductor takes into loops that are there anyway: counted in its code."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from peftfx.backends import Backend

SCALED = {
    "method": "ia3", "name": ["key", "down"], "overrides": [{"name": "down", "at": "input"}],
}  # fmt: skip


class Net(nn.Module):
    """One linear whose output, and one whose input is scaled; loops beside both."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.up, self.down = nn.Linear(24, 24), nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(F.gelu(self.up(torch.tanh(self.key(x)))))
        return out


def launches(adapted: bool, train: bool) -> list[tuple[int, int]]:
    """Of each graph (forward, backward): calls of Inductor's own kernels, and of the library's."""
    torch._dynamo.reset()
    model, x = Net().requires_grad_(False), torch.randn(6, 24, requires_grad=train)
    if adapted:
        backend: Any = Backend({"rules": [SCALED]}, "inductor")
        backend.bind(model, (x,))
    else:
        backend = "inductor"
    run = torch.compile(model, backend=backend, fullgraph=True)

    def step() -> None:
        out = run(x)
        if train:
            out.sum().backward()

    with torch.set_grad_enabled(train):
        _, sources = run_and_get_code(step)
    own, library = re.compile(r"^\s+cpp_fused_\w+\(", re.M), re.compile(r"extern_kernels\.\w+\(")
    return [(len(own.findall(s)), len(library.findall(s))) for s in sources]


@pytest.mark.slow
def test_ia3_adds_no_launch() -> None:
    """IA³'s factors are part of the neighbouring loops: of the activation, and of the gradients.

    In the backward the sums that are the vectors' gradients share a kernel with them too.
    """
    forward = launches(adapted=False, train=False)
    assert len(forward) == 1 and min(forward[0]) > 0
    assert launches(adapted=True, train=False) == forward
    both = launches(adapted=False, train=True)
    assert len(both) == 2
    assert launches(adapted=True, train=True) == both
