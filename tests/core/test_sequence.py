"""Virtual tokens in front: what a model's inputs become, and what is refused."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from peftfx.errors import BindError, NotAdaptedError, PeftfxError, PlanError, SpecError
from tests.architectures import by_name
from tests.helpers import fill, output, relative
from tests.soft_prompts import PROMPT, P, inputs, ours, prompted, rule


def as_peft_has_it(base: nn.Module, task: str) -> tuple[Any, nn.Module]:
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=P)
    torch.manual_seed(4)
    reference = peft.get_peft_model(copy.deepcopy(base), config).eval()
    return reference, ours(base, reference)


def small(name: str, **values: Any) -> Any:
    """A model of another head on the architectures' bodies."""
    torch.manual_seed(0)
    body = by_name("gpt2" if name.startswith("GPT2") else "bert").build().config
    config: Any = copy.deepcopy(body)
    for key, value in {"num_labels": 3, "pad_token_id": 0, **values}.items():
        setattr(config, key, value)
    return getattr(transformers, name)(config).eval()


# -- what inputs become --------------------------------------------------------------------------


def test_labels_of_a_causal_model_leave_the_prompt_out() -> None:
    base = by_name("llama").build()
    reference, model = as_peft_has_it(base, "CAUSAL_LM")
    x = inputs("llama", "right")
    labels = x["input_ids"].masked_fill(x["attention_mask"] == 0, -100)
    expected, found = reference(**x, labels=labels), model(**x, labels=labels)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.logits, expected.logits)
    compiled = torch.compile(model, backend=Backend(None, "aot_eager"), fullgraph=True)
    assert relative(compiled(**x, labels=labels).loss, expected.loss) < 1e-6


def test_labels_of_tokens() -> None:
    """PEFT fails here: its labels and logits differ in length."""
    model = prompted(small("BertForTokenClassification"))
    x = inputs("bert", "right")
    labels = torch.arange(18).reshape(2, 9) % 3
    out = model(**x, labels=labels)
    assert out.logits.shape == (2, P + 9, 3)
    by_hand = nn.functional.cross_entropy(out.logits[:, P:].reshape(-1, 3), labels.reshape(-1))
    assert torch.allclose(out.loss, by_hand)


def test_labels_of_a_sequence_stay() -> None:
    base = by_name("bert").build()
    reference, model = as_peft_has_it(base, "SEQ_CLS")
    x, labels = inputs("bert"), torch.tensor([2, 0])
    assert torch.equal(model(**x, labels=labels).loss, reference(**x, labels=labels).loss)


def test_answers_move_with_the_text() -> None:
    """PEFT leaves them where they were, P tokens too early."""
    model = prompted(small("BertForQuestionAnswering", num_labels=2))
    x = inputs("bert")
    start, end = torch.tensor([1, 4]), torch.tensor([3, 5])
    out = model(**x, start_positions=start, end_positions=end)
    by_hand = sum(
        nn.functional.cross_entropy(logits, at + P)
        for logits, at in ((out.start_logits, start), (out.end_logits, end))
    )
    assert torch.allclose(out.loss, by_hand / 2)


@pytest.mark.parametrize("name, task", [("bert", "SEQ_CLS"), ("gpt2", "CAUSAL_LM")])
def test_token_types(name: str, task: str) -> None:
    """Zeros in front; a causal model goes without, as with PEFT."""
    base = by_name(name).build()
    reference, model = as_peft_has_it(base, task)
    types = torch.arange(18).reshape(2, 9) % 2
    with pytest.warns(UserWarning) if task == "CAUSAL_LM" else _nothing():
        expected = output(reference, {**inputs(name), "token_type_ids": types})
    assert torch.equal(output(model, {**inputs(name), "token_type_ids": types}), expected)
    same = torch.equal(output(model, inputs(name)), expected)
    assert same == (task == "CAUSAL_LM")


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_positions_are_counted_anew() -> None:
    base = by_name("llama").build()
    model, x = prompted(base), inputs("llama")
    given = {**x, "position_ids": torch.arange(9).expand(2, -1) + 3}
    assert torch.equal(output(model, given), output(model, x))


def test_the_last_token_of_a_padded_sequence_is_pooled() -> None:
    """PEFT hands over embeddings, so that the model cannot see what is padding."""
    model = prompted(small("GPT2ForSequenceClassification"))
    x = inputs("gpt2", "right")
    x["input_ids"] = x["input_ids"] * x["attention_mask"]
    out = output(model, x)
    alone = output(model, {"input_ids": x["input_ids"][1:, :6]})
    assert relative(out[1:], alone) < 1e-5


def test_placeholders_mean_nothing() -> None:
    """The row of the table at the placeholder has no part in the result."""
    base = by_name("gpt2").build()
    model, x = prompted(base), inputs("gpt2")
    expected = output(model, x)
    (placement,) = peftfx.plan(base, PROMPT)
    with torch.no_grad():
        model.transformer.wte.weight[placement.site.around["placeholder"]] = float("nan")
    out = output(model, x)
    free = [i for i in range(61) if i != placement.site.around["placeholder"]]
    assert torch.equal(out[..., free], expected[..., free])  # the head is tied: one column is NaN


