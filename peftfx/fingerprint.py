"""Fingerprints of base weights, so that an adapter is not put on a model it was not trained for.

A few values at fixed places of each adapted weight. They are compared as values, so that a change
of dtype or a quantisation is told apart from other weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftfx.errors import FingerprintError
from peftfx.log import logger

SAMPLES = 16
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def fingerprint(weight: Tensor) -> dict[str, Any]:
    """Shape, dtype and :data:`SAMPLES` values of *weight*; no values on the meta device."""
    content: dict[str, Any] = {
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
    }
    if weight.device.type != "meta" and weight.numel() and weight.dtype in _ROUNDING:
        flat = weight.detach().reshape(-1)
        steps = torch.arange(SAMPLES, device=flat.device) * 2654435761 % flat.numel()
        content["values"] = [float(v) for v in flat[steps].to(torch.float64).cpu()]
    return content


def compare(stored: Mapping[str, Mapping[str, Any]], weights: Mapping[str, Tensor]) -> None:
    """Compares stored fingerprints with the *weights* of the model at hand, by name.

    Raises:
        FingerprintError: a weight has other values or another shape, or none was taken of it.
    """
    changed: dict[str, str] = {}
    for name, known in stored.items():
        _check(name, known)
        weight = weights.get(name)
        if weight is None:
            raise FingerprintError("the model has no such weight", site=name)
        now = fingerprint(weight)
        if known["dtype"] != now["dtype"]:
            changed[name] = f"{known['dtype']} -> {now['dtype']}"
        packed = "values" not in now
        if not packed and known["shape"] != now["shape"]:
            raise FingerprintError(
                f"the weight is {now['shape']}, the adapter was trained on {known['shape']}",
                site=name,
                remedy="load it on the base model that it was trained on",
            )
        before = known.get("values")
        if packed or before is None:
            continue
        bound = max(_tolerance(known["dtype"]), _tolerance(now["dtype"]))
        largest = max(max(abs(v) for v in before), 1e-30)
        worst = max(abs(a - b) for a, b in zip(before, now["values"], strict=True))
        if worst > bound * largest:
            raise FingerprintError(
                "the weight's values are not those that the adapter was trained on",
                site=name,
                remedy="load it on the base model that it was trained on",
            )
    if changed:
        name, change = next(iter(changed.items()))
        logger.warning(
            "%d base weights have another dtype than the adapter was trained on (%s: %s)",
            len(changed), name, change,
        )  # fmt: skip


def _check(name: str, known: Mapping[str, Any]) -> None:
    """Raises :class:`FingerprintError` where *known*, from a file, is none that was ever taken."""
    shape, dtype, values = known.get("shape"), known.get("dtype"), known.get("values")
    well_formed = (
        isinstance(shape, list)
        and all(type(n) is int for n in shape)
        and isinstance(dtype, str)
        and isinstance(getattr(torch, dtype, None), torch.dtype)
    )
    if values is not None:
        well_formed &= isinstance(values, list) and len(values) == SAMPLES
        well_formed = well_formed and all(type(v) is float and math.isfinite(v) for v in values)
    if not well_formed:
        raise FingerprintError(
            "the fingerprint of the base weight is missing or malformed", site=name
        )


def _tolerance(dtype: str) -> float:
    return _ROUNDING.get(getattr(torch, dtype), 1e-6)
