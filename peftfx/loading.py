"""Loading a saved adapter into a model, whatever state the model is in."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from peftfx.backends import Backend, compile_in_place
from peftfx.bind import bind
from peftfx.binding import binding_of, check_name, unwrap
from peftfx.errors import AdapterError
from peftfx.install import fill
from peftfx.operations import insert
from peftfx.reading import read


@torch.inference_mode(False)  # tensors that are made inside of it could never train
def load(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter: str = "default",
    trainable: bool = False,
    compile: bool = True,
    example: Any = None,
) -> nn.Module:
    """Loads an adapter from a directory that peftfx or HF PEFT wrote; gives *model*.

    A model that is not adapted yet is bound, and compiled in place unless *compile* is False. On
    an adapted one the adapter is added under its name, or its values are put into the adapter
    of that name if it has the same spec.

    Raises:
        CheckpointError: files that are incomplete, malformed, unsafe, or do not fit the model.
        FingerprintError: the adapter was trained on other base weights.
        Model and files are untouched then.
    """
    check_name(adapter)
    plain = unwrap(model)
    binding = binding_of(plain)
    spec, values = read(plain, directory, example, adapter)
    if binding is None:
        bind(plain, spec, example, adapter, trainable=trainable, tensors=values)
        if compile and plain is model:
            compile_in_place(plain, Backend(spec))
    elif adapter not in binding.adapters:
        insert(plain, spec, adapter, example, trainable=trainable, tensors=values)
    elif binding.adapters[adapter].spec != spec:
        raise AdapterError(
            f"there is an adapter {adapter!r} with another spec",
            remedy="remove it, or load under another name",
        )
    else:
        fill(plain, binding, adapter, values)
    return model
