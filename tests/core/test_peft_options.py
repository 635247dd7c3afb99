"""PEFT's files and configurations, both ways, option by option."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftfx
from peftfx import peft_support
from peftfx.backends import Backend
from peftfx.errors import CheckpointError, SpecError
from peftfx.methods import lookup
from peftfx.spec import Spec
from tests.helpers import fill, relative
from tests.peft_options import IDS, OPTIONS, TWO, Model, Option

EVERY = pytest.mark.parametrize("option", OPTIONS, ids=str)
IGNORED = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


def base() -> Model:
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def theirs(option: Option) -> nn.Module:
    model: nn.Module = peft.get_peft_model(base(), option.config()).eval()
    fill((p for p in model.parameters() if p.requires_grad), scale=0.4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and ("ia3_l" in name or "magnitude" in name):
                p.add_(1.0)
    return model


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@IGNORED
@EVERY
def test_files_go_both_ways(option: Option, tmp_path: Path) -> None:
    """PEFT writes, peftfx reads, writes, PEFT reads: the same outputs, the same tensors."""
    written = theirs(option)
    expected = written(IDS)
    assert relative(expected, base()(IDS)) > 1e-2
    written.save_pretrained(tmp_path / "theirs")
    ours: Any = base()
    peftfx.load(ours, tmp_path / "theirs", trainable=True, compile=False, example=(IDS,))
    assert relative(ours(IDS), expected) < 1e-5
    assert sum(p.numel() for p in peftfx.parameters(ours)) == trained(written)
    expected.square().mean().backward()
    ours(IDS).square().mean().backward()
    want = sorted(float(p.grad.norm()) for p in written.parameters() if p.grad is not None)
    got = sorted(float(p.grad.norm()) for p in peftfx.parameters(ours) if p.grad is not None)
    assert torch.allclose(torch.tensor(got), torch.tensor(want), rtol=1e-3, atol=1e-6)

    peftfx.save(ours, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert relative(again(IDS), expected) < 1e-6
    (tmp_path / "ours" / "peftfx.json").unlink()  # as PEFT alone would have written it
    fresh: Any = base()
    peftfx.load(fresh, tmp_path / "ours", compile=False, example=(IDS,))
    assert torch.equal(fresh(IDS), ours(IDS))


@IGNORED
@EVERY
def test_configurations_go_both_ways(option: Option) -> None:
    """A configuration read as a spec, and written again, adapts the same modules alike."""
    config, model = option.config(), base()
    spec = Spec.from_peft(config, model)
    plan = peftfx.plan(model, spec, (IDS,))
    assert plan.trainable == trained(peft.get_peft_model(base(), config))
    if option.alone:
        other = peftfx.plan(model, Spec.from_peft(option.config()), (IDS,))
        assert {(p.site.name, p.method) for p in other} == {(p.site.name, p.method) for p in plan}
    else:
        with pytest.raises(SpecError, match="takes the model"):
            Spec.from_peft(option.config())
    content = spec.to_peft(model, (IDS,))
    made = peft.PeftConfig.from_peft_type(**content)
    again = peft.get_peft_model(base(), made)
    assert trained(again) == plan.trainable
    first = peft.get_peft_model(base(), option.config())
    assert sorted(n for n, p in again.named_parameters() if p.requires_grad) == sorted(
        n for n, p in first.named_parameters() if p.requires_grad
    )


EDITS: list[tuple[dict[str, Any], str | None]] = [
    ({"r": 4}, "rank of lora at decoder.layers.0.q_proj.weight is 3 in one and 4 in the other"),
    ({"lora_alpha": 9}, "alpha of lora"),
    ({"target_modules": ["q_proj"]}, "lora at decoder.layers.0.v_proj.weight in one of them"),
    ({"target_modules": ["q_proj", "v_proj", "up"]}, "up.weight in one of them alone"),
    ({"rank_pattern": {"q_proj": 5}}, "rank of lora"),
    ({"use_dora": True}, "in one of them alone"),
    ({"use_rslora": True}, "rank_stabilized"),
    ({"modules_to_save": None}, "train at score"),
    ({"bias": "all"}, "bitfit"),
    ({"r": "3"}, "r"),
    ({"peft_type": "IA3"}, ""),
    ({"arrow_config": {"a": 1}}, "arrow_config"),
    ({"target_modules": ["v_proj", "q_proj"]}, None),
    ({"target_modules": r".*\.(q|v)_proj"}, None),
    ({"base_model_name_or_path": "elsewhere", "inference_mode": False}, None),
    ({"lora_bias": False, "rank_pattern": {}, "exclude_modules": None}, None),
]


@IGNORED
@pytest.mark.parametrize(("change", "reason"), EDITS, ids=lambda v: str(v)[:40])
def test_an_edited_configuration_is_not_passed_over(
    change: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    """PEFT's file beside ours says the same, or neither is taken."""
    model: Any = base()
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=TWO, modules_to_save=["score"])
    Backend(Spec.from_peft(config, model), "eager").bind(model, (IDS,))
    fill(peftfx.parameters(model))
    peftfx.save(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    fresh: Any = base()
    if reason is None:
        peftfx.load(fresh, tmp_path, compile=False, example=(IDS,))
        assert torch.equal(fresh(IDS), model(IDS))
        return
    with pytest.raises(CheckpointError, match="do not say the same") as caught:
        peftfx.load(fresh, tmp_path, compile=False, example=(IDS,))
    assert reason in str(caught.value) and not peftfx.is_adapted(fresh)


@pytest.mark.slow
@IGNORED
@EVERY
def test_what_peft_writes_again_is_the_same(option: Option, tmp_path: Path) -> None:
    """Our directory, loaded and saved by PEFT in place: our file stays, and still fits."""
    theirs(option).save_pretrained(tmp_path / "theirs")
    ours: Any = base()
    peftfx.load(ours, tmp_path / "theirs", trainable=True, compile=False, example=(IDS,))
    peftfx.save(ours, tmp_path / "ours", format="peft")
    peft.PeftModel.from_pretrained(base(), tmp_path / "ours").save_pretrained(tmp_path / "ours")
    fresh: Any = base()
    peftfx.load(fresh, tmp_path / "ours", compile=False, example=(IDS,))
    assert torch.equal(fresh(IDS), ours(IDS))


# -- what PEFT cannot say --------------------------------------------------------------------------

LORA = {"method": "lora", "rank": 2}
UNSAID: list[tuple[list[dict[str, Any]], str]] = [
    ([{**LORA, "name": "*.q_proj", "freeze_a": True}], "freeze_a"),
    ([{**LORA, "name": "*.q_proj", "plus": 4.0}], "plus"),
    ([{**LORA, "name": "*.q_proj", "lr": 1e-3}], "lr"),
    ([{**LORA, "name": "*.q_proj", "rows": "0-3"}], "rows"),
    ([{**LORA, "name": "*.q_proj"}, {**LORA, "name": "*.k_proj", "init": "gaussian"}], "one init"),
    ([{**LORA, "name": "*.q_proj"}, {"method": "bitfit", "name": "*.up"}], "all that is called"),
    ([{**LORA, "name": "*.q_proj"}, {"method": "train", "name": "score.weight"}], "whole modules"),
    ([{**LORA, "name": "*.q_proj"}, {"method": "ia3", "name": "*.k_proj"}], "in one adapter"),
    ([{"method": "ia3", "name": "*.experts.up"}], "has no parameter"),
]


@pytest.mark.parametrize(("rules", "reason"), UNSAID, ids=lambda v: v if isinstance(v, str) else "")
def test_what_peft_cannot_say_is_refused(rules: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        Spec.parse({"rules": rules}).to_peft(base(), (IDS,))


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": "([a-z_]+)+!"}, "name no module"),
    ({"target_modules": "(?=q).*"}, "not supported"),
    ({"exclude_modules": "(?<!a)q"}, "not supported"),
    ({"modules_to_save": ["(?P<x>"]}, "not supported"),
    ({"layers_to_transform": [0], "layers_pattern": "("}, "not supported"),
    ({"rank_pattern": {"(": 3}}, "not supported"),
    ({"target_modules": None}, "no target_modules"),
    ({"bias": "some"}, "bias='some'"),
    ({"arrow_config": {"top_k": 2}}, "arrow_config"),
    ({"megatron_config": {"a": 1}}, "megatron_config"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"use_qalora": True}, "use_qalora"),
    ({"init_lora_weights": "loftq"}, "changed the base"),
    ({"peft_type": "VBLORA"}, "VBLORA"),
]


