"""Distillation against its formulas, with a base that was never adapted as the reference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import peftfx
from peftfx.errors import BindError, DistillationError, RoleError
from tests.architectures import by_name
from tests.helpers import fill

BLOCKS = {"bert": "*.layer.?", "llama": "*.layers.?", "t5": "*.block.?", "vit": "*.layers.?"}
SPEC: dict[str, Any] = {
    "rules": [
        {"method": "lora", "role": ["attention.query", "mlp.down"], "rank": 3, "dropout": 0.0},
        {"method": "bitfit", "name": "*"},
    ]
}
LORA: dict[str, Any] = {"rules": SPEC["rules"][:1]}


def batch(name: str) -> dict[str, Tensor]:
    """Inputs with padding and labels, some of which do not count."""
    inputs = by_name(name).example()
    if name == "vit":
        return {**inputs, "labels": torch.tensor([1, 4])}
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, 6:] = 0
    labels = torch.tensor([0, -100]) if name == "bert" else inputs["input_ids"].clone()
    if name == "t5":
        labels = inputs["decoder_input_ids"].clone()
    if labels.ndim > 1:
        labels[0, :2] = -100
    return {**inputs, "attention_mask": mask, "labels": labels}


def pair(name: str, lower: str | None = "eager") -> tuple[nn.Module, nn.Module]:
    """A base, and a copy of it that is adapted, moved away from it, and compiled if *lower* says.

    All in one graph, or not at all.
    """
    base = by_name(name).build()
    model = copy.deepcopy(base)
    spec = SPEC if name in ("bert", "vit") else LORA
    if lower is None:
        peftfx.backend(spec).bind(model)
    else:
        peftfx.adapt(model, spec, lower=lower, fullgraph=True)  # type: ignore[arg-type]
    fill(peftfx.parameters(model))
    return base, model


def run(model: nn.Module, inputs: dict[str, Tensor], glob: str) -> tuple[Tensor, list[Tensor]]:
    """Logits and the outputs of the modules that end as *glob* does, by hooks of the test's own."""
    found: list[Tensor] = []
    last = glob.split(".")[-2]
    chosen = [m for n, m in model.named_modules() if n.split(".")[-2:-1] == [last]]
    hooks = [
        m.register_forward_hook(
            lambda _, __, out: found.append(out if isinstance(out, Tensor) else out[0])
        )
        for m in chosen
    ]
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    for hook in hooks:
        hook.remove()
    return logits, found


