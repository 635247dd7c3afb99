"""Training for real: a plain loop, HF's Trainer, accumulation, and resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import peftfx
from peftfx.training.trainer import Trainer
from tests.architectures import by_name
from tests.helpers import fill, output

SPEC: dict[str, Any] = {
    "rules": [
        {"method": "lora", "role": ["attention.query", "mlp.down"], "rank": 3, "dropout": 0.1},
        {"method": "train", "name": "classifier"},
    ]
}


class Data(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random texts of which the label is a function."""

    def __init__(self, count: int = 24) -> None:
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(3, 61, (count, 8), generator=generator)
        self.labels = self.ids[:, 1] % 3

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def trainer(model: nn.Module, directory: Path, **options: Any) -> Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(directory), per_device_train_batch_size=4, learning_rate=1e-2,
        max_steps=8, save_steps=4, logging_steps=2, report_to="none", seed=1,
        dataloader_pin_memory=False, use_cpu=True, **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Data(), eval_dataset=Data(8))


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = by_name("bert").build()
    peftfx.adapt(model, SPEC, lower="aot_eager")
    return model


def scheduled() -> nn.Module:
    """Rules with schedules and penalties: ranks are budgeted, adapters dropped, weights held."""
    torch.manual_seed(0)
    model = by_name("bert").build()
    rules = [
        {"method": "adalora", "role": "attention.query", "rank": 4, "target": 1, "warmup": 1,
         "end": 6},
        {"method": "bottleneck", "role": "residual.mlp", "size": 3, "drop": 2},
        {"method": "train", "name": "classifier", "l2_sp": 0.5},
    ]  # fmt: skip
    peftfx.adapt(model, {"rules": rules}, lower="eager")
    return model


