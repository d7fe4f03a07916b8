"""docs/binding.md lists the binding's methods: all of them, and no others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pykvm.kvm import KvmSystem, KvmVcpu, KvmVm

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "binding.md").read_text()
COMMON = {"close", "closed", "fileno", "ioctl", "ioctl_int", "name", "new_handle"}
INNER = {
    KvmSystem: {"backend", "open"},
    KvmVm: {"backend", "change_slot", "close_statistics", "delete_slot", "ring_entries", "slots", "vcpus"},
    KvmVcpu: {
        "close_statistics",
        "entries",
        "occupied",
        "prepare_statistics",
        "running",
        "swallowed",
        "take_ring_full",
    },
}
"""What holds objects together, and properties that are no part of KVM's API."""


@pytest.mark.parametrize("cls", INNER, ids=lambda cls: cls.__name__)
def test_the_page_lists_what_there_is(cls: type) -> None:
    section = re.search(rf"^## {cls.__name__}:.*?(?=^## )", PAGE, re.DOTALL | re.MULTILINE)
    assert section is not None
    listed = {name for name in re.findall(r"`(\w+)`", section[0]) if name[0].islower()}
    public = {name for name in dir(cls) if not name.startswith("_")} - COMMON - INNER[cls]
    assert listed == public
