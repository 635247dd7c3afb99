"""Binding: a plan put into force on a model.

Bind makes the adapter's tensors parameters of the model, freezes the rest and sets the marks. Its
record, a :class:`Binding`, hangs on the model and goes with it through ``deepcopy`` and pickling.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from peftfx import mark
from peftfx.errors import AdapterError, BindError, NotAdaptedError, PeftfxError
from peftfx.log import logger
from peftfx.methods.method import Acts, Method, float_dtype
from peftfx.methods.train import VALUE
from peftfx.plans import Placement, Plan, resolve
from peftfx.registry import disown, own, owner_of
from peftfx.site import SLOT
from peftfx.spec import Spec

if TYPE_CHECKING:
    from peftfx.trace import Trace

ATTRIBUTE = "_peftfx"
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

SURGERY = "release the model before changing its modules, and bind it again afterwards"

Tensors = dict[str, Tensor]


@dataclass
class Adapter:
    """One named adapter of a bound model.

    ``stored`` has the tensors of each placement while they are not in the model's slots.
    """

    name: str
    spec: Spec
    plan: Plan
    trainable: bool = True
    stored: list[Tensors] | None = None


@dataclass
class Binding:
    """The record of a bound model. ``active`` maps adapter names to weights."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    acts: dict[str, Acts] = field(default_factory=dict)  # site name -> where its mark really sits
    base: dict[str, nn.Parameter] = field(default_factory=dict)  # kept aside, by qualified name
    flags: dict[str, bool] = field(default_factory=dict)  # requires_grad before
    installed: list[tuple[Placement, Method]] = field(default_factory=list)
    aside: dict[str, nn.Parameter] = field(default_factory=dict)  # trained values while disabled
    unmerged: dict[str, nn.Parameter] = field(default_factory=dict)  # originals while merged
    enabled: bool = True
    fixed: bool = False  # the graph has its adapter built in: nothing can be switched

    @property
    def merged(self) -> bool:
        """Whether the adapters are merged into the weights."""
        return bool(self.unmerged)
    proven: bool = False

    def adapter(self, name: str) -> Adapter:
        """The adapter of that name, or :class:`AdapterError`."""
        if name not in self.adapters:
            from peftfx.errors import nearest

            raise AdapterError(f"no adapter {name!r}", remedy=nearest(name, self.adapters))
        return self.adapters[name]


def unwrap(model: nn.Module) -> nn.Module:
    """The plain model inside what ``torch.compile``, DDP or accelerate put around it."""
    while True:
        inner = model._modules.get("_orig_mod") or (
            model._modules.get("module") if hasattr(model, "require_backward_grad_sync") else None
        )
        if inner is None:
            return model
        model = inner


def binding_of(model: nn.Module) -> Binding | None:
    """The binding of *model*, None where it is not bound."""
    return cast("Binding | None", unwrap(model).__dict__.get(ATTRIBUTE))


def bound(model: nn.Module) -> tuple[nn.Module, Binding]:
    """The plain model and its binding, or :class:`BindError`."""
    model = unwrap(model)
    binding = binding_of(model)
    if binding is None:
        raise BindError(
            f"this {type(model).__name__} is not adapted",
            remedy="call peftfx.adapt(model, spec) or backend.bind(model) first",
        )
    return model, binding


