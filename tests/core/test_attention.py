"""Prefixes at attention calls of any model: against arithmetic, and what is refused."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from peftfx.binding import bound, entry_of
from peftfx.engine import is_op
from peftfx.errors import NotAdaptedError, PlanError
from tests.architectures import by_name
from tests.helpers import fill, output, relative
from tests.soft_prompts import P, inputs, pair, rule, theirs


class Attention(nn.Module):
    """H query heads, N key heads of width 4, over x or over a memory; causal over x."""

    def __init__(self, heads: int, kv: int) -> None:
        super().__init__()
        self.heads, self.kv = heads, kv
        self.query, self.out = nn.Linear(6, heads * 4), nn.Linear(heads * 4, 6)
        self.key, self.value = nn.Linear(6, kv * 4), nn.Linear(6, kv * 4)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        q = self.query(x).unflatten(-1, (self.heads, 4)).transpose(1, 2)
        k = self.key(source).unflatten(-1, (self.kv, 4)).transpose(1, 2)
        v = self.value(source).unflatten(-1, (self.kv, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=memory is None, enable_gqa=True, scale=0.7
        )
        return self.out(y.transpose(1, 2).flatten(2))


class Toy(nn.Module):
    """Two layers of self-attention, one of cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(4, 2), Attention(3, 3)])
        self.cross = Attention(2, 1)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x + self.cross(x, memory)


def by_hand(model: Toy, x: Tensor, memory: Tensor, fronts: dict[str, tuple[Tensor, Tensor]]) -> Any:
    """The same by loops over heads and softmax over joined scores."""

    def attend(path: str, module: Any, x: Tensor, source: Tensor, causal: bool) -> Tensor:
        heads = []
        for h in range(module.heads):
            n = h // (module.heads // module.kv)
            at, kv = slice(4 * h, 4 * h + 4), slice(4 * n, 4 * n + 4)
            q, k, v = module.query(x)[..., at], module.key(source), module.value(source)
            keys, values = k[..., kv], v[..., kv]
            scores = 0.7 * q @ keys.transpose(1, 2)
            if causal:
                scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1) > 0, -torch.inf)
            if path in fronts:
                pk, pv = (t[n].expand(len(x), -1, -1) for t in fronts[path])
                scores = torch.cat([0.7 * q @ pk.transpose(1, 2), scores], -1)
                values = torch.cat([pv, values], 1)
            heads.append(scores.softmax(-1) @ values)
        return module.out(torch.cat(heads, -1))

    for i, layer in enumerate(model.layers):
        x = x + attend(f"layers.{i}", layer, x, x, True)
    return x + attend("cross", model.cross, x, memory, False)


@pytest.mark.parametrize(
    "select, where",
    [
        ({"role": "attention"}, {"layers.0", "layers.1"}),
        ({"role": "attention", "layers": "last 1"}, {"layers.1"}),
        ({"role": "cross_attention"}, {"cross"}),
        ({"name": "*.query"}, {"layers.0", "layers.1", "cross"}),
    ],
)
def test_by_hand(select: dict[str, Any], where: set[str]) -> None:
    torch.manual_seed(0)
    base = Toy()
    x, memory = torch.randn(2, 5, 6), torch.randn(2, 7, 6)
    model = copy.deepcopy(base)
    Backend({"rules": [{"method": "prefix", "length": 3, **select}]}, "eager").bind(
        model, (x, memory)
    )
    fill(peftfx.parameters(model), scale=1.0)
    fronts = {}
    for p, _ in bound(model)[1].installed:
        tensors = entry_of(model, p).tensors()
        fronts[p.site.module.removesuffix(".query")] = tensors["keys"], tensors["values"]
    assert set(fronts) == where
    expected = by_hand(base, x, memory, fronts)
    assert relative(expected, base(x, memory)) > 1e-2
    grads: list[list[Tensor]] = []
    for run in (lambda *a: expected, model, compiled(model), compiled(model, dynamic=True)):
        out = run(x, memory)
        assert relative(out, expected) < 1e-5
        found = torch.autograd.grad(out.square().mean(), peftfx.parameters(model),
                                    retain_graph=out is expected)  # fmt: skip
        grads.append(list(found))
    for found in grads[1:]:
        assert all(relative(a, b) < 1e-4 for a, b in zip(found, grads[0], strict=True))


