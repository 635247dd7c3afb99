"""AdapterFusion's start: one adapter that attends over several of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from peftfx.binding import bound, tensors_of
from peftfx.errors import AdapterError
from peftfx.methods.bottleneck import Bottleneck, joined
from peftfx.methods.fusion import Fusion
from peftfx.operations import insert
from peftfx.plans import Placement
from peftfx.spec import Rule

Part = tuple[Placement, Mapping[str, Tensor]]


def fuse(
    model: nn.Module, adapters: Sequence[str], adapter: str = "fusion", example: object = None
) -> nn.Module:
    """Adds an adapter that attends over *adapters*, inactive at first; gives *model*.

    Their tensors are copied and stay as they are. The adapters are of ``bottleneck`` rules alone,
    with one activation, at the same sites. Pfeiffer et al., 2021 (arXiv 2005.00247).

    Raises:
        AdapterError: fewer than two adapters, or such as cannot be fused.
    """
    plain, binding = bound(model)
    if len(set(adapters)) < 2:
        raise AdapterError(f"{list(adapters)} is nothing to fuse", remedy="name two or more")
    parts: list[dict[str, Part]] = []
    for name in adapters:
        plan = binding.adapter(name).plan
        held = tensors_of(plain, binding, name)
        parts.append({p.site.name: (p, t) for p, t in zip(plan, held, strict=True)})
        _hold(name, parts)
    first = binding.adapter(adapters[0]).spec
    rules = tuple(_rule(rule, number, parts) for number, rule in enumerate(first.rules))
    made = insert(plain, replace(first, rules=rules), adapter, example)
    assert made.stored is not None
    with torch.no_grad():
        for p, tensors in zip(made.plan, made.stored, strict=True):
            found = [at[p.site.name] for at in parts]
            for leaf, value in joined([(1.0, q.method, t) for q, t in found]).items():
                tensors[leaf].copy_(value)
    return model


def _hold(name: str, parts: list[dict[str, Part]]) -> None:
    """Refuses what cannot be fused with what came before it."""
    alike = {
        (m.activation, m.parallel)
        for at in parts
        for p, _ in at.values()
        if isinstance(m := p.method, Bottleneck)
    }
    for site, (p, _) in parts[-1].items():
        if not isinstance(p.method, Bottleneck) or p.method.gate or p.method.norm:
            raise AdapterError(
                f"adapter {name!r} has a rule of {p.method.name}: fused are bottlenecks without "
                "gates and norms",
                site=site,
            )
    if parts[-1].keys() != parts[0].keys() or len(alike) != 1:
        raise AdapterError(
            f"adapter {name!r} acts at other sites, or with another activation, than the first",
            remedy="fuse adapters of one spec, trained on several tasks",
        )


def _rule(rule: Rule, number: int, parts: list[dict[str, Part]]) -> Rule:
    """The first adapter's rule, fusing."""
    sites = [site for site, (p, _) in parts[0].items() if p.rule == number]
    sizes = {tuple(len(at[site][1]["down_bias"]) for at in parts) for site in sites}
    if len(sizes) != 1:
        raise AdapterError("an adapter is not of one width at all sites of a rule", site=sites[0])
    method = parts[0][sites[0]][0].method
    assert isinstance(method, Bottleneck)
    fused = Fusion(sizes=sizes.pop(), activation=method.activation, parallel=method.parallel)
    return replace(rule, method=fused, overrides=())
