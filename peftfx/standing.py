"""Classes that stand in for a module's own, and go by its name.

What makes one is called again to unpickle an object of it, so that it is at module level and gives
the same class for the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def stand_in(
    cls: type[nn.Module], make: Callable[..., type[nn.Module]], /, *rest: Any, **members: Any
) -> type[nn.Module]:
    """A subclass of *cls* with *members*: what ``make(cls, *rest)`` gives."""
    own: Mapping[str, Any] = {
        "__reduce_ex__": lambda self, protocol: (_new, (make, cls, *rest), self.__dict__),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    return type(cls.__name__, (cls,), {**members, **own})


def _new(make: Callable[..., type[nn.Module]], *given: Any) -> nn.Module:
    adapted = make(*given)
    return adapted.__new__(adapted)
