"""What all tests share: one thread, fresh compiler state, no network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

from peftfx.kernels import measured
from peftfx.kernels.measured import Table

settings.register_profile(
    "default",
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    """Triton's interpreter stands in for a GPU, but for ``-m gpu``. Decided before any import."""
    real = config.getoption("markexpr") == "gpu"
    os.environ.setdefault("TRITON_INTERPRET", "0" if real else "1")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Every test starts with an empty compile cache and the same random numbers."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Table], None]:
    """Says what was measured on a device, in place of the tables on disk."""
    tables: dict[str, Table] = {}
    monkeypatch.setattr(measured, "table", lambda device: tables.get(device, Table()))
    return tables.__setitem__
