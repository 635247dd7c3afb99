"""The backend: ``torch.compile(model, backend=peftfx.backend(spec))``.

It is called with each graph that Dynamo traced. It replaces the marks in it by their methods'
nodes, checks that none of the model's is missing, and hands the graph to the inner compiler. On a
model that is not bound yet it binds it first and asks Dynamo to trace again.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import fx, nn

from peftfx import dynamo, engine, sequence
from peftfx.bind import bind, prove
from peftfx.binding import Binding, binding_of, unwrap
from peftfx.check import check
from peftfx.errors import BindError, PeftfxError, SpecError, nearest
from peftfx.install import own_all
from peftfx.log import logger
from peftfx.passes import JOINT, PARTS, PIPELINE
from peftfx.registry import owner_of
from peftfx.spec import Spec
from peftfx.unmade import refusing
from peftfx.verify import frozen, marks, provenance

Lower = Literal["auto", "inductor", "aot_eager", "eager"] | Callable[..., Any]
Loss = Literal["chunked"] | None
LOWERS = ("auto", "inductor", "aot_eager", "eager")
Example = Mapping[str, Any] | Sequence[Any] | None


class Backend:
    """A compiler backend for one spec. Make it with :func:`backend`.

    ``reports`` has the engine's report of each graph that was compiled last.
    """

    def __init__(
        self,
        spec: Spec | Mapping[str, Any] | str | os.PathLike[str] | None,
        lower: Lower = "auto",
        loss: Loss = None,
    ) -> None:
        if not callable(lower) and lower not in LOWERS:
            raise SpecError(f"lower={lower!r} is not known", remedy=nearest(str(lower), LOWERS))
        if loss not in (None, "chunked"):
            raise SpecError(f"loss={loss!r} is not known", remedy="'chunked', or None")
        self.spec = None if spec is None else Spec.of(spec)
        self.lower, self.loss = lower, loss
        self.reports: list[engine.Report] = []
        self.snapshots = False
        self._roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.__name__ = "peftfx"
        dynamo.guard_hooks()

    def __repr__(self) -> str:
        return f"peftfx.backend({self.spec!r}, lower={self.lower!r}, loss={self.loss!r})"

    def __reduce__(self) -> tuple[Any, ...]:  # a compiled model is saved along with its backend
        return Backend, (self.spec, self.lower, self.loss)

    def bind(
        self, model: nn.Module, example: Example = None, adapter: str = "default"
    ) -> nn.Module:
        """Binds *model* now, so that an optimizer can be made first. Idempotent; gives *model*."""
        if self.spec is None:
            raise BindError("this backend has no spec to bind with")
        bind(model, self.spec, example, adapter)
        self._roots.add(unwrap(model))
        return model

    def __call__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """What Dynamo calls. Gives the compiled graph."""
        try:
            dynamo.keep_guarding_hooks()
            model, binding = self._bound(gm, inputs)
            check(model, binding)
            return self._compile(gm, inputs, model, binding, mode, dict(options or {}))
        except PeftfxError as error:
            raise dynamo.surface(error) from error.__cause__

    def _bound(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[nn.Module, Binding]:
        """The bound model that the graph belongs to; binds it where it is not yet."""
        owners = _owners(inputs)
        model = owners[0] if owners and any(True for _ in marks(gm)) else None
        root = dynamo.root()
        if model is None and root is not None:
            model = root.module
            for known in (
                *self._roots,
                *owners,
            ):  # a block compiled by itself, of a model bound as a whole
                if any(m is model for m in known.modules()):
                    model = known
        if model is None:
            raise BindError(
                "a function is compiled, and none of the models in it is bound",
                remedy="call backend.bind(model) for the model that it runs, or compile the model",
            )
        binding = binding_of(model)
        if binding is None:
            if root is None or self.spec is None:
                raise BindError(
                    "the model is not bound", remedy="call backend.bind(model) before it is run"
                )
            bind(model, self.spec, _example(root))
            self._roots.add(model)
            logger.info("bound %s at its first call", type(model).__name__)
            if sequence.lengthens(model):
                raise BindError(
                    "the spec makes the model's inputs longer before its forward begins, and this "
                    "call of it has begun",
                    remedy="the model is bound now: call it again; or bind before the first call, "
                    "backend.bind(model)",
                )
            dynamo.retrace()
        if not binding.owned:
            own_all(model, binding)
        if self.spec is not None and all(a.spec != self.spec for a in binding.adapters.values()):
            raise BindError(
                "the model is bound with another spec than this backend's",
                remedy="compile it with the backend that bound it, or peftfx.release(model) first",
            )
        if not binding.proven:
            if root is None or root.module is not model:
                raise BindError(
                    "nothing has proven yet that each mark fires, and this graph is not the whole "
                    "model's",
                    remedy="pass an example: backend.bind(model, example=inputs)",
                )
            if prove(model, binding, _example(root)):
                dynamo.retrace()
        return model, binding

    def _compile(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        model: nn.Module,
        binding: Binding,
        mode: str | None,
        options: dict[str, Any],
    ) -> Callable[..., Any]:
        skip = engine.skipped_by_user((*PIPELINE, *JOINT, *PARTS))
        context = engine.Context(
            skip=skip,
            provenance=provenance(gm, inputs, binding),
            frozen=frozen(gm, inputs),
            snapshots=self.snapshots,
            autocast=dynamo.under_autocast(gm, inputs),
            chunked=self.loss == "chunked",
        )
        report = engine.run(gm, PIPELINE, context)
        self.reports = [*self.reports[-63:], report]
        logger.debug("%s", report)
        left_out = engine.unmade(gm)
        return refusing(self._lowered(gm, inputs, report, mode, options), left_out)

    def _lowered(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        report: engine.Report,
        mode: str | None,
        options: dict[str, Any],
    ) -> Callable[..., Any]:
        """*gm* by the inner compiler."""
        if callable(self.lower):
            extra: dict[str, Any] = {"mode": mode} if mode else {}
            if options:
                extra["options"] = options
            compiled: Callable[..., Any] = self.lower(gm, list(inputs), **extra)
            return compiled
        if self.lower == "eager":
            return dynamo.run_eagerly(gm)
        from peftfx.passes.claims import CLAIMS, INDUCTOR_CLAIMS
        from peftfx.passes.lower import LowerPass

        skip = engine.skipped_by_user((*PIPELINE, *JOINT, *PARTS))
        joint = engine.GraphPasses(tuple(p for p in JOINT if p.name not in skip), report)
        parts = engine.GraphPasses(tuple(p for p in PARTS if p.name not in skip), report)
        if self.lower == "aot_eager":
            return dynamo.compile_aot(gm, inputs, LowerPass(CLAIMS, report.choices, parts), joint)
        lower = LowerPass(INDUCTOR_CLAIMS, report.choices, parts, inductor=True)
        if self.snapshots:  # a cached graph has no choices to tell of
            options = {"force_disable_caches": True, **options}
        return dynamo.compile_inductor(gm, inputs, lower, mode, options, joint)


def _owners(inputs: Sequence[Any]) -> list[nn.Module]:
    """The bound models whose tensors a graph takes as inputs."""
    tensors = (value for value in inputs if isinstance(value, torch.Tensor))
    models = (o.model() for value in tensors if (o := owner_of(value)) is not None)
    return [m for m in models if m is not None and binding_of(m) is not None]


def _example(root: dynamo.Root) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return root.args, root.kwargs


def backend(
    spec: Spec | Mapping[str, Any] | str | os.PathLike[str],
    lower: Lower = "auto",
    loss: Loss = None,
) -> Backend:
    """A backend for ``torch.compile`` that adapts the model by *spec*.

    Args:
        spec: a :class:`~peftfx.spec.Spec`, the path of a spec file, or a mapping.
        lower: the inner compiler: ``auto`` and ``inductor`` (Inductor), ``aot_eager``, ``eager``,
            or a backend of torch's own protocol, called with the rewritten graph.
        loss: ``chunked``: while gradients are on, a frozen head's cross entropy is taken in chunks
            of rows, and the logits beside it are not made: the output in their place has a shape
            and refuses whatever asks for numbers. Under ``torch.no_grad()`` logits are as ever. A
            compile raises :class:`~peftfx.errors.LossError` where the head trains or is adapted.
            Where nothing else reads the logits, this is done without being asked for.
    """
    return Backend(spec, lower, loss)


def adapt(
    model: nn.Module,
    spec: Spec | Mapping[str, Any] | str | os.PathLike[str],
    example: Example = None,
    adapter: str = "default",
    lower: Lower = "auto",
    loss: Loss = None,
    **compile_options: Any,
) -> nn.Module:
    """Binds *model* and compiles it in place; gives the same object.

    Args:
        loss: see :func:`backend`.
        compile_options: for ``torch.compile``: ``fullgraph``, ``dynamic``, ``mode``, ``options``.
    """
    made = Backend(spec, lower, loss)
    made.bind(model, example, adapter)
    compile_in_place(model, made, **compile_options)
    return model


def compile_in_place(model: nn.Module, made: Backend, **options: Any) -> None:
    """``model.compile`` with *made*; recompiles of other models do not count against this one."""
    made._roots.add(unwrap(model))
    defaults = dynamo.compile_options(isolate_recompiles=True, recompile_limit=64)
    for module in (model, *sequence.entrances(unwrap(model))):
        module.compile(backend=made, **{**defaults, **options})


dynamo.guard_hooks()  # torch.compile imports this module when it looks the entry point up
_made: dict[int, tuple[Any, Backend]] = {}


def entry_point(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="peftfx", options={"spec": …, "lower": …, "loss": …})``.

    What else is in *options* goes to the inner compiler.
    """
    rest = dict(options or {})
    spec, lower, loss = rest.pop("spec", None), rest.pop("lower", "auto"), rest.pop("loss", None)
    if spec is None:
        given = f", and its options are {', '.join(map(repr, rest))}" if rest else ""
        raise dynamo.surface(
            SpecError(
                f"backend='peftfx' needs a spec{given}", remedy="options={'spec': 'lora.yaml'}"
            )
        )
    known = _made.get(id(options))
    if known is None or known[0] is not options:  # torch.compile hands over the same object
        known = _made[id(options)] = (options, Backend(spec, lower, loss))
    return known[1](gm, inputs, mode=mode, options=rest)