def check_name(name: str) -> None:
    """Adapter names become file and parameter names: anything else is refused."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise AdapterError(
            f"{name!r} cannot name an adapter",
            remedy="use 1 to 64 letters, digits, '_' and '-'",
        )


def make_plan(
    model: nn.Module, spec: Spec | Mapping[str, Any] | str, example: Any = None
) -> tuple[Plan, Trace | None]:
    """The plan of *spec*, and the trace of the model where roles or an example called for one."""
    from peftfx.roles import roles
    from peftfx.trace import trace

    spec = Spec.of(spec)
    needed = any(
        s.role for r in spec.rules for s in (r.selector, *(o.selector for o in r.overrides))
    )
    traced = trace(model, example) if needed or example is not None else None
    return resolve(model, spec, roles(traced) if needed and traced else None), traced


def bind(
    model: nn.Module,
    spec: Spec | Mapping[str, Any] | str,
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
    values = tensors if tensors is not None else create(model, plan, spec, trainable)
    _quiet_hf(model)
    for p in model.parameters():
        p.requires_grad_(False)
    model.__dict__[ATTRIBUTE] = binding
    binding.adapters[adapter] = Adapter(adapter, spec, plan, trainable, values)
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
    if not binding.proven:
        prove(module, binding, (args, kwargs))
    check(module, binding)


def check(model: nn.Module, binding: Binding) -> None:
    """Raises :class:`NotAdaptedError` where a planned mark is gone."""
    on = binding.enabled and not binding.merged
    for placement, _ in binding.installed:
        if placement.method.acts == "parameter":
            continue
        entry = entry_of(model, placement)
        owner = model.get_submodule(placement.site.module)
        if not mark.armed(owner, entry.acts):
            reason = "the hook that carried the adapter is gone"
        elif bool(entry.key) != on:
            reason = "the adapter was switched behind peftfx's back"
        else:
            continue
        raise NotAdaptedError(reason, site=placement.site.name, remedy=SURGERY)


def _try_trace(model: nn.Module) -> Trace | None:
    from peftfx.errors import TraceError
    from peftfx.trace import trace

    try:
        return trace(model)
    except TraceError as error:
        logger.info("marks are proven at the first compile: %s", error)
        return None


def forms(plan: Plan, traced: Trace) -> dict[str, Acts]:
    """Where the mark of each site has to sit, given who really reads its weight.

    A forward hook on the owner is right where only the owner's own call reads the weight. Where
    others read it, the mark goes to the read itself, if the method has that form.
    """
    acts: dict[str, Acts] = {}
    for p in plan:
        if p.method.acts == "parameter":
            continue
        site = p.site
        readers = set(traced.users.get(site.name, ()))
        tied = {alias.rpartition(".")[0] for alias in site.aliases} - {site.module}
        if site.module not in readers and readers & tied:
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
            acts[site.name] = "weight"
    return acts


def prove(model: nn.Module, binding: Binding, example: Any) -> bool:
    """Proves the marks of a bound model by one run on fake tensors. True if a mark was moved."""
    from peftfx.trace import trace

    binding.proven = True  # the run below passes the root's pre-hook
    try:
        traced = trace(model, example)
    except BaseException:
        binding.proven = False
        raise
    moved = False
    for adapter in binding.adapters.values():
        for name, acts in forms(adapter.plan, traced).items():
            moved |= binding.acts.get(name) != acts
            binding.acts[name] = acts
    if moved:
        for adapter in binding.adapters.values():
            place_all(model, binding, adapter.plan)
        set_keys(model, binding)
    return moved


# -- tensors -------------------------------------------------------------------------------------


def create(model: nn.Module, plan: Plan, spec: Spec, trainable: bool) -> list[Tensors]:
    """Fresh tensors for every placement, on the device of its site."""
    values = []
    for p in plan:
        like = parameter(model, p.site.name)
        made: Tensors = {}
        for name, param in p.method.params(p.site).items():
            if p.method.acts == "parameter":
                made[name] = nn.Parameter(like.detach().clone(), trainable)
                continue
            dtype = float_dtype(like.dtype, spec.dtype)
            value = torch.empty(param.shape, dtype=dtype, device=like.device)
            with torch.no_grad():
                param.init(value)
            made[name] = nn.Parameter(value, trainable)
        for name, buffer in p.method.buffers(p.site).items():
            made[name] = buffer.to(like.device)
        values.append(made)
    return values


def parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of that qualified name, past any mark."""
    path, _, leaf = name.rpartition(".")
    found = model.get_submodule(path)._parameters[leaf]
    if found is None:
        raise BindError("the parameter is gone", site=name)
    return found


def swap(model: nn.Module, binding: Binding, names: tuple[str, ...], new: nn.Parameter) -> None:
    """Puts *new* in the place of a parameter, under all the *names* given.

    The base's own parameter object is kept aside by its first name.
    """
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        current = owner._parameters[leaf]
        assert current is not None
        binding.base.setdefault(name, current)
        owner._parameters[leaf] = new


