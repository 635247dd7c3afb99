"""The cross entropy of a frozen head, found in traced graphs: the same loss, without logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import peftfx
from peftfx.errors import LossError
from peftfx.unmade import Unmade
from tests.architectures import by_name
from tests.helpers import fill, relative

RULES: list[dict[str, Any]] = [{"method": "lora", "name": "body", "rank": 2}]
Loss = Callable[[nn.Linear, Tensor, Tensor], Any]


def mean(head: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(head(x).float().view(-1, 11), y.view(-1))


def shifted(head: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    z = head(x)[..., :-1, :].contiguous()
    return F.cross_entropy(z.view(-1, 11), y[..., 1:].contiguous().view(-1), label_smoothing=0.1)


def capped(head: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    z = torch.tanh(head(x) * 0.5 / 3.0) * 3.0
    labels = y.abs().reshape(-1) % 11
    return F.cross_entropy(z.reshape(-1, 11), labels, reduction="sum", ignore_index=3) / 7


def each(head: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(head(x).flatten(0, 1), y.flatten(), reduction="none")
    return (losses * torch.linspace(0, 1, len(losses))).sum()


def weighed(head: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(head(x).view(-1, 11), y.view(-1), weight=torch.ones(11))


def read_twice(head: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    z = head(x)
    return F.cross_entropy(z.view(-1, 11), y.view(-1)) + z.square().mean()


def dropped(head: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy((head(x) + 1.0).view(-1, 11), y.view(-1))


def joined(head: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(head(x).view(-1, 11)[1:], y.view(-1)[1:])


def soft(head: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(head(x).view(-1, 11), F.one_hot(y.view(-1) % 11, 11).to(x.dtype))


def beside(head: nn.Linear, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = head(x)
    return F.cross_entropy(z.view(-1, 11), y.view(-1)), z


class Net(nn.Module):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.body, self.head, self.loss = nn.Linear(6, 5), nn.Linear(5, 11), loss

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.loss(self.head, torch.relu(self.body(x)), y)


X, Y = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1)), torch.tensor(
    [[1, 2, 10, 3], [0, -100, 4, 4]]
)  # fmt: skip


def adapted(
    made_of: Loss, rules: Any = None, **options: Any
) -> tuple[peftfx.Backend, nn.Module, Callable[..., Any]]:
    torch.manual_seed(0)
    model = Net(made_of)
    backend = peftfx.backend({"rules": rules or RULES}, **{"lower": "aot_eager", **options})
    backend.bind(model, (X, Y))
    fill(peftfx.parameters(model))
    return backend, model, torch.compile(model, backend=backend, fullgraph=True)


def said(backend: peftfx.Backend) -> str:
    return str(backend.reports[-1])


@pytest.mark.parametrize("loss", [mean, shifted, capped, each])
@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
def test_equal_to_whole_logits(loss: Loss, lower: str) -> None:
    backend, model, run = adapted(loss, lower=lower)
    want = model(X, Y)
    expected = torch.autograd.grad(want, list(peftfx.parameters(model)))
    got = run(X, Y)
    assert torch.allclose(got, want, rtol=1e-5)
    found = torch.autograd.grad(got, list(peftfx.parameters(model)))
    assert all(relative(a, b) < 1e-4 for a, b in zip(found, expected, strict=True))
    (step,) = [s for s in backend.reports[-1].steps if s.name == "chunk"]
    assert step.rewrites == 1 and not step.refusals
    if lower == "aot_eager":
        assert "(linear_cross_entropy): chunks, rows by torch" in said(backend)
    with torch.no_grad():
        assert torch.allclose(run(X, Y), want, rtol=1e-5)


@pytest.mark.parametrize(
    "loss, rules, why",
    [
        (weighed, None, "classes have weights"),
        (read_twice, None, "reads the logits too"),
        (dropped, None, "lies between the head and its loss"),
        (joined, None, "lies between the head and its loss"),
        (soft, None, "not one class for each row"),
        (beside, None, "`loss='chunked'` leaves them out"),
        (mean, [{"method": "lora", "name": "head", "rank": 2}], "the head is adapted"),
        (mean, [*RULES, {"method": "train", "name": "head"}], "the weight trains"),
        (mean, [*RULES, {"method": "bitfit", "name": "head"}], "its bias trains"),
    ],
)
def test_refused(loss: Loss, rules: Any, why: str) -> None:
    """The loss is left as it was, and the reason told; where chunks are ordered, it is an error."""
    backend, model, run = adapted(loss, rules)
    got, want = run(X, Y), model(X, Y)
    assert torch.allclose(*(v[0] if isinstance(v, tuple) else v for v in (got, want)), rtol=1e-5)
    assert why in said(backend), said(backend)
    if loss is not beside:
        with pytest.raises(LossError, match=why.replace("(", r"\(")):
            adapted(loss, rules, loss="chunked")[2](X, Y)


def test_logits_are_left_out_where_that_is_ordered() -> None:
    _, model, run = adapted(beside, loss="chunked")
    want, logits = model(X, Y)
    loss, left = run(X, Y)
    assert torch.allclose(loss, want, rtol=1e-5) and isinstance(left, Unmade)
    assert left.shape == logits.shape and "chunked" in repr(left)
    assert left.float().detach().double().dtype == torch.float64  # mixed precision does that
    for ask in (lambda: left.argmax(-1), lambda: left[0], lambda: left + 1, lambda: left.numpy()):
        with pytest.raises((LossError, RuntimeError, TypeError)):
            ask()
    with pytest.raises(LossError, match="no_grad"):
        left.sum()
    with torch.no_grad():
        assert torch.allclose(run(X, Y)[1], logits, rtol=1e-5)


def test_unknown_loss() -> None:
    with pytest.raises(peftfx.PeftfxError, match="chunked"):
        peftfx.backend({"rules": RULES}, loss="chunk")  # type: ignore[arg-type]


def llama(loss: Any) -> nn.Module:
    torch.manual_seed(0)
    model = by_name("llama").build()
    spec = {"rules": [{"method": "lora", "role": ["attention.query", "mlp.down"], "rank": 3}]}
    peftfx.adapt(model, spec, lower="aot_eager", loss=loss)
    fill(peftfx.parameters(model))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_hf_trainer(precision: str, tmp_path: Any) -> None:
    """Accumulation, mixed precision and evaluation: the same losses as without."""
    ids = torch.randint(3, 60, (12, 8), generator=torch.Generator().manual_seed(2))
    data = [{"input_ids": row, "labels": row.where(row > 9, -100)} for row in ids]
    found = []
    for loss in (None, "chunked"):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=3, report_to="none",
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=1, use_cpu=True,
            dataloader_pin_memory=False, save_strategy="no", bf16=precision == "bf16", seed=1,
        )  # fmt: skip
        from peftfx.training.trainer import Trainer

        model = llama(loss)
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)  # type: ignore[arg-type]
        trainer.train()
        logs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        found.append((logs, trainer.evaluate()["eval_loss"], peftfx.state_dict(model)))
        with torch.no_grad():
            shape = model(input_ids=ids[:2], labels=ids[:2]).logits.shape
        assert shape == (2, 8, model.config.vocab_size)  # type: ignore[union-attr]
        if loss:
            out = model.train()(input_ids=ids[:2], labels=ids[:2])
            assert isinstance(out.logits, Unmade) and out.loss.requires_grad
    bound = 1e-4 if precision == "fp32" else 2e-2
    (before, evaluated, tensors), (after, again, others) = found
    assert len(before) == 3
    assert before == pytest.approx(after, rel=bound)
    assert evaluated == pytest.approx(again, rel=bound)
    if precision == "fp32":
        assert all(torch.allclose(v, others[k], atol=1e-4) for k, v in tensors.items())


def test_copies_and_eager_runs() -> None:
    """A copy of the backend keeps the order; what goes around the backend makes logits as ever."""
    backend, model, _ = adapted(beside, loss="chunked")
    assert copy.deepcopy(backend).loss == "chunked"
    assert not isinstance(model(X, Y)[1], Unmade)