def test_a_model_that_is_not_hf_s() -> None:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix = nn.Embedding(11, 6), nn.GRUCell(6, 6)
            self.out = nn.Linear(6, 4)

        def forward(self, words: Tensor, weight: Tensor | None = None) -> Tensor:
            x = self.table(words)
            return self.out(torch.tanh(x.cumsum(1)))

    torch.manual_seed(0)
    base, words = Toy(), torch.tensor([[1, 4, 8], [3, 3, 7]])
    model = prompted(base, example=(words,))
    rows = peftfx.parameters(model)[0].expand(2, -1, -1)
    x = torch.cat([rows, base.table(words)], 1)
    expected = base.out(torch.tanh(x.cumsum(1)))
    assert relative(model(words), expected) < 1e-6
    compiled = torch.compile(model, backend=Backend(None, "aot_eager"), fullgraph=True)
    assert relative(compiled(words=words), expected) < 1e-6
    with pytest.raises(NotAdaptedError, match="how weight of shape"):
        model(words, torch.ones(2, 3))


# -- starts --------------------------------------------------------------------------------------


def test_starts(tmp_path: Path) -> None:
    base = by_name("llama").build()
    table = base.model.embed_tokens.weight  # type: ignore[union-attr]
    drawn = copy.deepcopy(base)
    Backend({"rules": [rule("llama", "prompt", init="vocabulary")]}, "eager").bind(drawn)
    rows = peftfx.parameters(drawn)[0]
    assert all(any(torch.equal(row, w) for w in table) for row in rows)

    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[UNK]": 0, "translate": 7, "to": 9, "english": 23}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
    text = {"init": "text", "text": "translate to english", "tokenizer": str(tmp_path)}
    for length, ids in ((5, [7, 9, 23, 7, 9]), (2, [7, 9])):
        model = copy.deepcopy(base)
        spec = {"rules": [rule("llama", "prompt", **text) | {"length": length}]}
        Backend(spec, "eager").bind(model)
        assert torch.equal(peftfx.parameters(model)[0], table[ids])
    with pytest.raises(SpecError, match="no directory"):
        spec = {"rules": [rule("llama", "prompt", **{**text, "tokenizer": "gpt2"})]}
        Backend(spec, "eager").bind(copy.deepcopy(base))


def test_options_that_make_no_sense() -> None:
    for options in (
        {"length": 0}, {"length": 10**9}, {"init": "text"}, {"text": "a", "tokenizer": "b"},
        {"init": "somehow"},
    ):  # fmt: skip
        with pytest.raises(SpecError):
            peftfx.Spec.parse({"rules": [rule("llama", "prompt") | options]})
    for options in ({"encoder": "gru"}, {"hidden": -1}, {"lstm_layers": 0}):
        with pytest.raises(SpecError):
            peftfx.Spec.parse({"rules": [rule("llama", "ptuning") | options]})
    for options in ({"length": 0}, {"hidden": -1}, {"init": "text"}):
        with pytest.raises(SpecError):
            peftfx.Spec.parse({"rules": [rule("llama", "prefix") | options]})


# -- ways around ---------------------------------------------------------------------------------


def test_forward_is_met_whatever_calls_it() -> None:
    base, x = by_name("llama").build(), inputs("llama", "left")
    model = prompted(base)
    expected = output(model, x)
    ids, mask = x["input_ids"], x["attention_mask"]
    assert torch.equal(model.forward(ids, mask).logits, expected)  # type: ignore[operator]
    assert torch.equal(model(ids, attention_mask=mask).logits, expected)
    call = torch.func.functional_call(model, dict(model.named_parameters()), (ids, mask))
    assert torch.equal(call.logits, expected)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(clone) is type(model) and torch.equal(output(clone, x), expected)
        fill(peftfx.parameters(clone), 9)
        assert relative(output(clone, x), expected) > 1e-2
        assert torch.equal(output(model, x), expected)


@pytest.mark.parametrize("compiles", [False, True])
def test_a_part_of_the_model_by_itself_is_refused(compiles: bool) -> None:
    model = prompted(by_name("llama").build())
    part: Any = model.model
    if compiles:
        part = torch.compile(part, backend=Backend(None, "aot_eager"))
    with pytest.raises(NotAdaptedError, match="part of the model"):
        part(**inputs("llama"))
    if not compiles:
        with peftfx.disabled(model):
            part(**inputs("llama"))


def test_another_backend_runs_the_prompt_too() -> None:
    model = prompted(by_name("llama").build())
    x = inputs("llama", "left")
    expected = output(model, x)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        assert relative(output(torch.compile(model, backend=backend), x), expected) < 1e-5
    strict = prompted(by_name("llama").build(), {**PROMPT, "strict": True})
    with pytest.raises(NotAdaptedError, match="strict"):
        output(strict, x)