def test_masks_and_groups_are_the_base_s() -> None:
    """What is causal by name stays so behind a prefix, with keys of as many heads."""

    def attention(model: nn.Module, *args: Any, base: bool, **kwargs: Any) -> list[Any]:
        """Of each call in the graph: whether there is a mask, whether it is causal, key heads."""
        found = []

        def note(gm: Any, inputs: Any) -> Any:
            for n in gm.graph.nodes:
                if is_op(n, "prefix_attention"):
                    mask, causal = n.args[5], n.args[7]
                elif n.target is F.scaled_dot_product_attention:
                    mask, causal = n.kwargs.get("attn_mask"), n.kwargs.get("is_causal", False)
                else:
                    continue
                heads = n.args[1].meta["example_value"].shape[1]
                found.append((mask is not None, causal, heads))
            return gm.forward

        torch._dynamo.reset()
        backend: Any = note if base else Backend(None, note)
        torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
        return found

    given, toy = (torch.randn(2, 5, 6), torch.randn(2, 7, 6)), Toy()
    plain = attention(copy.deepcopy(toy), *given, base=True)
    Backend({"rules": [{"method": "prefix", "length": 3, "name": "*.query"}]}).bind(toy, given)
    assert attention(toy, *given, base=False) == plain
    assert plain == [(False, True, 2), (False, True, 3), (False, False, 1)]
    llama, x = by_name("llama").build(), inputs("llama")
    plain = attention(copy.deepcopy(llama), **x, base=True)
    assert attention(prefixed(llama), **x, base=False) == plain and len(plain) == 2


def compiled(model: nn.Module, lower: Any = "aot_eager", **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=Backend(None, lower), fullgraph=True, **options)


def prefixed(base: nn.Module, *more: dict[str, Any], **options: Any) -> nn.Module:
    model = copy.deepcopy(base)
    Backend({"rules": [rule("llama", "prefix", **options), *more]}, "aot_eager").bind(model)
    fill(peftfx.parameters(model), scale=0.7)
    return model


# -- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_positions_that_are_given(name: str) -> None:
    _, reference, model = pair(name, "prefix")
    x = {**inputs(name, "left"), "position_ids": torch.arange(9).expand(2, -1) + 2}
    expected = output(reference, x)
    assert (output(model, x)[0] - expected[0]).abs().max() < 2e-6
    assert (output(compiled(model), x)[0] - expected[0]).abs().max() < 2e-6


def test_packed_documents_stay_apart() -> None:
    """Positions that begin anew part documents; each has the prefix. PEFT joins them."""
    model = prefixed(by_name("llama").build())
    ids = inputs("llama")["input_ids"]
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)}
    expected = torch.cat([output(model, {"input_ids": ids[:, s]}) for s in
                          (slice(0, 4), slice(4, 9))], 1)  # fmt: skip
    assert relative(output(model, packed), expected) < 1e-5


@pytest.mark.parametrize("cls", ["RobertaForSequenceClassification", "OPTForCausalLM"])
def test_positions_of_other_tables(cls: str) -> None:
    """RoBERTa counts past padding, OPT from the mask and in a subclass of the table."""
    torch.manual_seed(0)
    config: Any
    if cls.startswith("OPT"):
        config = transformers.OPTConfig(
            vocab_size=61, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=3,
            max_position_embeddings=32, word_embed_proj_dim=24, dropout=0.0, pad_token_id=0,
        )  # fmt: skip
    else:
        config = transformers.RobertaConfig(
            vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=3, max_position_embeddings=32, num_labels=3, pad_token_id=1,
        )  # fmt: skip
    base = getattr(transformers, cls)(config).eval()
    from peft import PrefixTuningConfig, get_peft_model

    task = "CAUSAL_LM" if cls.startswith("OPT") else "SEQ_CLS"
    reference: Any = get_peft_model(
        copy.deepcopy(base), PrefixTuningConfig(task_type=task, num_virtual_tokens=P)
    ).eval()
    from tests.soft_prompts import ours

    model = ours(base, reference)
    x = inputs("llama", "right")
    x["input_ids"] = x["input_ids"].masked_fill(x["attention_mask"] == 0, config.pad_token_id)
    live = x["attention_mask"].bool() if task == "CAUSAL_LM" else slice(None)
    expected = output(reference, x)[live]
    assert relative(output(model, x)[live], expected) < 1e-5
    assert relative(output(compiled(model), x)[live], expected) < 1e-5
    assert relative(output(base, x)[live], expected) > 1e-3