def test_schedules_and_penalties_of_rules(tmp_path: Path) -> None:
    model = scheduled()
    made = trainer(model, tmp_path / "whole")
    made.train()
    assert made.schedule.steps == 8
    whole = tensors(model)
    on = {n: float(t) for n, t in whole.items() if n.endswith(".on")}
    ranks = [t for n, t in whole.items() if ":adalora." in n and t.numel() == 4]
    assert len(on) == 2 and sum(int((t == 0).sum()) for t in ranks) == 2 * 3

    again = scheduled()  # the penalty is part of the loss
    fill(peftfx.parameters(again))
    kept = trainer(again.train(), tmp_path / "loss")
    batch = {"input_ids": Data().ids[:4], "labels": Data().labels[:4]}
    extra = kept.compute_loss(again, batch) - again(**batch).loss
    penalty = peftfx.penalty(again).item()
    assert penalty > 1e-3 and extra.item() == pytest.approx(penalty, rel=1e-4)

    resumed = scheduled()
    other = trainer(resumed, tmp_path / "resumed")
    other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert other.schedule.steps == 8
    assert all(torch.equal(whole[k], v) for k, v in tensors(resumed).items())


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in peftfx.state_dict(model).items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_plain_loop_learns() -> None:
    model, data = adapted(), Data(16)
    optimizer = torch.optim.AdamW(peftfx.parameter_groups(model, lr=1e-2, weight_decay=0.01))
    losses = []
    for _ in range(40):
        loss = model(input_ids=data.ids, labels=data.labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_checkpoint_is_the_adapter_and_resume_is_bit_exact(tmp_path: Path) -> None:
    whole = adapted()
    trainer(whole, tmp_path / "a").train()
    held = {f.name for f in (tmp_path / "a" / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in held and "model.safetensors" not in held

    torch._dynamo.reset()
    resumed = adapted()
    trainer(resumed, tmp_path / "a").train(
        resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4")
    )
    assert equal(tensors(resumed), tensors(whole))

    reloaded = by_name("bert").build()
    peftfx.load(reloaded, tmp_path / "a" / "checkpoint-8", compile=False)
    x = by_name("bert").example()
    whole.eval()
    torch._dynamo.reset()
    assert torch.equal(output(reloaded, x), _eager(whole, x))
    theirs = peft.PeftModel.from_pretrained(
        by_name("bert").build(), tmp_path / "a" / "checkpoint-8"
    ).eval()
    assert torch.allclose(output(theirs, x), output(reloaded, x), atol=1e-6)


def _eager(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
    copied = copy.deepcopy(model)
    copied._compiled_call_impl = None
    return output(copied, x)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_and_checkpointing_as_peft_has_them(
    tmp_path: Path, checkpointing: bool
) -> None:
    """The same run by HF PEFT, eagerly, from the same start: the same tensors at its end."""
    # plain steps: Adam's would blow rounding up
    options: dict[str, Any] = {"optim": "sgd", "gradient_accumulation_steps": 2}
    new = "activation_checkpointing" in transformers.TrainingArguments.__dataclass_fields__
    options["activation_checkpointing" if new else "gradient_checkpointing"] = checkpointing
    model = by_name("bert").build()
    peftfx.adapt(model, {"rules": [{**SPEC["rules"][0], "dropout": 0.0}, SPEC["rules"][1]]},
                 lower="aot_eager")  # fmt: skip
    peftfx.save(model, tmp_path / "start")
    trainer(model, tmp_path / "ours", **options).train()
    theirs = peft.PeftModel.from_pretrained(
        by_name("bert").build(), tmp_path / "start", is_trainable=True
    )
    made = transformers.Trainer(
        theirs, trainer(model, tmp_path / "theirs", **options).args, train_dataset=Data()
    )
    made.train()
    theirs.save_pretrained(tmp_path / "end")
    reference = by_name("bert").build()
    peftfx.load(reference, tmp_path / "end", compile=False)
    want, got = by_parameter(reference), by_parameter(model)
    assert want.keys() == got.keys() and len(want) > 4
    for key, value in want.items():
        assert torch.allclose(value, got[key], atol=1e-6), key


def by_parameter(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in tensors(model).items() if "lora" in k or "classifier" in k}


def test_distillation_by_the_trainer(tmp_path: Path) -> None:
    """One step over two batches is the step over both at once, each of its terms the mean."""
    data = CausalData()
    steps: dict[str, Any] = {
        "optim": "sgd", "gradient_accumulation_steps": 2, "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    ours, theirs = by_name("llama").build(), by_name("llama").build()
    for model in (ours, theirs):
        peftfx.backend({"rules": [{**SPEC["rules"][0], "dropout": 0.0}]}).bind(model)
        fill(peftfx.parameters(model))
        model.eval()
    start = tensors(ours)
    kept = peftfx.Distillation(ours, hidden="*.layers.?", hidden_weight=3.0)
    made = trainer(ours, tmp_path, **steps)
    made.distillation, made.train_dataset, made.args.max_steps = kept, data, 1
    made.args.per_device_train_batch_size = 2
    made.train()
    inputs = {"input_ids": data.ids, "labels": data.ids}
    with peftfx.Distillation(theirs, hidden="*.layers.?", hidden_weight=3.0)(inputs) as target:
        outputs = theirs(**inputs)
    (outputs.loss + target.loss(outputs)).backward()
    torch.optim.SGD(peftfx.parameters(theirs), lr=1e-2).step()
    for key, value in tensors(theirs).items():
        moved = value - start[key]
        assert moved.abs().max() > 0 and torch.allclose(tensors(ours)[key] - start[key], moved,
                                                        rtol=1e-3, atol=1e-7), key  # fmt: skip


class CausalData(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Four texts of one length."""

    ids = torch.randint(3, 61, (4, 8), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def test_best_model_comes_back(tmp_path: Path) -> None:
    model = adapted()
    made = trainer(
        model, tmp_path, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True,
        save_total_limit=2,
    )  # fmt: skip
    made.train()
    best = made.state.best_model_checkpoint
    assert best is not None
    fresh = by_name("bert").build()
    peftfx.load(fresh, best, compile=False)
    assert equal(tensors(fresh), tensors(model))


def test_trainer_wants_an_adapted_model(tmp_path: Path) -> None:
    with pytest.raises(peftfx.PeftfxError, match="not adapted"):
        trainer(by_name("bert").build(), tmp_path)
