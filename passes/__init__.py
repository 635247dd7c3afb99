"""The passes, in the order in which they run."""

from peftfx.passes.attend import Attend
from peftfx.passes.clean import Clean
from peftfx.passes.freeze import Freeze
from peftfx.passes.fuse import Fuse
from peftfx.passes.group import Group
from peftfx.passes.insert import Insert

PIPELINE = (
    Freeze(),  # what the plan freezes requires no gradient
    Attend(),  # marks of queries become keys and values in front of their attention calls
    Insert(),  # other marks become their methods' nodes
    Fuse(),  # linear + low-rank update -> one op
    Group(),  # ops that share their input -> one op
    Clean(),  # nodes that nothing uses any more
)
# Lowering works on the graphs that AOTAutograd makes of this one: see peftfx.passes.lower.

__all__ = ["PIPELINE"]
