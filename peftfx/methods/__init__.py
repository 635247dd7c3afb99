"""The methods, one file each, and the protocol that they follow."""

from peftfx.methods.key import Key, decode
from peftfx.methods.method import (
    Calibration,
    Call,
    Method,
    Param,
    float_dtype,
    lookup,
    names,
    option,
    register,
)
from peftfx.methods.peft import PeftForm

__all__ = [
    "Calibration",
    "Call",
    "Key",
    "Method",
    "Param",
    "PeftForm",
    "decode",
    "float_dtype",
    "lookup",
    "names",
    "option",
    "register",
]