# -- beside other methods ------------------------------------------------------------------------


def test_with_lora_on_the_same_projection_and_a_prompt() -> None:
    base = by_name("phi3").build()
    lora = {"method": "lora", "role": ["attention.query", "attention.key", "attention.value"],
            "rank": 2}  # fmt: skip
    model = prefixed(base, lora, rule("phi3", "prompt", init="vocabulary"))
    x = inputs("phi3", "left")
    expected = output(model, x)
    assert expected.shape[1] == P + 9
    backend = Backend(None, "aot_eager")
    torch._dynamo.reset()
    out = output(torch.compile(model, backend=backend, fullgraph=True), x)
    assert relative(out, expected) < 1e-5
    steps = {s.name: s.rewrites for s in backend.reports[-1].steps}
    assert steps["attend"] == 2 and steps["insert"] == 3  # two prefixes; LoRA twice, the prompt
    out.square().mean().backward()
    assert all(p.grad is not None for p in peftfx.parameters(model))


def test_dropout_of_attention_takes_the_joined_form() -> None:
    torch.manual_seed(0)
    config = copy.deepcopy(by_name("llama").build().config)
    config.attention_dropout = 0.4
    model = prefixed(transformers.LlamaForCausalLM(config)).train()
    backend = Backend(None, "aot_eager")
    run = torch.compile(model, backend=backend, fullgraph=True)
    x = inputs("llama")
    output(run, x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in peftfx.parameters(model))
    told = [r.reason for s in backend.reports[-1].steps for r in s.refusals]
    assert len([t for t in told if "joined: attention drops" in t]) == 2
    torch.manual_seed(1)
    one = output(model, x)
    assert relative(output(model, x), one) > 1e-3  # eager drops out too
    model.eval()
    assert relative(output(run, x), output(model, x)) < 1e-5
    told = [r.reason for s in backend.reports[-1].steps for r in s.refusals]
    assert not any("joined" in t for t in told)


def test_a_window_is_not_overstepped() -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=44, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=16, use_cache=False,
        pad_token_id=0,
    )  # fmt: skip
    base = transformers.MistralForCausalLM(config).eval()
    reference = theirs(base, "llama", "prefix")
    from tests.soft_prompts import ours

    model = ours(base, reference)
    x = inputs("llama")
    assert (output(model, x) - output(reference, x)).abs().max() < 2e-6
    assert (output(compiled(model), x) - output(reference, x)).abs().max() < 2e-6
    longer = {"input_ids": x["input_ids"].repeat(1, 2)}
    for run in (model, compiled(model)):
        with pytest.raises(NotAdaptedError, match="more than the window of 16"):
            output(run, longer)


# -- ways around, and refusals -------------------------------------------------------------------


def test_copies_and_threads() -> None:
    model, x = prefixed(by_name("llama").build()), inputs("llama", "left")
    expected = output(model, x)
    assert torch.equal(model.forward(**x).logits, expected)  # type: ignore[operator]
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(clone, x), expected)
        fill(peftfx.parameters(clone), 9)
        assert relative(output(clone, x), expected) > 1e-2
        assert torch.equal(output(model, x), expected)
    other, plain = prefixed(by_name("gpt2").build()), by_name("llama").build()
    pairs = [(m, output(m, x)) for m in (model, other, plain)]
    wrong: list[int] = []

    def work(number: int) -> None:
        run, want = pairs[number % 3]
        for _ in range(6):
            if not torch.equal(output(run, x), want):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_parts_by_themselves() -> None:
    """A block has all that its prefix needs; a projection alone has not."""
    model = prefixed(by_name("bert").build())
    block: Any = model.bert.encoder.layer[1]
    x = torch.randn(2, 5, 32)
    alone = block(x)
    alone = alone[0] if isinstance(alone, tuple) else alone
    with peftfx.disabled(model):
        base = block(x)
    assert relative(alone, base[0] if isinstance(base, tuple) else base) > 1e-2
    with pytest.raises(NotAdaptedError, match="outside of the module"):
        block.attention.self.query(x)
    block.compile(backend=Backend(None, "aot_eager"))
    again = block(x)
    assert relative(again[0] if isinstance(again, tuple) else again, alone) < 1e-5


