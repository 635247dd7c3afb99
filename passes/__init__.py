"""The passes, in the order in which they run."""

from peftfx.passes.absorb import Absorb
from peftfx.passes.attend import Attend
from peftfx.passes.chunk import Chunk
from peftfx.passes.clean import Clean
from peftfx.passes.freeze import Freeze
from peftfx.passes.fuse import Fuse
from peftfx.passes.group import Group
from peftfx.passes.insert import Insert
from peftfx.passes.recompute import Recompute

PIPELINE = (
    Freeze(),  # what the plan freezes requires no gradient
    Attend(),  # marks of queries become keys and values in front of their attention calls
    Insert(),  # other marks become their methods' nodes
    Fuse(),  # linear + low-rank update -> one op
    Chunk(),  # frozen head + cross entropy -> one op
    Group(),  # ops that share their input -> one op
    Clean(),  # nodes that nothing uses any more
)
# then, on AOTAutograd's joint graph of forward and backward
JOINT = (
    Recompute(),  # what the backward makes again instead of keeping
)
# and on each of the two, before peftfx.passes.lower chooses what computes each op
PARTS = (
    Absorb(),  # norm or activation + S of what reads it -> one op
)

__all__ = ["JOINT", "PARTS", "PIPELINE"]
