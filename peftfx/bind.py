"""Binding: a plan put into force on a model.

Bind makes the adapter's tensors parameters of the model, freezes the rest and sets the marks.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftfx import attention, mark, sequence
from peftfx.binding import (
    ATTRIBUTE,
    SURGERY,
    Adapter,
    Binding,
    Place,
    Tensors,
    binding_of,
    bound,
    check_name,
    entry_of,
    refuse_fixed,
    unwrap,
)
from peftfx.checkpoint import save
from peftfx.errors import AdapterError, BindError, NotAdaptedError, PeftfxError, TraceError
from peftfx.install import create, install, place_all, set_keys, uninstall, waiting
from peftfx.log import logger
from peftfx.methods.method import Acts
from peftfx.plans import Plan, make_plan
from peftfx.registry import disown
from peftfx.site import OUTPUT, SLOT
from peftfx.spec import Spec
from peftfx.trace import Trace, trace


def bind(
    model: nn.Module,
    spec: Spec | Mapping[str, Any] | str | os.PathLike[str],
    example: Any = None,
    adapter: str = "default",
    *,
    trainable: bool = True,
    tensors: list[Tensors] | None = None,
) -> Binding:
    """Puts *spec* into force on *model*, in place. The same spec again changes nothing.

    Args:
        example: inputs as a mapping or tuple, to find roles and prove the marks by.
        tensors: values for each placement of the plan, instead of fresh ones.

    Raises:
        BindError: the model is bound with another spec, or has no place for a mark.
        PlanError: the spec does not fit the model.
    """
    check_name(adapter)
    spec = Spec.of(spec)
    model = unwrap(model)
    binding = binding_of(model)
    if binding is not None:
        known = binding.adapters.get(adapter)
        if known is not None and known.spec == spec and tensors is None:
            return binding
        raise BindError(
            "the model is bound already"
            + (f", adapter {adapter!r} with another spec" if known else ""),
            remedy="peftfx.add(model, spec, adapter=…) adds one; peftfx.release(model) starts anew",
        )
    for path, module in model.named_modules():
        if ATTRIBUTE in module.__dict__:
            raise BindError(f"its submodule {path!r} is bound already", remedy="release it first")
    plan, traced = make_plan(model, spec, example)
    if traced is None and hasattr(model, "dummy_inputs"):
        traced = _try_trace(model)
    binding = Binding(flags={n: p.requires_grad for n, p in model.named_parameters()})
    binding.acts = forms(plan, traced) if traced else {}
    binding.proven = traced is not None
    values = create(model, plan, spec) if tensors is None else tensors
    _quiet_hf(model)
    if "torch.distributed.tensor" in sys.modules:  # not imported: no model of this process has any
        mark.refuse_sharded_activations()
    for p in model.parameters():
        p.requires_grad_(False)
    model.__dict__[ATTRIBUTE] = binding
    waits = tensors is None and waiting(plan)
    binding.adapters[adapter] = Adapter(adapter, spec, plan, trainable, values, waits)
    place_all(model, binding, plan)
    install(model, binding, {adapter: 1.0})
    _hook_states(model)
    model.register_forward_pre_hook(_before_root, with_kwargs=True)
    return binding


def _before_root(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Root pre-hook: eager runs make the checks that the backend makes at every compile.

    The first inputs of a model that was bound without an example serve to prove its marks.
    """
    if torch.compiler.is_compiling():
        return
    binding = binding_of(module)
    if binding is None:
        return
    check(module, binding)
    if not binding.proven and prove(module, binding, (args, kwargs)):
        check(module, binding)


def check(model: nn.Module, binding: Binding) -> None:
    """Raises :class:`NotAdaptedError` where a planned mark is gone."""
    if binding.fixed:
        return  # the graph itself is adapted
    on = binding.enabled and not binding.merged
    for name in binding.active if on else ():
        if binding.adapters[name].waits:
            raise NotAdaptedError(
                f"adapter {name!r} starts from data, and has seen none",
                remedy="call peftfx.calibrate(model, batches), or load its values",
            )
    for placement, _ in binding.installed:
        if placement.method.acts == "parameter":
            continue
        entry = entry_of(model, placement)
        owner = model.get_submodule(placement.site.module)
        if not mark.armed(owner, entry.acts):
            reason = "the hook that carried the adapter is gone"
        elif entry.acts == "tokens" and not sequence.fed(model, entry, placement.site.around):
            reason = "the forward that lengthened the sequence is gone"
        elif entry.acts == "attention" and not attention.scoped(model, placement.site.around):
            reason = "a hook on the attention or its positions is gone"
        elif bool(entry.key) != on:
            reason = "the adapter was switched behind peftfx's back"
        else:
            continue
        raise NotAdaptedError(reason, site=placement.site.name, remedy=SURGERY)


def _try_trace(model: nn.Module) -> Trace | None:
    try:
        return trace(model)
    except TraceError as error:
        logger.info("marks are proven at the first compile: %s", error)
        return None


