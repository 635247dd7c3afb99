"""Two processes with DistributedDataParallel are one, or refused."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.conftest import Gave

SCENARIOS = "tests.distributed.ddp"
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ddp")]  # one launch for all


@pytest.mark.parametrize(
    "name",
    ["gradients_of_bert", "compiled_then_wrapped", "wrapped_then_compiled", "wrapped"],
)
def test_two_are_one(gave: Gave, name: str) -> None:
    """Gradients, or what three steps made of the adapter: one process's, and both alike."""
    one, two, other = gave(name, 1), gave(name), gave(name, rank=1)
    assert two.keys() == other.keys() == one.keys() and len(one) > 4
    for key, value in one.items():
        assert torch.allclose(two[key], value, atol=1e-6) and torch.equal(two[key], other[key]), key


def test_what_comes_too_late_is_refused(gave: Gave) -> None:
    for what, message in gave("too_late").items():
        assert "DistributedDataParallel" in message and "remedy" in message, what


def test_inference_may_switch(gave: Gave) -> None:
    assert gave("for_inference")
