"""The op, and its kernel on the CPU."""

from peftfx.kernels.philox import cpu, op

__all__ = ["cpu", "op"]
