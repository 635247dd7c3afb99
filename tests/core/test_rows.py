"""``rows`` of fused weights by what they are for, against each architecture's own split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from tests.architectures import by_name
from tests.architectures.architecture import Rows, fused, hf, text
from tests.helpers import fill, output, relative

HEADS = fused(step=4, query=8, key=8, value=8)
SMALL = {"vocab_size": 61, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32}
LLAMA = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, and which output features of its fused weights are whose, by its source."""

    build: Callable[..., nn.Module]
    rows: Rows

    @classmethod
    def of(cls, name: str, rows: Rows | None = None, **more: Any) -> Case:
        """An architecture of the table, as it is or configured otherwise."""
        arch = by_name(name)
        return cls(lambda: arch.build(**more), arch.rows if rows is None else rows)


CASES = {
    **{name: Case.of(name) for name in (
        "phi3", "gpt2", "gpt-neox", "falcon", "bloom", "mpt", "modernbert"
    )},
    "phi3, one head of keys": Case.of(
        "phi3", {"*.qkv_proj": fused(step=1, query=32, key=8, value=8)}, num_key_value_heads=1
    ),
    "phi3, as many heads of keys": Case.of(
        "phi3", {"*.qkv_proj": fused(step=1, query=32, key=32, value=32)}, num_key_value_heads=4
    ),
    "falcon, as many heads of keys": Case.of(
        "falcon", {"*.query_key_value": HEADS}, multi_query=False
    ),
    "falcon, in groups": Case.of(
        "falcon", {"*.query_key_value": fused(step=2, query=16, key=8, value=8)},
        new_decoder_architecture=True, num_kv_heads=2,
    ),
    "gpt-bigcode": Case(
        hf("GPTBigCodeConfig", "GPTBigCodeForCausalLM", **SMALL, use_cache=False),
        {"*.c_attn": fused(step=1, query=32, key=8, value=8)},
    ),
    "gpt-bigcode, as many heads of keys": Case(
        hf("GPTBigCodeConfig", "GPTBigCodeForCausalLM", **SMALL, use_cache=False,
           multi_query=False),
        {"*.c_attn": HEADS},
    ),
    "codegen": Case(  # of each of four parts of the heads: queries, values, keys
        hf("CodeGenConfig", "CodeGenForCausalLM", **SMALL, use_cache=False, rotary_dim=4),
        {"*.qkv_proj": fused(step=4, query=8, value=8, key=8)},
    ),
    "openai-gpt": Case(
        hf("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", **SMALL),
        {"*.c_attn": fused(step=1, query=32, key=32, value=32)},
    ),
    "persimmon": Case(
        hf("PersimmonConfig", "PersimmonForCausalLM", **LLAMA), {"*.query_key_value": HEADS}
    ),
    "glm": Case(
        hf("GlmConfig", "GlmForCausalLM", **LLAMA, head_dim=8),
        {"*.gate_up_proj": {"mlp.gate": ((0, 44),), "mlp.up": ((44, 88),)}},
    ),
}  # fmt: skip
ASKED = {"attention": (["query", "value"], ["key"]), "mlp": (["up"], ["mlp.gate"])}


def weights(model: nn.Module, glob: str) -> list[nn.Module]:
    return [m for n, m in model.named_modules() if fnmatchcase(n, glob)]


def features(module: nn.Module) -> Tensor:
    """[N, K]: the weight, by output features."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return (weight.T if type(module).__name__ == "Conv1D" else weight).detach().clone()


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_the_split(name: str, tmp_path: Path) -> None:
    """Merged, exactly the table's rows have moved; PEFT computes the same of the file, and we."""
    case = CASES[name]
    for glob, split in case.rows.items():
        for asked in ASKED[next(iter(split)).partition(".")[0]]:
            model, example = case.build(), text()()
            before = [features(m) for m in weights(model, glob)]
            rule = {"method": "lora", "name": glob, "rows": asked, "rank": 2}
            Backend({"rules": [rule]}, "eager").bind(model)
            fill(peftfx.parameters(model))
            expected = output(model, example)
            peftfx.save(model, tmp_path, format="peft")  # zeros in B where nothing is taken
            theirs = peft.PeftModel.from_pretrained(case.build(), tmp_path)
            assert relative(output(theirs.base_model.model, example), expected) < 1e-5
            again = peftfx.load(case.build(), tmp_path, compile=False)
            assert torch.equal(output(again, example), expected)
            peftfx.merge(model)
            assert torch.allclose(output(model, example), expected, atol=1e-4, rtol=1e-4)
            spans = [s for role, of in split.items() for s in of
                     if {role, role.rpartition(".")[2]} & {*asked}]  # fmt: skip
            taken = torch.zeros(len(before[0]), dtype=torch.bool)
            for start, stop in spans:
                taken[start:stop] = True
            after = [features(m) for m in weights(model, glob)]
            assert before and taken.any() and not taken.all()
            for old, new in zip(before, after, strict=True):
                assert torch.equal((old != new).any(1), taken)


WRITTEN_OUT = {"bloom", "mpt", "codegen", "openai-gpt"}  # no call that could be looked at


@pytest.mark.parametrize("name", sorted(CASES.keys() - WRITTEN_OUT - {"glm"}))
def test_attention_sees_what_was_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first layer's q, k and v, those change whose rows are adapted, and no others."""
    seen: list[list[Tensor]] = []
    real = nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append([t.detach().clone() for t in (q, k, v)])
        return real(q, k, v, *args, **kwargs)

    model, example = CASES[name].build(), text()()
    (glob,) = [g for g, split in CASES[name].rows.items() if "attention.query" in split]
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    output(model, example)
    assert seen
    for i, role in enumerate(("query", "key", "value")):
        rule = {"method": "lora", "name": glob, "rows": role, "rank": 2}
        Backend({"rules": [rule]}, "eager").bind(model)
        fill(peftfx.parameters(model))
        base, seen[:] = seen[0], []
        output(model, example)
        moved = [not torch.equal(a, b) for a, b in zip(base, seen[0], strict=True)]
        assert moved == [j == i for j in range(3)]
        peftfx.release(model)
        seen[:] = []
        output(model, example)


def test_sites_without_such_rows_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """A rule that acts at some of what it matches says so; what it is not for is no news."""
    model = nn.Sequential(nn.Linear(5, 12), nn.LayerNorm(12), nn.Linear(12, 8), nn.Linear(8, 7))
    rule = {"method": "lora", "name": "*", "rank": 2}
    with caplog.at_level("WARNING", "peftfx"):
        Backend({"rules": [rule]}, "eager").bind(model, (torch.randn(3, 5),))
        assert not caplog.records
        peftfx.release(model)
        Backend({"rules": [{**rule, "rows": "0-9"}]}, "eager").bind(model, (torch.randn(3, 5),))
    (told,) = [r.getMessage() for r in caplog.records]
    assert told == (
        "rule 0 acts at 1 sites, and not in 2 other modules that it matches, such as 2.weight: "
        "there are 8 rows, and 9 is asked for"
    )
    assert "not at 2.weight: there are 8 rows" in str(
        peftfx.plan(model, {"rules": [{**rule, "rows": "0-9"}]})
    )
