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

from peftfx import attention, mark, multihead, places, sequence, slots, states
from peftfx.binding import (
    ATTRIBUTE,
    Adapter,
    Binding,
    Place,
    Tensors,
    binding_of,
    bound,
    check_name,
    refuse_fixed,
    unwrap,
)
from peftfx.check import check
from peftfx.distributed import is_sharded, refuse_shards, refuse_unsummed
from peftfx.errors import BindError, TraceError
from peftfx.hooks import unhook
from peftfx.install import (
    create,
    exchange,
    install,
    marks_off,
    own_all,
    place_all,
    set_keys,
    statistics,
    uninstall,
    waiting,
)
from peftfx.log import logger
from peftfx.methods.method import Acts
from peftfx.plans import Plan, make_plan
from peftfx.registry import disown, owner_of
from peftfx.site import OUTPUT, SLOT
from peftfx.spec import Spec
from peftfx.trace import Trace, trace


@torch.inference_mode(False)  # tensors that are made inside of it could never train
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
    _refuse_taken(model)
    plan, traced = make_plan(model, spec, example)
    _announce(plan)
    if traced is None and hasattr(model, "dummy_inputs"):
        traced = _try_trace(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    binding = Binding(flags=flags, statistics=statistics(model))
    binding.acts = forms(plan, traced) if traced else {}
    binding.proven = traced is not None
    values = create(model, plan, spec) if tensors is None else tensors
    if trainable:
        refuse_unsummed(model, (t for made in values for t in made.values()))
    _quiet_hf(model)
    if "torch.distributed.tensor" in sys.modules:  # not imported: no model of this process has any
        mark.refuse_sharded_activations()
    for p in model.parameters():
        p.requires_grad_(False)
    model.__dict__[ATTRIBUTE] = binding
    waits = waiting(plan, values) if tensors is None else ""
    binding.adapters[adapter] = Adapter(adapter, spec, plan, trainable, values, waits)
    place_all(model, binding, plan)
    install(model, binding, {adapter: 1.0})
    states.hook(model)
    model.register_forward_pre_hook(_before_root, with_kwargs=True)
    return binding


def _announce(plan: Plan) -> None:
    """Says where a rule does not act though it matches: other sites that it does act at hide it."""
    for number in sorted({r.rule for r in plan.refusals}):
        missed = [r for r in plan.refusals if r.rule == number and not r.other_kind]
        if missed:
            logger.warning(
                "rule %d acts at %d sites, and not in %d other modules that it matches, such as "
                "%s: %s",
                number, sum(p.rule == number for p in plan), len({r.site.module for r in missed}),
                missed[0].site.name, missed[0].reason,
            )  # fmt: skip


def _refuse_taken(model: nn.Module) -> None:
    """Raises :class:`BindError` where parts of *model* have another owner, or ours has no room."""
    if is_sharded(model):
        raise BindError(
            "the model is sharded already, and what is added now is not: each process would train "
            "its own",
            remedy="bind first, then fully_shard(model)",
        )
    for path, module in model.named_modules():
        where = f"its submodule {path!r}" if path else "the model"
        if isinstance(module, mark.Slot):
            raise BindError(
                f"its submodule {path.rpartition('.')[0]!r} carries the marks of a model that is "
                "bound, of which it is a part too",
                remedy="release that model first, or give this one a copy of the module",
            )
        if ATTRIBUTE in module.__dict__:
            raise BindError(f"{where} is bound already", remedy="release it first")
        if SLOT in module._modules and isinstance(module._modules[SLOT], mark.Slot):
            continue  # it comes next
        if hasattr(module, SLOT):
            raise BindError(
                f"{where} has an attribute {SLOT!r} of its own, where adapters are kept",
                remedy="rename it",
            )
    for name, p in model.named_parameters():
        owner = owner_of(p)
        other = owner.model() if owner is not None else None
        if other is not None and other is not model:
            raise BindError(
                f"the parameter belongs to a {type(other).__name__} that is bound as well",
                site=name,
                remedy="release that model first, or give this one a copy of the parameter",
            )


def _before_root(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Root pre-hook: eager runs make the checks that the backend makes at every compile.

    The first inputs of a model that was bound without an example serve to prove its marks.
    """
    if torch.compiler.is_compiling():
        return
    binding = binding_of(module)
    if binding is None:
        return
    if not binding.owned:
        own_all(module, binding)
    check(module, binding)
    if not binding.proven and prove(module, binding, (args, kwargs)):
        check(module, binding)


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
            if site.rung is not None and traced.called[site.module] > 1:
                raise BindError(
                    f"{p.method.name} gathers what modules give, and this one runs several times",
                    site=site.name,
                )
            continue
        readers = set(traced.users.get(site.name, ()))
        if site.caller in readers:  # by itself; written out, it calls the module
            readers = readers - {site.caller} | {site.module}
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
    if is_sharded(model):
        raise BindError(
            "no run has proven yet that each mark fires, and a sharded model's does not show it",
            remedy="pass an example when you bind; on the meta device, one of meta tensors",
        )
    binding.proven = True  # the run below passes the root's pre-hook
    try:
        with marks_off(model, binding):  # they may read weights themselves
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
    refuse_shards(model, "release")
    for name, original in binding.unmerged.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = original
    binding.unmerged.clear()
    uninstall(model, binding)
    exchange(model, binding)
    for adapter in binding.adapters.values():
        for p in adapter.plan:
            if p.method.acts != "parameter":
                slots.clear(model.get_submodule(p.site.module))
    for tidied in (sequence, attention, places, multihead):
        tidied.tidy(model)
    for name, own in model.named_parameters():
        own.requires_grad_(binding.flags.get(name, own.requires_grad))
        disown(own)
    unhook(model, _before_root)
    states.unhook(model)
    model.__dict__.pop("enable_input_require_grads", None)
    del model.__dict__[ATTRIBUTE]
    return model


# -- HF's gradient checkpointing -------------------------------------------------------------------


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
