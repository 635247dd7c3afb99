"""Calibration: a short run of the base on data, from which methods choose where and how they start.

For starts by inputs (EVA) and masks by gradients (Fisher, SAM). One gradient of one weight is held
at a time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peftfx import dynamo
from peftfx.binding import bound, parameter, refuse_fixed, tensors_of
from peftfx.errors import BindError, TraceError
from peftfx.install import base_of
from peftfx.methods.method import Calibration
from peftfx.plans import Placement
from peftfx.trace import inputs_of

Loss = Callable[[Any, Any], Tensor]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    adapter: str | None = None,
) -> nn.Module:
    """Shows data to the methods of an adapter that start from data; gives *model*.

    The base runs, without adapters, uncompiled, in eval mode. Until then a rule that asks for data
    refuses to run.

    Args:
        batches: inputs, each a mapping, a tuple or a tensor, as ``example``. For a Fisher mask by
            the letter give one sample at a time.
        loss: a scalar from the model's output and the batch; without it, the output's ``loss``.
            Asked for only where gradients are needed.
        adapter: one adapter's name; without it, the active ones.

    Raises:
        BindError: no rule of the adapter asks for data.
    """
    plain, binding = bound(model)
    refuse_fixed(binding)
    chosen: list[tuple[Placement, Calibration, dict[str, Tensor]]] = []
    for name in [adapter] if adapter is not None else list(binding.active):
        held = tensors_of(plain, binding, name)
        for p, tensors in zip(binding.adapter(name).plan, held, strict=True):
            made = p.method.calibration(p.site) if p.method.trains else None
            if made is not None:
                chosen.append((p, made, tensors))
    if not chosen:
        raise BindError("no rule starts from data", remedy="`init: eva` and `mask: fisher` do")
    learns = any(c.sees == "gradient" for _, c, _ in chosen)
    modes = [(m, m.training) for m in plain.modules()]
    with base_of(plain, binding), dynamo.uncompiled(plain), torch.set_grad_enabled(learns):
        plain.eval()
        try:
            with _watched(plain, chosen) as reached:
                for batch in batches:
                    args, kwargs = inputs_of(plain, batch)
                    out = plain(*args, **kwargs)
                    if learns:
                        (loss or _own_loss)(out, batch).backward()
        finally:
            for m, training in modes:
                m.training = training
        with torch.no_grad():
            for p, calibration, tensors in chosen:
                if p.site.name not in reached:
                    raise BindError(
                        "the data never reached this site",
                        site=p.site.name,
                        remedy="calibrate on data that does, or exclude it with `except:`",
                    )
                calibration.fill(tensors)
    for name in [adapter] if adapter is not None else list(binding.active):
        binding.adapter(name).waits = ""
    return model


@contextlib.contextmanager
def _watched(
    model: nn.Module, chosen: list[tuple[Placement, Calibration, dict[str, Tensor]]]
) -> Iterator[set[str]]:
    """Inside the block, each calibration sees what it asks for; gives the sites that were seen."""
    reached: set[str] = set()

    def shown(p: Placement, calibration: Calibration, value: Tensor) -> None:
        reached.add(p.site.name)
        calibration.see(value)

    with contextlib.ExitStack() as stack:
        for p, calibration, _ in chosen:
            if calibration.sees == "input":
                owner = model.get_submodule(p.site.module)
                see = functools.partial(shown, p, calibration)
                hook = owner.register_forward_pre_hook(_input(see), with_kwargs=True)
                stack.callback(hook.remove)
            else:
                weight = parameter(model, p.site.name)
                stack.callback(weight.requires_grad_, weight.requires_grad)
                weight.requires_grad_(True)
                see = functools.partial(shown, p, calibration)
                taken = weight.register_post_accumulate_grad_hook(_gradient(see))
                stack.callback(taken.remove)
        yield reached


def _input(see: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(args[0] if args else next(iter(kwargs.values())))

    return hook


def _gradient(see: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        see(weight.grad)
        weight.grad = None

    return hook


def _own_loss(out: Any, batch: Any) -> Tensor:
    found = out.get("loss") if isinstance(out, dict) else getattr(out, "loss", None)
    if not isinstance(found, Tensor):
        raise TraceError(
            "the model gives no loss for this batch",
            remedy="put labels into it, or pass loss=function of output and batch",
        )
    return found
