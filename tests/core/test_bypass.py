"""The bypass table holds: adapted, or an error; never the base, never another adapter."""

from __future__ import annotations

import pytest

from peftfx.bypass import SITUATIONS, try_one


def test_table_is_large() -> None:
    assert len(SITUATIONS) >= 60


@pytest.mark.parametrize("fullgraph", [False, True], ids=["breaks", "fullgraph"])
@pytest.mark.parametrize("name", SITUATIONS)
def test_adapted_or_refused(name: str, fullgraph: bool) -> None:
    row = try_one(name, fullgraph)
    assert row.holds, f"{row.verdict}: {row.detail}"
    if not fullgraph and name not in MAY_FAIL_LOUDLY:
        assert row.verdict in ("adapted", "refused"), row.detail


# torch itself refuses these, loudly, before peftfx is asked
MAY_FAIL_LOUDLY = {
    "stance fail_on_recompile",
    "inner compiler fails",
    "func.vjp",
    "compiled, inside vmap",
}
