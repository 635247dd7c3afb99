"""``generate`` with prompts and prefixes: caches, padding, beams, and the graphs that it takes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, StaticCache

import peftfx
from peftfx.backends import Backend, compile_in_place
from peftfx.errors import NotAdaptedError
from tests.helpers import fill
from tests.soft_prompts import inputs, pair, rule

NEW = 7


def generate(model: Any, x: dict[str, Tensor], cache: str = "dynamic", **options: Any) -> Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    if cache == "none":
        options["use_cache"] = False
    elif cache != "dynamic":
        options["cache_implementation"] = cache
    found: Tensor = model.generate(**x, **{"use_cache": True, **options})
    return found


def made(name: str, method: str) -> tuple[nn.Module, Any, nn.Module]:
    """Base, PEFT's model and ours; sequences go on to the end, and the adapter matters."""
    return pair(name, method, eos_token_id=None, use_cache=True)


def texts(name: str, padding: str) -> dict[str, Tensor]:
    x = inputs(name, padding, decoder=False)
    x.setdefault("attention_mask", torch.ones_like(x["input_ids"]))
    return x


@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_equal_to_peft_eagerly(name: str, method: str, padding: str, beams: int) -> None:
    base, reference, model = made(name, method)
    x = texts(name, padding)
    expected = generate(reference, x, num_beams=beams)
    for cache in ("none", "dynamic", "static"):
        assert torch.equal(generate(model, x, cache, num_beams=beams), expected), cache
    assert not torch.equal(generate(base, x, num_beams=beams), expected)


KINDS = [(c, p, b) for c in ("dynamic", "static") for p in ("none", "left") for b in (1, 3)]
FEW = [("dynamic", "none", 1), ("static", "none", 1), ("dynamic", "left", 3), ("static", "left", 3)]


def counted(model: Any, kinds: Any, encoder: bool, name: str, counter: Any) -> Any:
    """What each kind of generation gives, and how many graphs it added."""
    torch._dynamo.reset()
    if peftfx.is_adapted(model):
        compile_in_place(model, Backend(None, counter))
    else:
        for module in [model] + [model.get_encoder()] * encoder:
            module.compile(backend=counter, isolate_recompiles=True, recompile_limit=64)
    found, graphs = [], []
    for cache, padding, beams in kinds:
        before = counter.frame_count
        found.append(generate(model, texts(name, padding), cache, num_beams=beams))
        graphs.append(counter.frame_count - before)
    return found, graphs