def forms(plan: Plan, traced: Trace) -> dict[Place, Acts]:
    """Where the mark of each method at each site has to sit, given who really reads its weight.

    A forward hook on the owner is right where only the owner's own call reads the weight. Where
    others read it, the mark goes to the read itself, if the method has that form.
    """
    acts: dict[Place, Acts] = {}
    for p in plan:
        if p.method.acts == "parameter":
            continue
        site = p.site
        if site.kind == OUTPUT:
            if not traced.called[site.module]:
                raise BindError("this module is never called", site=site.name)
            continue
        readers = set(traced.users.get(site.name, ()))
        if p.method.acts in ("tokens", "attention"):
            continue  # found by their calls in this very trace
        tied = {alias.rpartition(".")[0] for alias in site.aliases} - {site.module}
        if site.module not in readers and readers & tied:
            alike = {q.site.module for q in plan if (q.rule, q.method) == (p.rule, p.method)}
            if p.shares and readers <= alike:
                continue  # it has the adapter of those that are called
            raise BindError(
                "this module is never called: its weight is tied, and read by others",
                site=site.name,
                remedy="name " + " or ".join(sorted(readers & tied)),
            )
        others = readers - tied - {site.module}
        if not readers:
            raise BindError(
                "its weight is never read when the model runs: an adapter here would do nothing",
                site=site.name,
                remedy="exclude it with `except:`, or bind with an example that reaches it",
            )
        if others or p.method.acts_at(site) == "weight":
            reason = p.method.weight_form(site)
            if reason is not None:
                raise BindError(
                    f"its weight is read by {', '.join(sorted(map(repr, readers)))}: {reason}",
                    site=site.name,
                    remedy="exclude it with `except:`, or choose options with a weight form",
                )
            acts[site.name, p.method.name] = "weight"
    return acts


def prove(model: nn.Module, binding: Binding, example: Any) -> bool:
    """Proves the marks of a bound model by one run on fake tensors. True if a mark was moved."""
    binding.proven = True  # the run below passes the root's pre-hook
    try:
        traced = trace(model, example)
    except BaseException:
        binding.proven = False
        raise
    moved = False
    for adapter in binding.adapters.values():
        for where, acts in forms(adapter.plan, traced).items():
            moved |= binding.acts.get(where) != acts
            binding.acts[where] = acts
    if moved:
        for adapter in binding.adapters.values():
            place_all(model, binding, adapter.plan)
        set_keys(model, binding)
    return moved


def release(model: nn.Module) -> nn.Module:
    """Takes marks and adapters off; the base is what it was, bit for bit. Gives the plain model.

    Raises:
        BindError: the model is not bound.
    """
    model, binding = bound(model)
    refuse_fixed(binding)
    for name, original in binding.unmerged.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = original
    binding.unmerged.clear()
    uninstall(model, binding)
    for adapter in binding.adapters.values():
        for p in adapter.plan:
            if p.method.acts != "parameter":
                mark.clear(model.get_submodule(p.site.module))
    sequence.tidy(model)
    attention.tidy(model)
    for name, own in model.named_parameters():
        own.requires_grad_(binding.flags.get(name, own.requires_grad))
        disown(own)
    for key in [k for k, f in model._forward_pre_hooks.items() if f is _before_root]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
    for key in [k for k, f in model._load_state_dict_pre_hooks.items() if _is(f, _keep_adapter)]:
        del model._load_state_dict_pre_hooks[key]
    for name in ("save_pretrained", "enable_input_require_grads"):
        model.__dict__.pop(name, None)
    del model.__dict__[ATTRIBUTE]
    return model


def _is(hook: Any, function: Any) -> bool:
    return getattr(hook, "hook", hook) is function


# -- what travels with the model -----------------------------------------------------------------


def _hook_states(model: nn.Module) -> None:
    """Base checkpoints load into the bound model; HF's save_pretrained saves the adapter."""
    model.register_load_state_dict_pre_hook(_keep_adapter)
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = functools.partial(_save_pretrained, model)


def _keep_adapter(
    module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any, **options: Any
) -> None:
    own_state = {k: v for k, v in module.state_dict().items() if SLOT in k.split(".")}
    missing = {prefix + k: v for k, v in own_state.items() if prefix + k not in state}
    if missing and len(missing) == len(own_state):
        logger.warning("the state dict has no adapter: the model keeps the one that it has")
        state.update(missing)


def _save_pretrained(model: nn.Module, save_directory: Any, **options: Any) -> None:
    """What ``model.save_pretrained`` does while the model is bound: it saves the adapter alone."""
    if options.get("push_to_hub"):
        raise PeftfxError("peftfx pushes nothing", remedy="save, then upload the directory")
    if not options.get("is_main_process", True):
        return
    _, binding = bound(model)
    if len(binding.active) != 1:
        raise AdapterError(
            f"{len(binding.active)} adapters are active: they cannot share a directory",
            remedy="peftfx.save(model, directory, adapter=…) for each",
        )
    save(model, save_directory, adapter=next(iter(binding.active)))


def _quiet_hf(model: nn.Module) -> None:
    """Makes HF's ``gradient_checkpointing_enable`` fit for graphs.

    It hooks ``requires_grad_`` onto the embeddings' output, which breaks graphs. Compiled marks
    need no such hook; eager reentrant checkpoints do, so the hook stays for them alone.
    """
    if not hasattr(model, "enable_input_require_grads"):
        return
    if getattr(model, "_require_grads_hook", None) is not None:
        model.disable_input_require_grads()  # type: ignore[operator]
        _require_input_grads(model)
    model.__dict__["enable_input_require_grads"] = functools.partial(_require_input_grads, model)


def _require_input_grads(model: Any) -> None:
    embeddings = model.get_input_embeddings()
    model._require_grads_hook = embeddings.register_forward_hook(_require_grad)
    model._require_grads_hooks = [model._require_grads_hook]


def _require_grad(module: nn.Module, args: Any, out: Tensor) -> None:
    if not torch.compiler.is_compiling():
        out.requires_grad_(True)