def expected(
    name: str, base: nn.Module, model: nn.Module, inputs: dict[str, Tensor], t: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Both terms, written as a reader of the papers would."""
    plain = copy.deepcopy(model)
    plain.__dict__["_compiled_call_impl"] = None
    plain.load_state_dict(model.state_dict())
    model = plain
    with torch.no_grad():
        teacher, taught = run(base, inputs, BLOCKS[name])
    student, learned = run(model, inputs, BLOCKS[name])
    mask, labels = inputs.get("attention_mask"), inputs["labels"]
    if name == "bert":
        rows = torch.tensor([True, False])
    elif name == "vit":
        rows = torch.tensor([True, True])
    elif name == "t5":
        rows = labels != -100
    else:
        assert mask is not None
        rows = (torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1) != -100) & (mask == 1)
    p, q = F.softmax(teacher[rows] / t, -1), F.log_softmax(student[rows] / t, -1)
    divergence = t * t * F.kl_div(q, p, reduction="batchmean")
    distances = []
    for h, g in zip(learned, taught, strict=True):
        seen = mask if mask is not None and mask.shape == h.shape[:2] else torch.ones(h.shape[:2])
        distances.append((h[seen == 1] - g[seen == 1]).square().mean())
    return divergence, torch.stack(distances).mean()


@pytest.mark.parametrize(
    ("name", "lower"),
    [("bert", "aot_eager"), ("llama", None), *(
        pytest.param(name, lower, marks=pytest.mark.sweep)
        for name in BLOCKS
        for lower in ("eager", "inductor")
    )],
)  # fmt: skip
def test_equals_the_formulas(name: str, lower: str | None) -> None:
    base, model = pair(name, lower)
    inputs = batch(name)
    distillation = peftfx.Distillation(
        model, temperature=3.0, weight=0.7, hidden=BLOCKS[name], hidden_weight=0.2, chunk=2
    )
    with distillation(inputs) as target:
        outputs = model(**inputs)
    loss = target.loss(outputs)
    loss.backward()
    trained = {id(p) for p in peftfx.parameters(model)}
    assert all((p.grad is not None) <= (id(p) in trained) for p in model.parameters())

    model.zero_grad()
    copied = copy.deepcopy(model)
    divergence, distance = expected(name, base, copied, inputs)
    assert divergence.item() > 1e-3 and distance.item() > 1e-4
    assert torch.allclose(loss, 0.7 * divergence + 0.2 * distance, rtol=1e-4)


def test_gradients_are_the_formulas() -> None:
    """Without a compiler, so that the test's own terms see the same model."""
    base, model = pair("llama", None)
    inputs = batch("llama")
    distillation = peftfx.Distillation(model, temperature=3.0, hidden=BLOCKS["llama"], chunk=4)
    with distillation(inputs) as target:
        outputs = model(**inputs)
    ours = torch.autograd.grad(target.loss(outputs), peftfx.parameters(model))
    distillation.remove()
    mask, rows = inputs["attention_mask"], inputs["labels"]
    counts = (F.pad(rows[:, 1:], (0, 1), value=-100) != -100) & (mask == 1)
    with torch.no_grad():
        teacher, taught = run(base, inputs, BLOCKS["llama"])
    student, learned = run(model, inputs, BLOCKS["llama"])
    p = F.softmax(teacher[counts] / 3, -1)
    loss = 9 * F.kl_div(F.log_softmax(student[counts] / 3, -1), p, reduction="batchmean")
    for h, g in zip(learned, taught, strict=True):
        loss = loss + (h - g)[mask == 1].square().mean() / len(taught)
    theirs = torch.autograd.grad(loss, peftfx.parameters(model))
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 1e-6 and torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_the_teacher_is_the_base_and_modes_are_given_back() -> None:
    base, model = pair("bert", None)
    model.train()
    model.get_submodule("bert.encoder.layer.1").eval()
    modes = [m.training for m in model.modules()]
    inputs = batch("bert")
    distillation = peftfx.Distillation(model, hidden=BLOCKS["bert"])
    with distillation(inputs) as target:
        assert [m.training for m in model.modules()] == modes
        outputs = model(**inputs)
    logits, hidden = run(base, inputs, BLOCKS["bert"])
    assert target.logits is not None and not target.logits.requires_grad
    assert torch.allclose(target.logits, logits, atol=1e-6)
    assert not torch.allclose(outputs.logits, logits, atol=1e-3)
    for (_, ours), want in zip(target.taught, hidden, strict=True):
        assert torch.allclose(ours, want, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_nothing_compiles_after_the_first_step(checkpointing: bool | None) -> None:
    """Checkpointing of both kinds too: use_reentrant is True, False, or there is none."""
    _, model = pair("bert", "eager" if checkpointing is None else "aot_eager")
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})  # type: ignore
    # what HF's forward would set at its first step
    model.config.problem_type, model.config.use_cache = "single_label_classification", False  # type: ignore
    model.train()
    inputs = batch("bert")
    distillation = peftfx.Distillation(model, hidden=BLOCKS["bert"])
    optimizer = torch.optim.SGD(peftfx.parameters(model), lr=0.05)
    losses, graphs = [], []
    before = counters["stats"]["unique_graphs"]
    counters["graph_break"].clear()  # other tests'
    for _ in range(5):
        with distillation(inputs) as target:
            outputs = model(**inputs)
        loss = target.loss(outputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        graphs.append(counters["stats"]["unique_graphs"] - before)
    assert losses[-1] < 0.9 * losses[0]
    assert graphs[0] == 2 and len(set(graphs)) == 1  # the base's, and the student's
    assert not counters["graph_break"]


def test_checkpoints_run_eagerly() -> None:
    """The reentrant kind cuts gradients off, where no compiler makes one graph of it."""
    _, model = pair("llama", None)
    model.train()
    inputs = batch("llama")
    distillation = peftfx.Distillation(model, hidden=[BLOCKS["llama"], "*.mlp"])
    grads = []
    for kind in (None, False, True):
        model.gradient_checkpointing_disable()  # type: ignore[operator]
        if kind is not None:
            model.gradient_checkpointing_enable({"use_reentrant": kind})  # type: ignore[operator]
        with distillation(inputs) as target:
            outputs = model(**inputs)
        if kind:
            with pytest.raises(DistillationError, match="reentrant"):
                target.loss(outputs)
            continue
        target.loss(outputs).backward()
        grads.append([p.grad for p in peftfx.parameters(model)])
        model.zero_grad()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))  # type: ignore[arg-type]


def test_another_model_as_teacher() -> None:
    """Twice as deep, with names and modes of its own."""
    import transformers

    _, model = pair("bert", None)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.hidden_dropout_prob = 4, 0.5  # type: ignore[union-attr]
    teacher = transformers.BertForSequenceClassification(config).train()  # type: ignore[arg-type]
    inputs = batch("bert")
    odd = ["*.layer.1", "*.layer.3"]
    distillation = peftfx.Distillation(
        model, teacher, temperature=1.0, hidden=BLOCKS["bert"], teacher_hidden=odd
    )
    with distillation(inputs) as target:
        outputs = model(**inputs)
    loss = target.loss(outputs)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(m.training for m in teacher.modules())
    logits, hidden = run(teacher.eval(), inputs, BLOCKS["bert"])
    assert target.logits is not None and torch.equal(target.logits, logits)
    assert [n for n, _ in target.taught] == ["bert.encoder.layer.1", "bert.encoder.layer.3"]
    for (_, ours), want in zip(target.taught, hidden[1::2], strict=True):
        assert torch.equal(ours, want)
    p = F.softmax(logits[:1], -1)
    want = F.kl_div(F.log_softmax(outputs.logits[:1], -1), p, reduction="batchmean")
    mask = inputs["attention_mask"] == 1
    for (_, h), g in zip(target.learned, hidden[1::2], strict=True):
        want = want + (h - g)[mask].square().mean() / 2
    assert torch.allclose(loss, want, rtol=1e-4)