def test_other_backends_and_exports() -> None:
    model, x = prefixed(by_name("bert").build()), inputs("bert")
    expected = output(model, x)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        with pytest.raises(Exception, match="not compiled by peftfx"):  # torch may wrap it
            output(torch.compile(model, backend=backend), x)
    program = torch.export.export(model, (), x, strict=False)
    assert relative(output(program.module(), x), expected) < 1e-5
    traced = torch.export.export(model, (), x, strict=True)
    with pytest.raises(NotAdaptedError, match="not compiled by peftfx"):
        output(traced.module(), x)
    strict = copy.deepcopy(by_name("bert").build())
    Backend({"rules": [rule("bert", "prefix")], "strict": True}, "eager").bind(strict)
    with pytest.raises(NotAdaptedError, match="strict"):
        output(strict, x)
    output(compiled(strict), x)


def test_attention_that_is_written_out() -> None:
    model, x = prefixed(by_name("llama").build()), inputs("llama")
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with pytest.raises(NotAdaptedError, match="no attention call that is known"):
        output(model, x)
    with pytest.raises(NotAdaptedError, match="no attention call that is known"):
        output(compiled(model), x)
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    output(model, x)
    for name in ("packed", "deberta", "mamba", "resnet"):
        arch = by_name(name)
        with pytest.raises(PlanError, match="shows none"):
            spec = {"rules": [{"method": "prefix", "role": "attention"}]}
            peftfx.plan(arch.build(), spec, example=arch.example())


@pytest.mark.parametrize("what", ["scope", "rotary", "mark"])
def test_hooks_that_are_gone(what: str) -> None:
    model, x = prefixed(by_name("llama").build()), inputs("llama")
    inner: Any = model.model
    if what == "scope":
        inner.layers[0].self_attn._forward_hooks.clear()
    elif what == "rotary":
        inner.rotary_emb._forward_pre_hooks.clear()
    else:
        inner.layers[1].self_attn.q_proj._forward_hooks.clear()
    for run in (model, compiled(model)):
        with pytest.raises(NotAdaptedError, match="gone"):
            output(run, x)


def test_lengths_agree_within_a_stack() -> None:
    base = by_name("llama").build()
    uneven = rule("llama", "prefix", overrides=[{"layers": 1, "length": 3}])
    with pytest.raises(PlanError, match="different lengths"):
        peftfx.plan(base, {"rules": [uneven]})
    t5 = by_name("t5").build()  # no positions are shared
    rules = {"rules": [{**uneven, "stack": "decoder"}]}
    lengths = [p.site.layer for p in peftfx.plan(t5, rules, by_name("t5").example())]
    assert lengths == [0, 1]


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_cross_attention(name: str) -> None:
    """Its positions are the memory's: nothing moves. Compiled and eager agree."""
    arch = by_name(name)
    base, x = arch.build(), arch.example()
    model = copy.deepcopy(base)
    spec = {"rules": [{"method": "prefix", "role": "cross_attention", "length": 4}]}
    Backend(spec, "aot_eager").bind(model, x)
    fill(peftfx.parameters(model), scale=1.0)
    expected = output(model, x)
    assert relative(output(base, x), expected) > 1e-3
    assert relative(output(compiled(model), x), expected) < 1e-5
    assert all(not p.site.around["positions"] for p, _ in bound(model)[1].installed)


@pytest.mark.parametrize("name", ["vit", "whisper", "albert", "mixtral"])
def test_other_architectures(name: str) -> None:
    arch = by_name(name)
    base, x = arch.build(), arch.example()
    model = copy.deepcopy(base)
    few: dict[str, Any] = {"method": "prefix", "role": "attention", "length": 4}
    if name == "whisper":
        few["stack"] = "decoder"  # the encoder has no more positions than it uses
    Backend({"rules": [few]}, "aot_eager").bind(model, x)
    fill(peftfx.parameters(model), scale=1.0)
    expected = output(model, x)
    assert relative(output(base, x), expected) > 1e-3
    torch._dynamo.reset()
    run = torch.compile(model, backend=Backend(None, "aot_eager"), fullgraph=name != "mixtral")
    out = output(run, x)
    assert relative(out, expected) < 1e-5
    out.square().mean().backward()
    assert all(p.grad is not None for p in peftfx.parameters(model))
