"""FSDP2 in two processes: gradients and files of one, and nothing exchanged behind its back."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.conftest import Gave
from tests.helpers import relative

SCENARIOS = "tests.distributed.fsdp"
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("fsdp")]  # one launch for all


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_gradients_are_those_of_one(gave: Gave) -> None:
    one, two = gave("gradients", 1), gave("gradients")
    assert two.keys() == one.keys() and len(one) == 10
    assert all(relative(two[k], g) < 1e-5 for k, g in one.items())


def test_adapters_go_with_their_block(gave: Gave) -> None:
    assert gave("groups")


def test_training_is_that_of_one(gave: Gave) -> None:
    one, two = gave("three_steps", 1), gave("three_steps")
    assert two.keys() == one.keys()
    assert all(torch.allclose(two[k], t, atol=1e-5) for k, t in one.items())
    assert equal(two, gave("three_steps", rank=1))


def test_files_know_nothing_of_processes(gave: Gave) -> None:
    """Two processes' save is loaded by one, and what one then saves by two, bit for bit."""
    trained = gave("three_steps")
    for world, rank in ((1, 0), (2, 0), (2, 1)):
        found = gave("saved_and_loaded", world, rank)
        for way in ("into", "fresh", "sharded"):
            assert equal(found[way], trained), (world, way)
        assert relative(found["output"][""], found["output"]["fresh"]) < 1e-5


def test_state_dicts(gave: Gave) -> None:
    for rank in (0, 1):
        found = gave("dictionaries", rank=rank)
        assert found["whole"] is None or equal(found["whole"], found["wanted"])
        assert equal(found["sharded"], found["wanted"])
        for name, value in found["added"].items():
            assert torch.allclose(value, found["wanted"][name], atol=1e-6)


def test_sharded_on_the_meta_device(gave: Gave) -> None:
    for rank in (0, 1):
        started, base, out, expected = gave("from_meta", rank=rank)
        assert relative(started, base) < 1e-5
        assert relative(out, expected) < 1e-5 and relative(out, base) > 1e-2


def test_exchanges_are_refused(gave: Gave) -> None:
    for what, message in gave("refusals").items():
        assert "shard" in message and "remedy" in message, what


def test_marks_can_be_off(gave: Gave) -> None:
    out, base = gave("switched_off")
    assert relative(out, base) < 1e-5


def test_tensor_parallel_is_refused(gave: Gave) -> None:
    found = gave("tensor_parallel")
    assert "DTensors" in found["run"] and "sharded" in found["merge"]
