"""What a saved adapter is, told from its files alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftfx import own_format, peft_format
from peftfx import tensors as tensor_files
from peftfx.errors import CheckpointError, PeftfxError
from peftfx.methods.method import lookup, names
from peftfx.reading import read_json
from peftfx.spec import Spec


def inspect(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What *directory* holds: plain values, sorted by what they tell of.

    Everything is read and checked but one: a NaN or an infinity is told in ``finite``, not raised.

    Raises:
        CheckpointError: files that are incomplete, malformed or unsafe.
    """
    path = Path(directory)
    if not path.is_dir():
        raise CheckpointError("there is no such directory", where=str(path))
    is_peft = (path / peft_format.CONFIG).exists()
    weights = path / (peft_format.WEIGHTS if is_peft else own_format.WEIGHTS)
    if not weights.exists():
        raise CheckpointError(
            f"{weights.name} is missing",
            where=str(path),
            remedy="`peftfx convert` makes it of PEFT's adapter_model.bin",
        )
    config = read_json(path / peft_format.CONFIG) if is_peft else {}
    own = read_json(path / own_format.CONFIG) if (path / own_format.CONFIG).exists() else {}
    found = tensor_files.read(weights, finite=False)
    sites: dict[str, dict[str, Any]] = {}
    for key, value in found.items():
        site, name = _placed(key, is_peft)
        told = {"key": key, "shape": list(value.shape), "dtype": _dtype(value.dtype)}
        sites.setdefault(site, {})[name] = told
    bad = sorted(key for key, value in found.items() if not tensor_files.is_finite(value))
    return {
        "format": "peft" if is_peft else "peftfx",
        "type": config.get("peft_type"),
        "base": config.get("base_model_name_or_path"),
        "rules": _rules(own, config),
        "options": {k: v for k, v in sorted(config.items()) if v not in (None, False, [], {}, "")},
        "tensors": len(found),
        "values": sum(value.numel() for value in found.values()),
        "bytes": sum(value.numel() * value.itemsize for value in found.values()),
        "dtypes": dict(Counter(_dtype(value.dtype) for value in found.values())),
        "finite": not bad,
        "not_finite": bad,
        "fingerprint": _fingerprint(own),
        "sites": sites,
    }


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _rules(own: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The rules of the adapter's spec; None where it takes the model to say them."""
    try:
        spec = Spec.parse(own["spec"]) if "spec" in own else Spec.from_peft(config)
    except PeftfxError:
        if "spec" in own:
            raise
        return None  # `options` has what the configuration says
    return list(spec.to_dict()["rules"])


def _fingerprint(own: Mapping[str, Any]) -> int | None:
    """Of how many base weights there is a fingerprint."""
    known = own.get("fingerprint")
    return len(known) if isinstance(known, Mapping) else None


def _placed(key: str, is_peft: bool) -> tuple[str, str]:
    """Site and tensor of a key: the longest ending that a method gives its tensors."""
    if not is_peft:
        site, _, name = key.rpartition(":")
        return site, name
    path = key.removeprefix(peft_format.PREFIX)
    for ending, name in _endings():
        if path.endswith(ending):
            return path.removesuffix(ending).replace(".base_layer", ""), name
    module, _, parameter = path.replace(".base_layer", "").rpartition(".")
    return module or path, parameter or path


def _endings() -> list[tuple[str, str]]:
    """How keys of PEFT's end, with our names of the tensors; longest first."""
    found: dict[str, str] = {}
    for method in names():
        form = lookup(method).peft
        for keys in (form.keys, form.of_tables, form.beside_keys) if form is not None else ():
            for name, key in keys.items():
                if key.startswith("{module}") and "{parameter}" not in key:
                    found[key.removeprefix("{module}")] = name
    return sorted(found.items(), key=lambda item: -len(item[0]))
