"""The x87 instructions that the model has, against the host's processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pykvm.errors import HostError
from tests.model.native import Twin, x87_cases

CASES = 40
MEMORY = (
    "d907", "d917", "d91f", "d927", "66d927", "d92f", "d93f", "db07", "db0f", "db17", "db1f", "db2f", "db3f",
    "dd07", "dd0f", "dd17", "dd1f", "dd27", "66dd27", "dd3f", "df07", "df0f", "df17", "df1f", "df27", "df2f",
    "df37", "df3f",
    *(f"{opcode:02x}{field << 3 | 7:02x}" for opcode in (0xD8, 0xDA, 0xDC, 0xDE) for field in range(8)),
)  # fmt: skip
REGISTERS = (
    "d9c0", "d9c3", "d9c8", "d9cd", "d9d0", "d9d8", "d9de", "d9e8", "d9e9", "d9ea", "d9eb", "d9ec", "d9ed",
    "d9ee", "d9f6", "d9f7", "dbe0", "dbe1", "dbe2", "dbe3", "dbe4", "ddc2", "ddca", "ddd0", "ddd3", "ddd8",
    "dddf", "dfc1", "dfc9", "dfd4", "dfdb", "dfe0", "d9e0", "d9e1", "d9e4", "d9e5", "d9fa", "d9fc", "dae9",
    "dbea", "dbf3", "dde4", "ddeb", "ded9", "dfea", "dff3",
    *(f"{opcode:02x}{0xC2 | field << 3:02x}" for opcode in (0xD8, 0xDC) for field in range(8)),
    *(f"{opcode:02x}{0xC2 | field << 3:02x}" for opcode in (0xDA, 0xDB) for field in range(4)),
    *(f"de{0xC2 | field << 3:02x}" for field in (0, 1, 4, 5, 6, 7)),
)  # fmt: skip


@pytest.fixture(scope="module")
def twin() -> Iterator[Twin]:
    """Skips where the host does not let us trace."""
    try:
        made = Twin()
    except HostError as why:
        pytest.skip(str(why))
    yield made
    made.close()


@pytest.mark.parametrize("code", MEMORY + REGISTERS)
def test_instruction_leaves_what_the_host_leaves(twin: Twin, code: str) -> None:
    encoding = bytes.fromhex(code)
    for case in x87_cases(encoding, 1, CASES):
        assert twin.difference(case) == "", f"{code} {case.floating}"
