"""The methods, one file each, and the protocol that they follow."""

from peftfx.methods.method import (
    Call,
    Key,
    Method,
    Param,
    decode,
    float_dtype,
    lookup,
    names,
    register,
)

__all__ = [
    "Call",
    "Key",
    "Method",
    "Param",
    "decode",
    "float_dtype",
    "lookup",
    "names",
    "register",
]