@pytest.mark.parametrize(
    ("change", "reason"), HOSTILE, ids=lambda v: v if isinstance(v, str) else ""
)
def test_configurations_that_are_refused(change: dict[str, Any], reason: str) -> None:
    content = peft.LoraConfig(target_modules=["q_proj"]).to_dict()
    with pytest.raises(SpecError, match=reason):
        Spec.from_peft({**content, **change}, base())


def test_tied_adapters_are_refused() -> None:
    model = base()
    content = peft.LoraConfig(target_modules=["q_proj"], ensure_weight_tying=True)
    Spec.from_peft(content, model)  # nothing is tied here
    model.mix_up.weight = model.decoder.layers[0].o_proj.weight = nn.Parameter(torch.randn(6, 6))
    with pytest.raises(SpecError, match="ensure_weight_tying"):
        Spec.from_peft(content, model)


# -- rows of a fused weight ----------------------------------------------------------------------


class Fused(nn.Module):
    """One product for queries, keys and values, of an nn.Linear or of GPT-2's Conv1D."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.qkv = Conv1D(15, 6) if turned else nn.Linear(6, 15)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(5, -1)
        return self.out((q @ k.transpose(-1, -2)).softmax(-1) @ v)  # type: ignore[no-any-return]


X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("turned", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize(
    "rule",
    [{**LORA, "rows": "5-9"}, {**LORA, "rows": ["0-4", "10-14"], "bias": True}, {"method": "ia3",
     "rows": ["0-4", "10-14"]}],
    ids=["lora", "lora biased", "ia3"],
)  # fmt: skip
@IGNORED
def test_rows_are_zero_blocks_for_peft(rule: dict[str, Any], turned: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Fused(turned).eval().requires_grad_(False)
    model = copy.deepcopy(plain)
    Backend({"rules": [{**rule, "name": "qkv"}]}, "eager").bind(model, (X,))
    fill(peftfx.parameters(model), scale=0.5)
    expected = model(X)
    assert relative(expected, plain(X)) > 1e-2
    said = rule["rows"] if isinstance(rule["rows"], list) else [rule["rows"]]
    taken = torch.zeros(15, dtype=torch.bool)
    for text in said:
        first, _, last = text.partition("-")
        taken[int(first) : int(last) + 1] = True
    assert torch.equal(model.qkv(X)[..., ~taken], plain.qkv(X)[..., ~taken])
    assert not torch.equal(model.qkv(X)[..., taken], plain.qkv(X)[..., taken])

    peftfx.save(model, tmp_path, format="peft")
    values = load_file(tmp_path / "adapter_model.safetensors")
    key = next(k for k in values if "lora_B.weight" in k or "ia3_l" in k)
    rows = values[key].flatten(1) if rule["method"] == "lora" else values[key].view(-1, 1)
    assert rows.shape[0] == 15
    assert bool((rows[~taken] == (1.0 if rule["method"] == "ia3" else 0.0)).all())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    if rule["method"] == "lora":
        assert (config["r"], config["lora_alpha"]) == (2, 16)  # the scale stays
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    assert relative(again(X), expected) < 1e-6

    fresh = copy.deepcopy(plain)
    peftfx.load(fresh, tmp_path, compile=False, example=(X,))
    assert torch.equal(fresh(X), expected)
    assert sum(p.numel() for p in peftfx.state_dict(fresh).values()) == sum(
        p.numel() for p in peftfx.state_dict(model).values()
    )
    values[key] = values[key] + 0.5  # not what the spec says any more
    save_file(values, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="other rows"):
        peftfx.load(copy.deepcopy(plain), tmp_path, compile=False, example=(X,))
    (tmp_path / "peftfx.json").unlink()  # then it is an adapter of the whole
    peftfx.load(copy.deepcopy(plain), tmp_path, compile=False, example=(X,))


# -- the table of what PEFT can say ----------------------------------------------------------------

CHANGED: dict[str, Any] = {  # another value of each option, by its name
    "rank": 2, "alpha": 5.0, "dropout": 0.25, "rank_stabilized": True, "bias": True,
    "init": "gaussian", "freeze_a": True, "plus": 4.0, "target": 3, "every": 5, "smooth": 0.5,
    "smooth_uncertainty": 0.5, "orthogonality": 0.25, "warmup": 2, "end": 3, "steps": 50,
    "first": 0.5, "seed": 5, "inputs": 9, "outputs": 9, "both": True, "split": 2,
    "at": "input", "block": 2, "terms": 8, "share": True, "orthogonal": True, "l2_sp": 0.1,
    "ids": [2, 5], "density": 0.4, "mask": "magnitude", "structure": "row", "budget": 0.2,
    "strength": 2.0, "gate": "token",
}  # fmt: skip
NEEDS: dict[str, dict[str, Any]] = {  # what a method, or another value of an option, goes with
    "tokens": {"name": "embed_tokens", "ids": [1]},
    "norm": {"name": "*.norm"},
    "oft": {"block": 3},
    "adalora": {"rank": 6, "steps": 40, "end": 30, "warmup": 1},
    "orthogonal": {"rank": 3},
    "strength": {"density": 0.5, "budget": 0.2},
    "budget": {"density": 0.5},
    "structure": {"density": 0.5},
}
SAID = [
    (method, option, theirs)
    for method, about in peft_support.said().items()
    for option, theirs in about["options"].items()
    if lookup(method).peft is not None and lookup(method).peft.type  # type: ignore[union-attr]
    and method not in ("prompt", "ptuning", "prefix")  # their tensors alone are written
    and option != "tucker"  # of convolutions
]  # fmt: skip


@IGNORED
@pytest.mark.parametrize(("method", "option", "theirs"), SAID, ids=lambda v: str(v))
def test_what_peft_can_say(method: str, option: str, theirs: str | None) -> None:
    """Each row of the table: PEFT has the option and reads it back, or it is refused."""
    model = base()
    small = {"rank": 1 if method == "sparse" else 4} if hasattr(lookup(method), "rank") else {}
    if method == "sparse" and option != "rank":
        small = {"density": 0.5}  # or entries of a rank
    needs = {**small, **NEEDS.get(method, {}), **NEEDS.get(option, {})}
    rule = {"method": method, "name": "*.q_proj", **needs}
    before = Spec.parse({"rules": [rule]}).to_peft(model, (IDS,)) if theirs else {}
    changed = {"rules": [{**rule, option: CHANGED[option]}]}
    if theirs is None:
        with pytest.raises((CheckpointError, SpecError)):
            Spec.parse(changed).to_peft(model, (IDS,))
        return
    spec = Spec.parse(changed)
    content = spec.to_peft(model, (IDS,))
    assert content[theirs] != before[theirs]
    made = peft.PeftConfig.from_peft_type(**content)
    again = peft.get_peft_model(base(), made)
    assert trained(again) == peftfx.plan(model, spec, (IDS,)).trainable
    back = peftfx.plan(model, Spec.from_peft(made, model), (IDS,))
    assert [vars(p.method)[option] for p in back] == [
        vars(p.method)[option] for p in peftfx.plan(model, spec, (IDS,))
    ]


@pytest.mark.parametrize("config", [peft.LoraConfig, peft.IA3Config], ids=lambda c: c.__name__)
def test_every_option_of_peft_is_read_or_refused(config: Any) -> None:
    content = config(target_modules=["q_proj"], **(
        {"feedforward_modules": []} if config is peft.IA3Config else {})).to_dict()  # fmt: skip
    told = peft_support.read()[content["peft_type"].value]
    known = {*told["read"], *told["passed over"], "peft_type"}
    for field in dataclasses.fields(config):
        if field.name not in known:
            with pytest.raises(SpecError, match=field.name):
                Spec.from_peft({**content, field.name: "something"}, base())
