"""hypothesis strategies for instruction cases, over the same table and tables of values as mass runs."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from pykvm.crosscheck.instructions.forms import Form
from pykvm.crosscheck.instructions.generate import Generated, forms_of, make


def cases(mode: int, cpl: int, forms: Sequence[Form] | None = None) -> st.SearchStrategy[Generated]:
    """Cases of one mode and CPL, of the given forms or all that exist there.

    hypothesis draws the form and every random choice in its making, so it can shrink both.
    """
    chosen = [form for form in forms or forms_of(mode, cpl) if form.exists(mode, cpl)]
    return st.builds(
        lambda form, random: make(random, mode, cpl, form), st.sampled_from(chosen), st.randoms()
    )
