"""Reading and writing safetensors, strictly.

The format is checked here before any of it is trusted: no duplicate names, no holes or overlaps,
bounded counts and sizes, finite numbers. Pickles are refused whatever they are called.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftfx.errors import CheckpointError
from peftfx.files import open_regular
from peftfx.strict_json import parse

MAX_HEADER = 16 * 2**20
MAX_TENSORS = 50_000
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
Header = dict[str, tuple[torch.dtype, tuple[int, ...]]]
KNOWN = frozenset(DTYPES.values())
_PICKLES = (b"\x80", b"PK\x03\x04", b"\x1f\x8b")


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of *tensors*, names sorted."""
    from safetensors.torch import save

    plain = {n: tensors[n].detach().to("cpu").contiguous().clone() for n in sorted(tensors)}
    return save(plain, metadata={"format": "pt"})


def read_header(path: str | os.PathLike[str]) -> Header:
    """Names, dtypes and shapes of the tensors in a file, checked against its size.

    Raises:
        CheckpointError: the file is no well-formed safetensors file.
    """
    file = Path(path)
    where = str(file)
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            if start == b"version ":
                raise CheckpointError(
                    "the file is git-lfs's pointer to the real one, which was not downloaded",
                    where=where,
                    remedy="fetch it with `git lfs pull`",
                )
            if start[:4].startswith(_PICKLES[:2]) and not _plausible(start, size):
                raise CheckpointError(
                    "the file is a pickle or an archive of one: it could run code",
                    where=where,
                    remedy="`peftfx convert` reads PEFT's adapter_model.bin without running code",
                )
            if len(start) < 8 or not _plausible(start, size):
                raise CheckpointError("no safetensors header, or one cut short", where=where)
            length = struct.unpack("<Q", start)[0]
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=where) from None
    header = _parse(raw, where)
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"more than {MAX_TENSORS} tensors", where=where)
    spans = []
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(name, entry, where)
        found[name] = (dtype, shape)
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise CheckpointError(f"{name!r} overlaps another tensor or leaves a hole", where=where)
        at = end
    if 8 + length + at != size:
        raise CheckpointError(
            f"the file has {size} bytes where its header says {8 + length + at}", where=where
        )
    return found


def _plausible(start: bytes, size: int) -> bool:
    if len(start) < 8:
        return False
    length = struct.unpack("<Q", start)[0]
    return bool(2 <= length <= min(MAX_HEADER, size - 8))


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        header = parse(raw, MAX_TENSORS * 13)  # what one takes, with two dimensions
    except ValueError as error:
        raise CheckpointError(f"the header is no JSON: {error}", where=where) from None
    if not isinstance(header, dict):
        raise CheckpointError("the header is no mapping", where=where)
    return header


def _entry(name: str, entry: Any, where: str) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{name!r}: {what}", where=where)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong("its entry is malformed")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise wrong(f"dtype {entry['dtype']!r} is not supported")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for values, most, lengths in ((shape, 2**48, range(9)), (offsets, 2**62, (2,))):
        if type(values) is not list or len(values) not in lengths:
            raise wrong("its shape or offsets are malformed")
        for v in values:
            if type(v) is not int or not 0 <= v <= most:
                raise wrong("its shape or offsets are malformed")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise wrong("its shape and its bytes do not agree")
    return dtype, tuple(shape), offsets[0], offsets[1]


def read(path: str | os.PathLike[str], *, finite: bool = True) -> dict[str, Tensor]:
    """The tensors of a file, checked: well-formed and *finite*.

    Raises:
        CheckpointError: as :func:`read_header`, or a NaN or an infinity.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = read_header(path)
    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path)) from None
    if set(tensors) != set(header):
        raise CheckpointError("the file changed while it was read", where=str(path))
    for name, tensor in tensors.items():
        if finite and not is_finite(tensor):
            raise CheckpointError(
                f"{name!r} holds NaN or infinity",
                where=str(path),
                remedy="the training that wrote it diverged; use an earlier checkpoint",
            )
    return tensors


def is_finite(tensor: Tensor) -> bool:
    """Whether *tensor* holds neither NaN nor infinity."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
