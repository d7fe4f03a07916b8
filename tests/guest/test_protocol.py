"""The protocol's constants exist twice, in guests/pykvm.inc and in Python: they must agree."""

from __future__ import annotations

import re

import pytest

from pykvm.errors import ImageError, UsageError
from pykvm.guest import catalog, modes, protocol
from pykvm.guest.protocol import Block, Doorbell, GuestHeader, Kind, State


def constants(text: str) -> dict[str, int]:
    return {
        name: int(value, 0)
        for name, value in re.findall(r"^\.equ (\w+), (0x[0-9a-f]+|\d+)", text, re.MULTILINE)
    }


INCLUDE = constants(catalog.include())


@pytest.mark.parametrize(
    ("prefix", "enum", "absent"),
    [
        ("BLOCK_", Block, set()),
        ("DOORBELL_", Doorbell, {"PORT"}),
        ("KIND_", Kind, set()),
        ("STATE_", State, set()),
    ],
)
def test_enumerations_agree(prefix, enum, absent):
    theirs = {name.removeprefix(prefix): value for name, value in INCLUDE.items() if name.startswith(prefix)}
    theirs = {name: value for name, value in theirs.items() if name not in absent}
    ours = {member.name: member.value for member in enum if not (enum is State and member is State.NEW)}
    assert ours == theirs


@pytest.mark.parametrize(
    "name",
    [
        "PROTOCOL_VERSION",
        "LOAD_ADDRESS",
        "DEBUG_EXIT_PORT",
        "DEBUG_TEXT_PORT",
        "DOORBELL_PORT",
        "RECORD_SHIFT",
        "RECORD_LIMIT",
    ],
)
def test_constants_agree(name):
    assert getattr(protocol, name) == INCLUDE[name]


def test_mode_test_constants_agree():
    theirs = constants((catalog._IMAGES / "modes.inc").read_text())
    ours = {"MODE_PATTERN": modes.PATTERN, "MODE_STORES": modes.STORES, "MODE_STEP": modes.STEP}
    assert ours == theirs


def test_records_end_within_the_block():
    assert Block.RECORD + (protocol.RECORD_LIMIT << protocol.RECORD_SHIFT) <= 4096


def header(magic=b"PYKVMGST", version=1, kind=1, strings=b"name\0summary\0") -> bytes:
    return (
        magic + version.to_bytes(2, "little") + kind.to_bytes(2, "little")
        + (4).to_bytes(4, "little") + (0x8040).to_bytes(8, "little") + bytes(8) + strings
    )  # fmt: skip


def test_header_fields():
    parsed = GuestHeader.parse(header() + bytes(20))
    assert (parsed.kind, parsed.checks, parsed.entry, parsed.stubs) == (Kind.WORKLOAD, 4, 0x8040, 0)
    assert (parsed.name, parsed.summary) == ("name", "summary")
    assert parsed.code == 48  # 32 bytes and two strings of 13 bytes, rounded up to 16


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"PYKVMGST",
        header()[:31],
        header(magic=b"PYKVMXXX"),
        header(version=2),
        header(kind=99),
        header(strings=b"name\x00no end"),
        header(kind=0),
    ],
)
def test_damaged_headers_are_image_errors(image):
    with pytest.raises(ImageError):
        GuestHeader.parse(image)


def test_catalog_lists_what_is_asked_for():
    workloads = {"sequential", "random", "hotspot", "stride", "idle", "burst", "strings", "smp"}
    assert set(catalog.workloads()) == workloads
    assert set(modes.MODES) | workloads | {"rom", "multiboot", "selftest", "kernel"} == set(catalog.names())


@pytest.mark.parametrize("name", catalog.names())
def test_guests_show_source_and_listing(name):
    guest = catalog.load(name)
    assert guest.name == name
    assert guest.summary
    assert guest.modes
    assert f"GUEST {name}," in guest.source
    assert "out " in guest.disassembly
    assert ".byte" not in guest.disassembly.split("out ")[0]  # data would mean the wrong mode or offset


def test_unknown_guest_is_a_usage_error_with_the_names():
    with pytest.raises(UsageError, match="hotspot"):
        catalog.load("nonsense")
