"""HF PEFT's directories of prompts, p-tunings and prefixes, as peft 0.21 reads and writes them.

They name no target modules, but a task; their tensor is one (:mod:`peftfx.methods.peft_prompt`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from peftfx.binding import Tensors
from peftfx.errors import CheckpointError, SpecError
from peftfx.methods.method import Method
from peftfx.methods.peft_prompt import WHOLE, PromptForm
from peftfx.peft_format import modules_to_save
from peftfx.plans import Placement
from peftfx.site import SLOT
from peftfx.spec import Spec

_TASKS = {  # how the names of HF's classes end
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM", "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}  # fmt: skip
_PREFIX = "base_model."


def meant(placements: Sequence[Placement]) -> bool:
    """Whether *placements* are written as one tensor for the whole model."""
    return any(isinstance(p.method.peft, PromptForm) for p in placements)


def _parts(placements: Sequence[Placement]) -> tuple[PromptForm, list[Placement], list[Placement]]:
    """The form, the placements of its method, and the others that train."""
    main = [p for p in placements if isinstance(p.method.peft, PromptForm)]
    others = [p for p in placements if p.method.trains and p not in main]
    return cast(PromptForm, main[0].method.peft), main, others


def _placed(placements: Sequence[Placement]) -> list[tuple[Any, Method]]:
    return [(p.site, p.method) for p in placements]


def config_from(model: nn.Module, placements: Sequence[Placement]) -> dict[str, Any]:
    """The PEFT configuration that says the same as *placements*.

    Raises:
        CheckpointError: PEFT has no way to say it.
    """
    form, main, others = _parts(placements)
    config: Any = getattr(model, "config", None)
    name = type(model).__name__
    task = next((t for end, t in _TASKS.items() if name.endswith(end)), None)
    if config is None or task is None:
        raise CheckpointError(f"PEFT knows no task of a {name}")
    if len({p.method.name for p in main}) > 1:
        raise CheckpointError("PEFT has one of prompt, p-tuning and prefix in an adapter")
    if len({cast(Any, p.method).length for p in main}) > 1:
        raise CheckpointError("PEFT has one length for all layers")
    for p in main:
        reason = form.refusal_of(p.method)
        if reason is not None:
            raise CheckpointError(reason, remedy="save with format='peft' to have it so")
    layers = getattr(config, "num_hidden_layers", None)
    whole = {
        "peft_type": form.type,
        "task_type": task,
        "auto_mapping": None,
        "base_model_name_or_path": getattr(config, "_name_or_path", None),
        "revision": None,
        "inference_mode": True,
        "num_virtual_tokens": cast(Any, main[0].method).length,
        "num_transformer_submodules": main[0].site.around["stacks"],
        "num_attention_heads": getattr(config, "num_attention_heads", None),
        "num_layers": layers,
        "modules_to_save": modules_to_save(model, others) or None,
        **form.config(_placed(main)),
    }
    if whole["num_layers"] != layers:
        raise CheckpointError(f"PEFT has a prefix at all {layers} layers, and here are {len(main)}")
    return whole


def spec_from_config(
    method: str, form: PromptForm, content: Mapping[str, Any], model: nn.Module | None
) -> Spec:
    """The spec that the configuration of a prompt, p-tuning or prefix amounts to."""
    content = {**form.defaults, **content}
    known = {*_KNOWN, *form.defaults, *form.ignored}
    for key, value in content.items():
        if key not in known and value not in (None, False, [], {}, 0, ""):
            raise SpecError(f"the {form.type} option {key}={value!r} is not supported")
    task = getattr(content.get("task_type"), "value", content.get("task_type"))
    copies = content.get("num_transformer_submodules") or 1 + (task == "SEQ_2_SEQ_LM")
    rule = form.spec({**content, "num_transformer_submodules": copies})
    rules = [{"method": method, **rule}]
    saved = sorted(set(content.get("modules_to_save") or ()))
    if model is not None:  # PEFT lists what heads are called anywhere
        names = [n for n, _ in model.named_modules() if SLOT not in n.split(".")]
        saved = [s for s in saved if any(n == s or n.endswith("." + s) for n in names)]
    if saved:
        rules.append({"method": "train", "name": [g for n in saved for g in (n, f"*.{n}")]})
    return Spec.parse({"rules": rules})


_KNOWN = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "num_virtual_tokens", "num_transformer_submodules", "num_attention_heads",
    "num_layers", "token_dim", "modules_to_save", "peft_version",
}  # fmt: skip


class Directory:
    """How the tensors of placements lie in the weight file."""

    def keys_of(self, placements: Sequence[Placement]) -> list[dict[str, str]]:
        """A key for each tensor; those of the method are not in the file, their whole is."""
        return [
            {n: f"{p.site.name}:{n}" for n in p.params}
            if isinstance(p.method.peft, PromptForm)
            else dict.fromkeys(p.params, _PREFIX + p.site.name)
            for p in placements
        ]

    def optional(self, placements: Sequence[Placement]) -> set[str]:
        """Keys that may be missing."""
        return set()

    def pack(self, placement: Placement, tensors: Tensors) -> Tensors:
        """A placement's tensors by name."""
        return {name: tensors[name] for name in placement.params}

    def unpack(self, placement: Placement, tensors: Tensors) -> Tensors:
        """The inverse of :meth:`pack`."""
        return tensors

    def file_keys(self, placements: Sequence[Placement]) -> set[str]:
        """The keys that the file has."""
        _, _, others = _parts(placements)
        return {WHOLE, *(_PREFIX + p.site.name for p in others)}

    def of_base(self, key: str) -> str | None:
        """Nothing of the base is in the file."""
        return None

    def join(self, placements: Sequence[Placement], values: Tensors) -> Tensors:
        """What the file holds, of tensors by key."""
        form, main, _ = _parts(placements)
        tensors = [{n: values[f"{p.site.name}:{n}"] for n in p.params} for p in main]
        kept = {k: v for k, v in values.items() if k.startswith(_PREFIX)}
        return {WHOLE: form.join(_placed(main), tensors), **kept}

    def part(self, placements: Sequence[Placement], values: Tensors) -> Tensors:
        """The inverse of :meth:`join`."""
        form, main, _ = _parts(placements)
        found: dict[str, Tensor] = {k: v for k, v in values.items() if k != WHOLE}
        for p, tensors in zip(main, form.part(_placed(main), values[WHOLE]), strict=True):
            found |= {f"{p.site.name}:{n}": t for n, t in tensors.items()}
        return found
