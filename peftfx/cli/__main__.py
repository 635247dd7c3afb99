"""``python -m peftfx.cli``."""

from peftfx.cli import main

main()