def test_one_layer_that_runs_many_times() -> None:
    _, model = pair("albert")
    inputs = batch("bert")
    distillation = peftfx.Distillation(model, weight=0, hidden="*.albert_layers.0")
    with distillation(inputs) as target:
        outputs = model(**inputs)
    assert len(target.learned) == len(target.taught) == 2
    assert target.logits is None and target.loss(outputs).item() > 0


def test_evaluation_and_generation_are_not_watched() -> None:
    _, model = pair("bert", None)
    inputs = batch("bert")
    distillation = peftfx.Distillation(model, hidden=BLOCKS["bert"])
    with torch.no_grad():
        model(**inputs)
    assert distillation.of_student.seen == []
    distillation.remove()
    assert not any(
        getattr(f, "func", None) == distillation.of_student.see
        for m in model.modules()
        for f in m._forward_hooks.values()
    )


def test_selectors_of_specs() -> None:
    """The outputs of sublayers, by their roles: in a student and a teacher of other names too."""
    _, model = pair("bert", None)
    inputs = batch("bert")
    chosen = {"role": "residual.mlp", "layers": "last 1"}
    distillation = peftfx.Distillation(model, weight=0, hidden=chosen)
    with distillation(inputs) as target:
        outputs = model(**inputs)
    (site, learned), (_, taught) = target.learned[0], target.taught[0]
    assert site.startswith("bert.encoder.layer.1.") and len(target.learned) == 1
    mask = inputs["attention_mask"] == 1
    assert torch.allclose(target.loss(outputs), (learned - taught)[mask].square().mean())
    distillation.remove()
    llama = by_name("llama").build()
    others = peftfx.Distillation(model, llama, weight=0, hidden=chosen)
    assert [n for n in others.of_teacher.modules if n.startswith("model.layers.1")]
    with pytest.raises(DistillationError, match="unknown selector 'rol'"):
        peftfx.Distillation(model, hidden={"rol": "residual.mlp"})
    with pytest.raises(RoleError, match="is meant by"):
        peftfx.Distillation(model, hidden={"role": "residual.mlp", "layers": 7})


def refused(match: str, model: nn.Module, *args: Any, **options: Any) -> None:
    with pytest.raises(DistillationError, match=match):
        peftfx.Distillation(model, *args, **options)


def test_what_cannot_be() -> None:
    base, model = pair("bert", None)
    inputs = batch("bert")
    with pytest.raises(BindError, match="not adapted"):
        peftfx.Distillation(base)
    refused("names no module", model, hidden="*.layers.?")
    refused("below 0", model, temperature=0)
    refused("nothing is compared", model, weight=0)

    other = peftfx.Distillation(model, by_name("llama").build())
    with other(inputs) as target:
        outputs = model(**inputs)
    with pytest.raises(DistillationError, match="logits of the student's are"):
        target.loss(outputs)

    fewer = peftfx.Distillation(model, hidden=BLOCKS["bert"], teacher_hidden="*.layer.0")
    with fewer(inputs) as target:
        outputs = model(**inputs)
    with pytest.raises(DistillationError, match="2 outputs of the student's and 1"):
        target.loss(outputs)

    with pytest.raises(DistillationError, match="did not run"), fewer(inputs):
        pass
    first = peftfx.Distillation(model, hidden="*.embeddings.LayerNorm")
    with first(inputs) as target:
        outputs = model(**inputs)
    for p in peftfx.parameters(model):
        p.requires_grad_(p.ndim > 1)  # the biases below do not train any more
    with first(inputs) as target:
        outputs = model(**inputs)
    with pytest.raises(DistillationError, match="no gradient"):
        target.loss(outputs)


def test_an_adapter_that_came_later_is_not_overlooked() -> None:
    _, model = pair("bert", None)
    inputs = batch("bert")
    chosen = "bert.encoder.layer.1.attention.self.key"
    distillation = peftfx.Distillation(model, hidden=chosen)
    peftfx.add(model, {"rules": [{"method": "ia3", "name": chosen}]}, "b")
    with pytest.raises(DistillationError, match="added here after"), distillation(inputs):
        pass
    distillation.remove()
    again = peftfx.Distillation(model, hidden=chosen)
    with again(inputs) as target:
        model(**inputs)
    assert len(target.learned) == 1
