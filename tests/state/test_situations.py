"""Every situation, in every form: its result by plain arithmetic, or an error that names it."""

from __future__ import annotations

import pytest

from peftfx.bypass import _typed
from tests.helpers import relative
from tests.state import copies, dicts, surgery
from tests.state.bench import FORMS, SITUATIONS, Bench, Form, Situation

assert copies and dicts and surgery  # importing them fills the table


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", SITUATIONS, ids=str)
def test_works_or_is_refused(what: Situation, form: Form) -> None:
    if what.refused is None:
        out, expected = what.run(Bench(form))
        assert out.shape == expected.shape and relative(out, expected) < what.tolerance
        return
    with pytest.raises(Exception) as caught:
        what.run(Bench(form))
    assert isinstance(_typed(caught.value) or caught.value, what.refused), repr(caught.value)
