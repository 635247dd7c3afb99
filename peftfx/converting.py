"""Adapter files in another form: safetensors of a pickle, peftfx's own of PEFT's, and back."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftfx import files, own_format, peft_format
from peftfx import tensors as tensor_files
from peftfx.checkpoint import contents
from peftfx.errors import CheckpointError
from peftfx.reading import read_json, stored

PICKLE = "adapter_model.bin"  # as PEFT wrote it before safetensors


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    format: Literal["peft", "peftfx"] | None = None,
    model: nn.Module | None = None,
) -> None:
    """Writes the adapter in *source* to *destination*.

    A pickle, PEFT's old ``adapter_model.bin``, is read by torch's restricted unpickler, which makes
    tensors and runs nothing; here alone, and never where an adapter is loaded.

    Args:
        format: None keeps what it is.
        model: what says which tensor belongs where, needed for another format. It has the base's
            shapes; its values are not looked at.

    Raises:
        CheckpointError: files that are malformed, or that the format cannot represent.
        SaveError: *destination* cannot be written.
    """
    path = Path(source)
    if path.resolve() == Path(destination).resolve():
        raise CheckpointError("source and destination are one", where=str(path))
    if not path.is_dir():
        raise CheckpointError("there is no such directory", where=str(path))
    if (path / PICKLE).exists() and not (path / peft_format.WEIGHTS).exists():
        with tempfile.TemporaryDirectory() as safe:
            unpickle(path, Path(safe))
            convert(safe, destination, format, model)
        return
    is_peft = (path / peft_format.CONFIG).exists()
    wanted = format or ("peft" if is_peft else "peftfx")
    if is_peft == (wanted == "peft"):
        files.write_directory(destination, _checked(path, is_peft), _others(is_peft))
        return
    if model is None:
        raise CheckpointError(
            "it takes the model to say which tensor belongs where",
            where=str(path),
            remedy="--model DIR; a config.json is enough",
        )
    content, stale = contents(model, stored(model, path, on_base=False), wanted, str(path))
    files.write_directory(destination, content, stale)


def _others(is_peft: bool) -> tuple[str, ...]:
    """Files of the other format."""
    return (own_format.WEIGHTS,) if is_peft else (peft_format.CONFIG, peft_format.WEIGHTS)


def _checked(path: Path, is_peft: bool) -> dict[str, bytes]:
    """The files of a directory that stay as they are."""
    configs = [own_format.CONFIG, *([peft_format.CONFIG] if is_peft else [])]
    weights = peft_format.WEIGHTS if is_peft else own_format.WEIGHTS
    for name in configs:
        if (path / name).exists() or not is_peft:
            read_json(path / name)
    tensor_files.read(path / weights)
    return {n: (path / n).read_bytes() for n in (*configs, weights) if (path / n).exists()}


def unpickle(source: Path, destination: Path) -> None:
    """Writes what *source* holds as a pickle to *destination* as safetensors."""
    where = str(source / PICKLE)
    try:
        with warnings.catch_warnings(action="ignore"):
            found: Any = torch.load(where, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds; what is no pickle of tensors is not converted
        said = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"it is no pickle of plain tensors: {said}", where=where) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"it holds a {type(found).__name__}, not tensors", where=where)
    for name, value in found.items():
        plain = isinstance(value, Tensor) and value.layout == torch.strided
        if not isinstance(name, str) or not plain or value.dtype not in tensor_files.KNOWN:
            raise CheckpointError(f"{name!r} is no plain tensor", where=where)
    values = {name: value.detach() for name, value in found.items()}
    content = {peft_format.WEIGHTS: tensor_files.to_bytes(values)}
    for name in (peft_format.CONFIG, own_format.CONFIG):
        if (source / name).exists():
            content[name] = (source / name).read_bytes()
    files.write_directory(destination, content)
