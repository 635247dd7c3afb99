"""The backend's ways in: lower, mode, options, the entry point; and what it leaves behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from peftfx.errors import BindError, SpecError
from tests.helpers import fill, relative

SPEC = {"rules": [{"method": "lora", "name": "*", "rank": 2}]}
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


class Inner:
    """An inner compiler that notes what it is given."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any], **given: Any) -> Any:
        self.given = given
        return gm.forward


def _wrapper(model: nn.Module, lower: Any, given: Any) -> Any:
    return torch.compile(model, backend=peftfx.backend(SPEC, lower=lower), **given)


def _in_place(model: nn.Module, lower: Any, given: Any) -> Any:
    return peftfx.adapt(model, SPEC, lower=lower, **given)


def _by_name(model: nn.Module, lower: Any, given: Any) -> Any:
    options = {"spec": SPEC, "lower": lower, **given["options"]}
    return torch.compile(model, backend="peftfx", options=options)


@pytest.mark.parametrize("way", [_wrapper, _in_place, _by_name])
def test_options_reach_the_inner_compiler(way: Callable[..., Any]) -> None:
    given, inner, model = {"options": {"shape_padding": True}}, Inner(), base()
    compiled = way(model, inner, given)
    compiled(X)
    assert inner.given == given
    fill(peftfx.parameters(model))
    out = compiled(X)
    with torch.compiler.set_stance("force_eager"):
        assert relative(out, model(X)) < 1e-6


@pytest.mark.parametrize("way", [_wrapper, _in_place])
def test_mode_reaches_the_inner_compiler(way: Callable[..., Any]) -> None:
    inner = Inner()
    way(base(), inner, {"mode": "max-autotune"})(X)
    assert inner.given == {"mode": "max-autotune"}


@pytest.mark.parametrize(
    ("given", "patch"),
    [
        ({"mode": "max-autotune-no-cudagraphs"}, ("max_autotune", True)),
        ({"options": {"shape_padding": False}}, ("shape_padding", False)),
    ],
)
def test_inductor_is_told(monkeypatch: pytest.MonkeyPatch, given: Any, patch: Any) -> None:
    told: dict[str, Any] = {}

    def compile_fx(gm: torch.fx.GraphModule, inputs: Any, config_patches: Any) -> Any:
        told.update(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    _wrapper(base(), "inductor", given)(X)
    assert told[patch[0]] is patch[1]


def test_ways_in_that_are_refused() -> None:
    with pytest.raises(SpecError, match="eagre"):
        peftfx.backend(SPEC, lower="eagre")  # type: ignore[arg-type]
    for options, named in ((None, "needs a spec"), ({"spce": SPEC}, "options are 'spce'")):
        with pytest.raises(SpecError, match=named):
            torch.compile(base(), backend="peftfx", options=options)(X)
    function: Any = base().forward
    for call in (
        lambda: peftfx.adapt(function, SPEC),
        lambda: peftfx.plan(function, SPEC),
        lambda: peftfx.parameters(function),
        lambda: peftfx.load(function, "nowhere"),
    ):
        with pytest.raises(BindError, match=r"method is no torch\.nn\.Module"):
            call()


def test_a_trace_leaves_no_hooks_on_all_modules() -> None:
    """torch warns of them whenever a module is compiled."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    spec = {"rules": [{"method": "lora", "role": "mlp.up", "rank": 2}]}
    for model in (Net(), Net()):
        backend = Backend(spec, "eager")
        backend.bind(model, (X,))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.compile(model, backend=backend)(X)
        assert not [w for w in told if "global hooks" in str(w.message)]