def restore(model: nn.Module, binding: Binding, names: tuple[str, ...]) -> nn.Parameter:
    """Puts the base's own parameter back; gives what was in its place."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        current, original = owner._parameters[leaf], binding.base.pop(name, None)
        assert current is not None
        if original is None:
            continue
        if original.device != current.device or original.dtype != current.dtype:
            original.data = original.data.to(current.device, current.dtype)
        owner._parameters[leaf] = original
    return current


# -- placing and installing ----------------------------------------------------------------------


def entry_of(model: nn.Module, placement: Placement) -> mark.Entry:
    """The slot entry of a placement."""
    try:
        slot = model.get_submodule(placement.site.module)._modules.get(SLOT)
    except AttributeError:
        slot = None
    entry = slot._modules.get(placement.method.name) if slot is not None else None
    if not isinstance(entry, mark.Entry):
        raise NotAdaptedError(
            "the module that carried the adapter here was replaced",
            site=placement.site.name,
            remedy=SURGERY,
        )
    return entry


def place_all(model: nn.Module, binding: Binding, plan: Plan) -> None:
    """Sets the marks of *plan*, switched off."""
    for p in plan:
        if p.method.acts != "parameter":
            owner = model.get_submodule(p.site.module)
            mark.place(owner, p.site, p.method, binding.acts.get(p.site.name))


def _key(binding: Binding, p: Placement, method: Method) -> str:
    strict = any(binding.adapters[a].spec.strict for a in binding.active)
    return method.key(p.site, binding.acts.get(p.site.name), strict)


def install(model: nn.Module, binding: Binding, weights: Mapping[str, float]) -> None:
    """Makes *weights* the active adapters: their tensors go into the slots and marks go on."""
    uninstall(model, binding)
    binding.active = dict(weights)
    single = len(weights) == 1 and next(iter(weights.values())) == 1.0
    if single:
        adapter = binding.adapters[next(iter(weights))]
        assert adapter.stored is not None
        found = [(p, p.method, t) for p, t in zip(adapter.plan, adapter.stored, strict=True)]
        adapter.stored = None
    else:
        found = list(_mixed(model, binding))
    for p, method, tensors in found:
        if not p.method.trains:
            continue
        if p.method.acts == "parameter":
            value = tensors[VALUE]
            new = value if isinstance(value, nn.Parameter) else nn.Parameter(value, False)
            current = parameter(model, p.site.name)
            if new.device != current.device:
                new.data = new.data.to(current.device)
            swap(model, binding, (p.site.name, *p.site.aliases), new)
        else:
            entry = entry_of(model, p)
            device = parameter(model, p.site.name).device
            for name, tensor in tensors.items():
                if tensor.device == device:
                    continue
                if isinstance(tensor, nn.Parameter):
                    tensor.data = tensor.data.to(device)
                else:
                    tensors[name] = tensor.to(device)
            entry.fill(method, tensors)
        binding.installed.append((p, method))
        for tensor in tensors.values():
            own(tensor, model, p.site.name)
    set_keys(model, binding)
    for frozen in model.parameters():
        if not frozen.requires_grad and owner_of(frozen) is None:
            own(frozen, model, None)


def refuse_fixed(binding: Binding) -> None:
    """Raises :class:`BindError` where the adapter is built into a rewritten graph."""
    if binding.fixed:
        raise BindError(
            "this graph has its adapter built in: it cannot be switched, mixed or merged",
            remedy="do so on the model, and rewrite it again",
        )


def set_keys(model: nn.Module, binding: Binding) -> None:
    """Switches the marks of the active adapters on or off, as the binding says."""
    on = binding.enabled and not binding.merged
    refuse_fixed(binding)
    for p, method in binding.installed:
        if p.method.acts != "parameter":
            entry_of(model, p).key = _key(binding, p, method) if on else ""


def uninstall(model: nn.Module, binding: Binding) -> None:
    """Takes the active adapters' tensors back out of the slots; their marks go off."""
    taken: dict[tuple[str, str], Tensors] = {}
    for p, _ in binding.installed:
        if p.method.acts == "parameter":
            value = restore(model, binding, (p.site.name, *p.site.aliases))
            taken[p.site.name, p.method.name] = {VALUE: value}
        else:
            entry = entry_of(model, p)
            taken[p.site.name, p.method.name] = entry.tensors()
            entry.empty()
    if len(binding.active) == 1:
        adapter = binding.adapters.get(next(iter(binding.active)))
        if adapter is not None and adapter.stored is None:
            adapter.stored = [taken.get((p.site.name, p.method.name), {}) for p in adapter.plan]
    binding.installed.clear()
    binding.active = {}


def _mixed(model: nn.Module, binding: Binding) -> Iterator[tuple[Placement, Method, Tensors]]:
    parts: dict[tuple[str, str], list[tuple[float, Placement, Tensors]]] = {}
    for name, weight in binding.active.items():
        adapter = binding.adapters[name]
        for p, tensors in zip(adapter.plan, tensors_of(model, binding, name), strict=True):
            if p.method.trains:
                at = (p.site.name, p.method.name)
                parts.setdefault(at, []).append((weight, p, tensors))
    for found in parts.values():
        p = found[0][1]
        extra = {}
        if p.method.acts == "parameter":
            extra = {"base": parameter(model, p.site.name)}
        given = [(w, q.method, {**t, **extra}) for w, q, t in found]
        with torch.no_grad():
            method, tensors = p.method.mix(given, p.site)
        yield p, method, {n: t.detach() for n, t in tensors.items()}


def tensors_of(model: nn.Module, binding: Binding, name: str) -> list[Tensors]:
    """The tensors of an adapter, one mapping for each placement of its plan."""
    adapter = binding.adapter(name)
    if adapter.stored is not None:
        return adapter.stored
    found: list[Tensors] = []
    for p in adapter.plan:
        if not p.method.trains:
            found.append({})
        elif p.method.acts == "parameter":
            aside = binding.aside.get(p.site.name)
            live = parameter(model, p.site.name) if aside is None else aside
            found.append({VALUE: live})
        else:
            found.append(entry_of(model, p).tensors())
    return found


# -- what travels with the model -----------------------------------------------------------------


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


def _require_input_grads(model: nn.Module) -> None:
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    model._require_grads_hook = embeddings.register_forward_hook(_require_grad)
    model._require_grads_hooks = [model._require_grads_hook]


def _require_grad(module: nn.Module, args: Any, out: Tensor) -> None:
    if not torch.compiler.is_compiling():
        out.requires_grad_(True)


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
    from peftfx.checkpoint import save

    if options.get("push_to_hub"):
        raise PeftfxError("peftfx pushes nothing", remedy="save, then upload the directory")
    if not options.get("is_main_process", True):
        return
    _, binding = bound(model)
    for name in binding.active:
        save(model, save_directory, adapter=name)


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
    for name, p in model.named_parameters():
        p.requires_grad_(binding.flags.get(name, p.requires_grad))
        disown(p)
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