@pytest.mark.parametrize(
    "name, method, kinds",
    [("llama", "prefix", FEW)]
    + [(*case, KINDS) for case in (("llama", "prompt"), ("gpt2", "prefix"), ("t5", "prompt"))],
)  # fmt: skip
@pytest.mark.slow
def test_compiled_in_place(name: str, method: str, kinds: Any) -> None:
    """Equal to PEFT, in as many graphs as the base takes, and none more for more of the same."""
    base, reference, model = made(name, method)
    bare, counter = CompileCounterWithBackend("eager"), CompileCounterWithBackend("eager")
    encoder = name == "t5"  # the base's is compiled beside it here, as ours is
    plain, expected_graphs = counted(copy.deepcopy(base), kinds, encoder, name, bare)
    found, graphs = counted(model, kinds, encoder, name, counter)
    for kind, out in zip(kinds, found, strict=True):
        expected = generate(reference, texts(name, kind[1]), num_beams=kind[2])
        assert torch.equal(out, expected), kind
    assert any(not torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert graphs == expected_graphs
    warm = counter.frame_count
    for (cache, padding, beams), out in zip(kinds, found, strict=True):
        again = generate(model, texts(name, padding), cache, num_beams=beams)
        assert torch.equal(again, out)
    longer = generate(model, texts(name, "none"), max_new_tokens=NEW + 5)
    assert torch.equal(longer[:, : found[0].shape[1]], found[0])
    assert counter.frame_count == warm


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_t5_prefix(cache: str) -> None:
    """Its relative biases continue to the prefix in every graph; eager refuses."""
    _, reference, model = made("t5", "prefix")
    x = texts("t5", "left")
    with pytest.raises(NotAdaptedError, match="learned values for distances"):
        generate(model, x)
    compile_in_place(model, Backend(None, "eager"))
    for beams in (1, 3):
        expected = generate(reference, x, num_beams=beams)
        assert torch.equal(generate(model, x, cache, num_beams=beams), expected)


def test_t5_prompt_eagerly() -> None:
    _, reference, model = made("t5", "prompt")
    for padding in ("none", "left"):
        for beams in (1, 3):
            x = texts("t5", padding)
            expected = generate(reference, x, num_beams=beams)
            for cache in ("none", "dynamic", "static"):
                assert torch.equal(generate(model, x, cache, num_beams=beams), expected)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_steps_are_as_a_run_without_a_cache(method: str) -> None:
    """Logits of every step, left-padded, against whole runs; PEFT is wrong with static caches."""
    _, _, model = made("llama", method)
    x = texts("llama", "left")
    options = {"output_logits": True, "return_dict_in_generate": True}
    expected: Any = generate(model, x, "none", **options)
    for cache in ("dynamic", "static"):
        out: Any = generate(model, x, cache, **options)
        for a, b in zip(out.logits, expected.logits, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_sampling_chunks_and_lookup(method: str) -> None:
    """PEFT goes wrong on chunked prefill and prompt lookup: the reference is the plain run."""
    _, _, model = made("llama", method)
    x = texts("llama", "none")
    expected = generate(model, x)
    assert torch.equal(generate(model, x, prefill_chunk_size=4), expected)
    one = {k: v[:1] for k, v in x.items()}
    one["input_ids"] = torch.cat([one["input_ids"], expected[:1, 9:13], one["input_ids"]], 1)
    one["attention_mask"] = torch.ones_like(one["input_ids"])
    assert torch.equal(generate(model, one, prompt_lookup_num_tokens=2), generate(model, one))
    torch.manual_seed(3)
    sampled = generate(model, x, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(generate(model, x, "static", do_sample=True), sampled)


def test_a_cache_without_the_prompt_is_refused() -> None:
    _, _, model = made("llama", "prompt")
    x = texts("llama", "none")
    static = StaticCache(config=model.config, max_cache_len=40)
    static.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    with pytest.raises(NotAdaptedError, match="virtual tokens are not in it"):
        model(**x, past_key_values=static)
    compiled = torch.compile(model, backend=Backend(None, "aot_eager"))
    with pytest.raises(RuntimeError, match="virtual tokens are not in it"):
        compiled(**x, past_key_values=static)
    filled = DynamicCache(config=model.config)
    with peftfx.disabled(model):
        model(**x, past_key_values=filled)
    with pytest.raises(NotAdaptedError, match="columns"):
        model(input_ids=x["input_ids"][:, -1:], attention_mask=torch.ones(2, 10, dtype=torch.long),
              past_key_values=filled)  # fmt: skip


def test_a_prefix_leaves_the_cache_to_the_tokens() -> None:
    base, _, model = made("llama", "prefix")
    x = texts("llama", "none")
    for cls in (DynamicCache, StaticCache):
        options = {"max_cache_len": 12} if cls is StaticCache else {}
        cache = cls(config=model.config, **options)
        model(**x, past_key_values=cache)
        assert int(cache.get_seq_length()) == x["input_ids"].shape[1]
    again = generate(model, x, past_key_values=DynamicCache(config=base.config))
    assert torch.equal(again, generate(model, x))


def test_turns_of_a_conversation() -> None:
    """A prefix goes on over a cache that is kept; a prompt's cache is longer than HF believes."""
    for method in ("prefix", "prompt"):
        _, _, model = made("llama", method)
        x = texts("llama", "none")
        cache = DynamicCache(config=model.config)
        first = generate(model, x, past_key_values=cache)
        more = torch.cat([first, x["input_ids"][:, :4]], 1)
        turn = {"input_ids": more, "attention_mask": torch.ones_like(more)}
        if method == "prefix":
            expected = generate(model, turn)
            assert torch.equal(generate(model, turn, past_key_values=cache), expected)
        else:
            with pytest.raises(NotAdaptedError, match="do not follow"):
                generate(model, turn, past_key_values=cache)


def test_disabled_and_another_adapter_between_steps() -> None:
    base, reference, model = made("llama", "prefix")
    x = texts("llama", "left")
    peftfx.add(model, {"rules": [rule("llama", "prompt", length=3)]}, "b")
    fill(peftfx.parameters(model, "b"), scale=1.0)
    counter = CompileCounterWithBackend("eager")
    compile_in_place(model, Backend(None, counter))
    found = []
    for _ in range(2):
        found.append(generate(model, x))
        with peftfx.disabled(model):
            assert torch.equal(generate(model, x), generate(base, x))
        peftfx.activate(model, "b")
        found.append(generate(model, x))
        peftfx.activate(model, "default")
        warm = counter.frame_count if len(found) == 2 else warm  # noqa: F821
    assert counter.frame_count == warm
    assert torch.equal(found[0], generate(reference, x)) and torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3]) and not torch.equal(found[0], found[1])


def test_both_at_once() -> None:
    """A prompt and a prefix in one spec: the cached run is the uncached one."""
    base, _, _ = made("llama", "prefix")
    model = copy.deepcopy(base)
    rules = [rule("llama", "prompt", length=2), rule("llama", "prefix", length=3)]
    Backend({"rules": rules}, "eager").bind(model)
    fill(peftfx.parameters(model), scale=1.0)
    x = texts("llama", "left")
    expected = generate(model, x, "none")
    assert torch.equal(generate(model, x), expected)
    assert torch.equal(generate(model, x, "static"), expected)
    assert not torch.equal(generate(base, x), expected)
