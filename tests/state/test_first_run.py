"""Bound without an example, a model's first run is the proof that its marks fire."""

from __future__ import annotations

import copy

import pytest
import torch

import peftfx
from peftfx.backends import Backend
from tests.laws.test_methods import IDS, made, shake
from tests.methods import ROWS, Row


@pytest.mark.parametrize("row", [r for r in ROWS if "role" not in r.options], ids=str)
def test_says_what_an_example_says(row: Row) -> None:
    base, model, _ = made(row, "eager")
    shake(row, model)
    late = copy.deepcopy(base)
    Backend({"rules": [row.rule()]}, "eager").bind(late)
    peftfx.load_state_dict(late, peftfx.state_dict(model))
    assert torch.equal(late.eval()(IDS), model.eval()(IDS))
