"""The numbers that stand in Python against the kernel header that the machine has."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from pykvm.errors import CapabilityError
from pykvm.kvm.capabilities import Capability, Extensions, name_of
from pykvm.kvm.tuning import Quirk


@pytest.fixture(scope="module")
def header() -> dict[str, str]:
    """All macros of <linux/kvm.h>, as the C preprocessor sees them."""
    listing = subprocess.run(
        [os.environ.get("CC", "cc"), "-dM", "-E", "-include", "linux/kvm.h", "-x", "c", "/dev/null"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    return dict(re.findall(r"^#define (\w+) +(.+)$", listing, re.MULTILINE))


def test_every_capability_of_the_header_is_known_with_its_number(header: dict[str, str]) -> None:
    theirs = {
        name.removeprefix("KVM_CAP_"): int(value, 0)
        for name, value in header.items()
        if name.startswith("KVM_CAP_")
    }
    assert len(theirs) > 200, "the header could not be read"
    ours = {name: member.value for name, member in Capability.__members__.items()}
    assert {name: ours.get(name) for name in theirs} == theirs


def test_a_capability_that_the_header_lacks_is_newer_than_all_it_has(header: dict[str, str]) -> None:
    newest = max(int(value, 0) for name, value in header.items() if name.startswith("KVM_CAP_"))
    missing = [member for member in Capability if f"KVM_CAP_{member.name}" not in header]
    # Numbers are handed out in merge windows, so a few older ones may come late.
    assert all(member > newest - 20 for member in missing)


def test_the_newest_numbers() -> None:
    """From <linux/kvm.h> of Linux 7.2, which few machines have installed."""
    newest = {
        "USER_MEMORY2": 231,
        "MEMORY_FAULT_INFO": 232,
        "MEMORY_ATTRIBUTES": 233,
        "GUEST_MEMFD": 234,
        "VM_TYPES": 235,
        "PRE_FAULT_MEMORY": 236,
        "X86_APIC_BUS_CYCLES_NS": 237,
        "X86_GUEST_MODE": 238,
        "GUEST_MEMFD_FLAGS": 244,
        "S390_HPAGE_2G": 249,
    }
    assert {name: Capability[name].value for name in newest} == newest
    assert max(Capability) == 249


def test_no_number_has_two_names() -> None:
    assert len({member.value for member in Capability.__members__.values()}) == len(Capability.__members__)


def test_every_quirk_of_the_header_is_known(header: dict[str, str]) -> None:
    theirs = {
        name.removeprefix("KVM_X86_QUIRK_"): value
        for name, value in header.items()
        if name.startswith("KVM_X86_QUIRK_")
    }
    assert theirs
    for name, value in theirs.items():
        shift = re.fullmatch(r"\(1 << (\d+)\)", value)
        assert shift is not None
        assert Quirk[name] == 1 << int(shift[1])


def test_a_name_for_every_number() -> None:
    assert name_of(192) == "KVM_CAP_DIRTY_LOG_RING"
    assert name_of(60_000) == "KVM capability 60000"


class NothingOffered(Extensions):
    def __init__(self) -> None:
        super().__init__(self.new_handle(-1))

    def check_extension(self, capability: int) -> int:
        return 0


def test_a_missing_capability_is_named_with_who_needs_it() -> None:
    with pytest.raises(CapabilityError, match=r"The ring needs KVM_CAP_DIRTY_LOG_RING.*newer kernel"):
        NothingOffered().require(Capability.DIRTY_LOG_RING, "The ring")
