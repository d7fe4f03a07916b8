"""Translated code does exactly what the interpreter does."""

from __future__ import annotations

from tests.model.duo import DATA, Duo

RCX, RDI = 1, 7


def test_store_loop_is_translated_and_equal() -> None:
    # mov [rdi], rcx ; add rdi, 8 ; dec rcx ; jnz ; hlt
    duo = Duo(64, bytes.fromhex("48890f 4881c708000000 48ffc9 75f1 f4"), {RCX: 1000, RDI: DATA})
    duo.run(*[1] * 100, *[7] * 100, 5000)
    assert duo.translated > 3000
