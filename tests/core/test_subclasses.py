"""Weights and activations that are no plain tensors: adapted without W, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.two_tensor import TwoTensor

import peftfx
from peftfx.errors import NotAdaptedError
from tests.helpers import fill, relative

SPEC = {"rules": [{"method": "lora", "name": ["0", "2"], "rank": 2}]}


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5)).requires_grad_(False)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[object]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_subclassed_weight_goes_without_w() -> None:
    """A weight that is a tensor subclass (quantised weights are) stays in its own linear."""
    x, plain = torch.randn(3, 8), base()
    model = copy.deepcopy(plain)
    for i in (0, 2):
        weight = model[i].weight.detach()
        model[i].weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    backend = peftfx.backend(SPEC, lower="aot_eager")
    for m in (plain, model):
        backend.bind(m, (x,))
        fill(peftfx.parameters(m))
    out = torch.compile(model, backend=backend, fullgraph=True)(x)
    out = out.a if isinstance(out, TwoTensor) else out
    assert relative(out, plain(x)) < 1e-6
    steps = {s.name: s for s in backend.reports[-1].steps}
    assert steps["insert"].rewrites == 2 and steps["fuse"].rewrites == 0
    assert {r.reason for r in steps["fuse"].refusals} == {"the weight is a TwoTensor"}


def test_fsdp2_by_block(mesh: object) -> None:
    """Sharded block by block, each compiled: outputs and gradients of the plain model."""
    x, plain = torch.randn(3, 8), base()
    model = copy.deepcopy(plain)
    backend = peftfx.backend(SPEC, lower="aot_eager")
    for m in (plain, model):
        backend.bind(m, (x,))
        fill(peftfx.parameters(m))
    for i in (0, 2):
        fully_shard(model[i])
    fully_shard(model)
    for i in (0, 2):
        model[i].compile(backend=backend)
    out, expected = model(x), plain(x)
    assert relative(out, expected) < 1e-6
    out.square().sum().backward()
    expected.square().sum().backward()
    for name, p in plain.named_parameters():
        grad = model.get_parameter(name).grad
        assert (grad is None) == (p.grad is None), name
        if p.grad is not None:
            assert relative(grad.full_tensor(), p.grad) < 1e-6, name


def test_tensor_parallel_modules_are_refused(mesh: object) -> None:
    x, model = torch.randn(3, 8), base()
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    backend = peftfx.backend(SPEC, lower="aot_eager")
    backend.bind(model, (x,))
    with pytest.raises(NotAdaptedError, match="DTensors"):
        model(x)
    with pytest.raises(Exception, match="not split along"):  # inside an error of Dynamo's
        torch.compile(model, backend=backend)(x)
