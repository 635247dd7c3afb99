"""Situations: what is done to modules around a bind; meta device, inference mode."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import peftfx
from peftfx.backends import Backend
from peftfx.errors import BindError, NotAdaptedError, PlanError
from tests.architectures import by_name
from tests.helpers import fill, output
from tests.state.bench import LORA, SPEC, TRAIN, Bench, Net, X, adapter, base, formula, situation

Result = tuple[Tensor, Tensor]


# -- weights that are made of others ---------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _old_weight_norm(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(module)


MADE: dict[str, Any] = {
    "parametrized": lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
    "weight-normed": nn.utils.parametrizations.weight_norm,
    "weight-normed by hooks": _old_weight_norm,
    "spectral-normed": nn.utils.parametrizations.spectral_norm,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", amount=0.3),
}


def _refused(b: Bench, change: Any) -> None:
    change(b.model.up)
    b.run()


def _others(b: Bench, change: Any) -> Result:
    """Adapters elsewhere, and biases, are as ever."""
    plain = base().eval()
    for model in (plain, b.model.eval()):
        torch.manual_seed(1)  # a spectral norm starts at random
        change(model.up)
    b.spec = {"rules": [{**LORA, "name": "down"}, {"method": "bitfit", "name": "*"}]}
    run = b.run()
    with torch.no_grad():
        for name in ("up", "down", "head"):
            bias = b.model.get_parameter(f"{name}.bias")
            plain.get_parameter(f"{name}.bias").copy_(bias)
        entry: Any = b.model.get_submodule("down.peftfx.lora")
        plain.get_parameter("down.weight").add_(1.5 * entry.B @ entry.A)
    return run(X), plain(X)


for _name, _change in MADE.items():
    situation(f"a weight that is {_name}", PlanError)(lambda b, c=_change: _refused(b, c))
    situation(f"beside a weight that is {_name}")(lambda b, c=_change: _others(b, c))


@situation("parametrized after the bind")
def _(b: Bench) -> Result:
    run = b.run()
    own = adapter(b.model)
    parametrize.register_parametrization(b.model.up, "weight", Doubled())  # type: ignore[arg-type]
    state = base().state_dict()
    state["up.weight"] = 2 * state["up.weight"]
    return run(X), formula(state, own)


@situation("what a weight is made of, trained in full")
def _(b: Bench) -> Result:
    parametrize.register_parametrization(b.model.up, "weight", Doubled())  # type: ignore[arg-type]
    b.spec = {"rules": [{"method": "train", "name": "up"}]}
    run = b.run()
    state = base().state_dict()
    values = dict(b.model.up.named_parameters())  # type: ignore[union-attr]
    state["up.bias"] = values["bias"]
    state["up.weight"] = 2 * values["parametrizations.weight.original"]
    return run(X), formula(state, {})


# -- embeddings and heads --------------------------------------------------------------------------


def _resized(b: Bench, rule: dict[str, Any], before: bool) -> Result:
    """More rows for an HF model's tokens; what is adapted is judged by HF's own resized base."""
    arch = by_name("llama")
    _use(b, arch, rule)
    if before:
        _grow(b.model)
    run = b.run()
    if not before:
        output(run, arch.example())
        _grow(b.model)
    plain = Bench("eager", arch.build(), b.spec, None)
    _grow(plain.model)
    plain.run()
    return output(run, arch.example()), output(plain.model, arch.example())


def _use(b: Bench, arch: Any, rule: dict[str, Any]) -> None:
    b.model, b.spec, b.example, b.lower = arch.build(), {"rules": [rule]}, None, "eager"


def _grow(model: Any) -> None:
    torch.manual_seed(3)
    model.resize_token_embeddings(70, mean_resizing=False)


QUERY = {"method": "lora", "name": "*.q_proj", "rank": 2}
TABLE = {"method": "lora", "name": "*.embed_tokens", "rank": 2}
HEAD = {"method": "train", "name": "lm_head"}
situation("tokens added before the bind")(lambda b: _resized(b, TABLE, True))
situation("tokens added beside adapters")(lambda b: _resized(b, QUERY, False))
situation("tokens added under an adapted table", NotAdaptedError)(
    lambda b: _resized(b, TABLE, False)
)
situation("tokens added under a trained head", NotAdaptedError)(lambda b: _resized(b, HEAD, False))


def _tied(b: Bench) -> tuple[Any, Any]:
    """A GPT-2, whose head is its table of tokens, with that trained in full."""
    arch = by_name("gpt2")
    _use(b, arch, HEAD)
    return b.run(), arch.example()


@situation("a tied head: tied again, and saved and loaded")
def _(b: Bench) -> Result:
    run, x = _tied(b)
    expected = output(run, x)
    b.model.tie_weights()  # type: ignore[operator]
    state = {k: v.clone() for k, v in run.state_dict().items()}
    fill(peftfx.parameters(b.model), 4)
    run.load_state_dict(state, assign=True)
    assert b.model.lm_head.weight is b.model.transformer.wte.weight  # type: ignore[union-attr]
    return output(run, x), expected


@situation("a tied head untied by hand", NotAdaptedError)
def _(b: Bench) -> Any:
    run, x = _tied(b)
    head: Any = b.model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())
    output(run, x)


@situation("a trained head tied to a table afterwards", NotAdaptedError)
def _(b: Bench) -> Any:
    arch = by_name("llama")
    _use(b, arch, HEAD)
    run = b.run()
    b.model.lm_head.weight = b.model.model.embed_tokens.weight  # type: ignore[union-attr]
    output(run, arch.example())


@situation("a trained module replaced", NotAdaptedError)
def _(b: Bench) -> Any:
    run = b.run()
    b.model.head = nn.Linear(6, 3)
    run(X)


@situation("tensors that layers share, assigned, then trained")
def _(b: Bench) -> Result:
    """A state dict has them once for each layer; they stay one."""
    arch = by_name("llama")
    rule = {"method": "prefix", "role": "attention", "length": 3, "mlp": True, "hidden": 5}
    _use(b, arch, rule)
    run = b.run()
    count = len(peftfx.parameters(b.model))
    run.load_state_dict({k: v.clone() for k, v in run.state_dict().items()}, assign=True)
    assert len(peftfx.parameters(b.model)) == count
    output(run, arch.example()).square().mean().backward()
    torch.optim.SGD(peftfx.parameters(b.model), lr=0.1).step()
    fresh = arch.build()
    with tempfile.TemporaryDirectory() as directory:
        peftfx.save(b.model, directory)
        peftfx.load(fresh, directory, compile=False)
    return output(run, arch.example()), output(fresh, arch.example())


# -- names and owners ------------------------------------------------------------------------------


@situation("a module of the model's own where adapters are kept", BindError)
def _(b: Bench) -> Any:
    b.model.up.peftfx = nn.Linear(2, 2)  # type: ignore[union-attr]
    b.run()


@situation("an attribute of the model's own where adapters are kept", BindError)
def _(b: Bench) -> Any:
    b.model.down.peftfx = 3  # type: ignore[union-attr]
    b.run()


@situation("an attribute of the model's own where the record is kept", BindError)
def _(b: Bench) -> Any:
    b.model._peftfx = 3
    b.run()


@situation("two models that share an adapted module", BindError)
def _(b: Bench) -> Any:
    other = Bench("eager")
    other.run()
    b.model.up = other.model.up
    b.run()


@situation("two models that share a frozen module", BindError)
def _(b: Bench) -> Any:
    other = Bench("eager", spec={"rules": [LORA]})
    other.run()
    b.model.head = other.model.head
    b.run()


@situation("two models that share a module, one released")
def _(b: Bench) -> Result:
    other = Bench("eager")
    other.run()
    b.model.head = other.model.head
    peftfx.release(other.model)
    return b.run()(X), b.expected()


@situation("a model inside of a bound one", BindError)
def _(b: Bench) -> Any:
    outer = Bench("eager", nn.Sequential(b.model), {"rules": [{**LORA, "name": "*.up"}]})
    outer.run()
    b.run()


@situation("a model around a bound one", BindError)
def _(b: Bench) -> Any:
    inner = Bench("eager")
    inner.run()
    b.model = nn.Sequential(inner.model)
    b.run()


@situation("an adapter's tensors on another device", NotAdaptedError)
def _(b: Bench) -> Any:
    run = b.run()
    run(X)
    b.model.get_submodule("up.peftfx.lora").to("meta")
    run(X)


# -- the meta device -------------------------------------------------------------------------------


def _on_meta(b: Bench, *rules: Any) -> Any:
    with torch.device("meta"):
        b.model = Net()
    b.backend = Backend({"rules": rules or (LORA, TRAIN)}, "aot_eager")
    b.backend.bind(b.model)
    return b.formed()


def _trained_at(b: Bench, run: Any, seed: int) -> Result:
    """It starts as the base; with values it is the formula; off, it is the base."""
    assert torch.allclose(run(X), base(seed)(X), atol=1e-6)
    fill(peftfx.parameters(b.model))
    run(X).square().sum().backward()
    torch.optim.SGD(peftfx.parameters(run), lr=0.1).step()
    with peftfx.disabled(run):
        assert torch.allclose(run(X), base(seed)(X), atol=1e-6)
    return run(X), b.expected(seed)


@situation("bound on the meta device, a base's state dict assigned")
def _(b: Bench) -> Result:
    run = _on_meta(b)
    b.model.load_state_dict(base(5).state_dict(), assign=True)
    return _trained_at(b, run, 5)


@situation("bound on the meta device, emptied, a base's state dict copied")
def _(b: Bench) -> Result:
    run = _on_meta(b)
    b.model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*b.model.parameters(), *b.model.buffers()):
            tensor.fill_(float("nan"))  # what empty memory may hold
    b.model.load_state_dict(base(5).state_dict())
    return _trained_at(b, run, 5)


@situation("bound on the meta device with a start that reads the base")
def _(b: Bench) -> Result:
    run = _on_meta(b, {**LORA, "init": "pissa"}, TRAIN)
    b.model.load_state_dict(base(5).state_dict(), assign=True)
    assert float(b.model.get_parameter("up.peftfx.lora.A").detach().abs().max()) > 0.1
    return run(X), base(5)(X)


@situation("bound on the meta device, an adapted state dict")
def _(b: Bench) -> Result:
    other = Bench("eager", base(5))
    other.run()
    run = _on_meta(b)
    b.model.to_empty(device="cpu")
    with torch.no_grad():
        for buffer in b.model.buffers():
            buffer.fill_(float("nan"))
    b.model.load_state_dict(other.model.state_dict())
    return run(X), other.expected(5)


@situation("bound on the meta device, emptied, never loaded", NotAdaptedError)
def _(b: Bench) -> Any:
    run = _on_meta(b)
    b.model.to_empty(device="cpu")
    run(X)


@situation("bound on the meta device, a part of the base loaded", NotAdaptedError)
def _(b: Bench) -> Any:
    run = _on_meta(b)
    b.model.to_empty(device="cpu")
    state = {n: v for n, v in base(5).state_dict().items() if "up" not in n}
    b.model.load_state_dict(state, strict=False)
    run(X)


# -- inference mode --------------------------------------------------------------------------------


def _steps(b: Bench, run: Any) -> Result:
    run(X).square().sum().backward()
    torch.optim.SGD(peftfx.parameters(run), lr=0.1).step()
    return run(X), b.expected()


@situation("bound inside of inference_mode, trained outside")
def _(b: Bench) -> Result:
    with torch.inference_mode():
        run = b.run()
        run(X)
    return _steps(b, run)


@situation("bound by a first call inside of inference_mode, trained outside")
def _(b: Bench) -> Result:
    b.backend = Backend(SPEC, "aot_eager")
    run = torch.compile(b.model, backend=b.backend)
    with torch.inference_mode():
        run(X)
    fill(peftfx.parameters(run))
    return _steps(b, run)


@situation("another adapter inside of inference_mode, trained outside")
def _(b: Bench) -> Result:
    run = b.run()
    with torch.inference_mode(), tempfile.TemporaryDirectory() as directory:
        peftfx.save(run, directory)
        peftfx.load(run, directory, adapter="b", trainable=True, example=(X,))
        peftfx.activate(run, "b")
        run(X)
    run(X).square().sum().backward()
    torch.optim.SGD(peftfx.parameters(run), lr=0.1).step()
    return run(X), formula(base().state_dict(), peftfx.state_dict(run, "b"))


@situation("merged inside of inference_mode, run outside")
def _(b: Bench) -> Result:
    run = b.run()
    expected = b.expected()
    with torch.inference_mode():
        peftfx.merge(run)
    x = X.clone().requires_grad_()
    out = run(x)
    out.sum().backward()
    assert x.grad is not None
    return out, expected
