"""The one table of architectures that tests and README share.

Each is tiny, has random weights, and says which modules have which role, as a reader of the
model's source would.
"""

from __future__ import annotations

from tests.architectures.architecture import Architecture
from tests.architectures.audio import AUDIO
from tests.architectures.decoders import DECODERS
from tests.architectures.encoder_decoders import ENCODER_DECODERS
from tests.architectures.encoders import ENCODERS
from tests.architectures.mixtures import MIXTURES
from tests.architectures.multimodal import MULTIMODAL
from tests.architectures.plain import PLAIN
from tests.architectures.state_space import STATE_SPACE
from tests.architectures.vision import VISION

FAMILIES: dict[str, tuple[Architecture, ...]] = {
    "decoders": DECODERS,
    "mixtures of experts": MIXTURES,
    "encoders": ENCODERS,
    "encoder-decoders": ENCODER_DECODERS,
    "vision": VISION,
    "audio": AUDIO,
    "multimodal": MULTIMODAL,
    "state space": STATE_SPACE,
}
ARCHITECTURES = (*(a for family in FAMILIES.values() for a in family), *PLAIN)


def by_name(name: str) -> Architecture:
    """The architecture of that name."""
    return next(a for a in ARCHITECTURES if a.name == name)