def test_bound_by_its_first_call() -> None:
    """That call has begun with the inputs as they were; the next one is right."""
    model, x = by_name("llama").build(), inputs("llama")
    compiled = torch.compile(model, backend=Backend(PROMPT, "aot_eager"), fullgraph=True)
    with pytest.raises(BindError, match="call it again"):
        output(compiled, x)
    fill(peftfx.parameters(model), scale=1.0)
    assert relative(output(compiled, x), output(model, x)) < 1e-5


def test_threads_keep_their_own_state() -> None:
    model = prompted(by_name("llama").build())
    x = inputs("llama")
    expected = output(model, x)
    model.requires_grad_(False)
    cached = model(**x, use_cache=True)
    step = {"input_ids": x["input_ids"][:, :1]}
    after = model(**step, past_key_values=copy.deepcopy(cached.past_key_values)).logits
    problems: list[str] = []

    def work(number: int) -> None:
        for _ in range(8):
            if number % 3 == 0 and not torch.equal(output(model, x), expected):
                problems.append("prefill")
            if number % 3 == 1:
                cache = copy.deepcopy(cached.past_key_values)
                if not torch.equal(model(**step, past_key_values=cache).logits, after):
                    problems.append("step")
            if number % 3 == 2:
                try:
                    model.model(**x)  # type: ignore[operator]
                    problems.append("a bare backbone ran")
                except NotAdaptedError:
                    pass

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_a_failing_run_leaves_the_model_unarmed() -> None:
    model = prompted(by_name("llama").build())
    with pytest.raises(Exception, match=r"embed|Expected|float"):
        model(input_ids=torch.ones(2, 3) * 0.5)
    with pytest.raises(NotAdaptedError):
        model.model(**inputs("llama"))  # type: ignore[operator]


def test_exported_with_the_prompt() -> None:
    model, x = prompted(by_name("bert").build()), inputs("bert")
    expected = output(model, x)
    for strict in (False, True):
        program = torch.export.export(model, (), {"input_ids": x["input_ids"]}, strict=strict)
        assert relative(output(program.module(), x), expected) < 1e-5
    with pytest.raises(PeftfxError):
        peftfx.rewrite(torch.export.export(by_name("bert").build(), (), x), PROMPT)


def test_what_is_refused() -> None:
    base, x = by_name("llama").build(), inputs("llama")
    model = prompted(base)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"inputs_embeds": torch.zeros(2, 9, 32)}, "without input_ids"),
        ({**x, "attention_mask": torch.ones(2, 1, 9, 9).bool()}, "4 dimensions"),
        ({**x, "attention_mask": torch.ones(2, 7)}, "7 columns for 9 tokens"),
        ({**x, "inputs_embeds": torch.zeros(2, 9, 32)}, "how inputs_embeds"),
        ({**x, "past_key_values": ((torch.zeros(1),) * 2,)}, "cache of type tuple"),
    ]
    for given, message in cases:
        with pytest.raises(NotAdaptedError, match=message):
            model(**given)
    t5 = prompted(by_name("t5").build())
    encoded = by_name("t5").build().encoder(input_ids=x["input_ids"])
    for extra in ({}, {"attention_mask": torch.ones(2, 9)}):
        with pytest.raises(NotAdaptedError, match="encoder_outputs"):
            t5(encoder_outputs=encoded, decoder_input_ids=x["input_ids"][:, :2], **extra)
    own = t5.encoder(input_ids=x["input_ids"])  # type: ignore[operator]
    assert own[0].shape[1] == P + 9
    given = {"decoder_input_ids": x["input_ids"][:, :2], "attention_mask": torch.ones(2, 9)}
    expected = t5(input_ids=x["input_ids"], **given).logits
    assert torch.equal(t5(encoder_outputs=own, **given).logits, expected)


def test_plans_that_are_refused() -> None:
    for name, role, message in (
        ("whisper", "tokens", "the decoder takes them"),
        ("vit", "tokens", "shows none"),
        ("tables", "tokens", "shows none"),
    ):
        arch = by_name(name)
        spec = {"rules": [{"method": "prompt", "role": role}]}
        with pytest.raises(PlanError, match=message):
            peftfx.plan(arch.build(), spec, example=arch.example())
    both = {"rules": [rule("llama", "prompt"), rule("llama", "ptuning")]}
    with pytest.raises(PlanError, match="both act here"):
        peftfx.plan(by_name("llama").build(), both)
    with pytest.raises(PlanError, match="did you mean"):
        named = {"method": "prompt", "name": "*.embed_token"}
        peftfx.plan(by_name("llama").build(), {"rules": [named]})
    (placement,) = peftfx.plan(
        by_name("llama").build(), {"rules": [{"method": "prompt", "name": "*.embed_tokens"}]}
    )
    assert placement.count == 20 * 32
