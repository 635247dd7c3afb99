"""peftfx: the compiler for parameter-efficient fine-tuning.

``torch.compile(model, backend=peftfx.backend(spec))`` traces a model's graph, rewrites it by a
declarative spec (LoRA, selective training, …) and lowers it. Names are resolved when first used, so
that ``import peftfx`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Backend": "backends",
    "Distillation": "distillation",
    "PeftfxError": "errors",
    "Plan": "plans",
    "Spec": "spec",
    "Schedule": "schedule",
    "activate": "operations",
    "adapt": "backends",
    "adapters": "operations",
    "add": "operations",
    "backend": "backends",
    "calibrate": "calibration",
    "disabled": "operations",
    "explain": "explaining",
    "fuse": "fusing",
    "is_adapted": "operations",
    "linear_cross_entropy": "losses",
    "linear_kl": "losses",
    "load": "loading",
    "load_state_dict": "checkpoint",
    "merge": "merging",
    "named_parameters": "operations",
    "parameter_groups": "operations",
    "parameters": "operations",
    "penalty": "regularization",
    "picture": "explaining",
    "plan": "explaining",
    "release": "bind",
    "remove": "operations",
    "rewrite": "rewriting",
    "save": "checkpoint",
    "state_dict": "checkpoint",
    "unmerge": "merging",
}

__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from peftfx.backends import Backend as Backend
    from peftfx.backends import adapt as adapt
    from peftfx.backends import backend as backend
    from peftfx.bind import release as release
    from peftfx.calibration import calibrate as calibrate
    from peftfx.checkpoint import load_state_dict as load_state_dict
    from peftfx.checkpoint import save as save
    from peftfx.checkpoint import state_dict as state_dict
    from peftfx.distillation import Distillation as Distillation
    from peftfx.errors import PeftfxError as PeftfxError
    from peftfx.explaining import explain as explain
    from peftfx.explaining import picture as picture
    from peftfx.explaining import plan as plan
    from peftfx.fusing import fuse as fuse
    from peftfx.loading import load as load
    from peftfx.losses import linear_cross_entropy as linear_cross_entropy
    from peftfx.losses import linear_kl as linear_kl
    from peftfx.merging import merge as merge
    from peftfx.merging import unmerge as unmerge
    from peftfx.operations import activate as activate
    from peftfx.operations import adapters as adapters
    from peftfx.operations import add as add
    from peftfx.operations import disabled as disabled
    from peftfx.operations import is_adapted as is_adapted
    from peftfx.operations import named_parameters as named_parameters
    from peftfx.operations import parameter_groups as parameter_groups
    from peftfx.operations import parameters as parameters
    from peftfx.operations import remove as remove
    from peftfx.plans import Plan as Plan
    from peftfx.regularization import penalty as penalty
    from peftfx.rewriting import rewrite as rewrite
    from peftfx.schedule import Schedule as Schedule
    from peftfx.spec import Spec as Spec


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'peftfx' has no attribute {name!r}")
    return getattr(importlib.import_module(f"peftfx.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
