"""The package's logger: ``TORCH_LOGS="+peftfx"`` or :mod:`logging` set its level."""

from __future__ import annotations

import logging

logger = logging.getLogger("peftfx")
