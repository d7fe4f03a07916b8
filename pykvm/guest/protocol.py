"""The guest-host protocol: constants of ``guests/pykvm.inc`` and the image header.

A workload finds its parameters in a page per vCPU and writes its results there, so its host reads progress
from guest memory without an exit, and nothing that matters lives outside the guest.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from pykvm.errors import ImageError

PROTOCOL_VERSION: Final = 1
LOAD_ADDRESS: Final = 0x8000

DEBUG_EXIT_PORT: Final = 0xF4
DEBUG_TEXT_PORT: Final = 0xE9
DOORBELL_PORT: Final = 0x5B0


class Doorbell(IntEnum):
    """What a guest says with a 32-bit OUT to ``DOORBELL_PORT``."""

    FINISHED = 1
    CORRUPTION = 2
    EXCEPTION = 3


class Kind(IntEnum):
    """What a guest needs to run; REAL to LA57 are named after the mode that they test."""

    WORKLOAD = 1
    REAL = 2
    PROTECTED16 = 3
    PROTECTED32 = 4
    PAGED32 = 5
    PAE = 6
    LONG = 7
    LA57 = 8
    ROM = 9
    MULTIBOOT = 10


class State(IntEnum):
    """What a vCPU of a workload is doing; 0 before its first instruction."""

    NEW = 0
    RUNNING = 1
    FINISHED = 2
    EXCEPTION = 3


class Block(IntEnum):
    """Offsets of the 64-bit fields in the vCPU block; see ``guests/pykvm.inc``."""

    VCPU = 0x00
    VCPUS = 0x08
    SEED = 0x10
    KEY1 = 0x18
    KEY2 = 0x20
    DATA = 0x28
    PAGES = 0x30
    STEP = 0x38
    LEDGER = 0x40
    PASS_LIMIT = 0x48
    ARGUMENT0 = 0x50
    ARGUMENT1 = 0x58
    THROTTLE = 0x60
    SHARED = 0x68
    STATE = 0x100
    VISITS = 0x108
    PASSES = 0x110
    CORRUPTIONS = 0x118
    RECORDS = 0x120
    VECTOR = 0x130
    ERROR = 0x138
    RIP = 0x140
    CS = 0x148
    RFLAGS = 0x150
    RSP = 0x158
    CR2 = 0x160
    RECORD = 0x200


RECORD_SHIFT: Final = 5
RECORD_LIMIT: Final = 64

_HEADER = struct.Struct("<8sHHIQQ")
_MAGIC = b"PYKVMGST"


@dataclass(frozen=True, slots=True)
class GuestHeader:
    """What an image says about itself.

    ``entry`` and ``stubs`` (0 without exception handlers) are addresses as linked, ``checks`` the words that
    a workload compares per visit, ``code`` the offset into the file at which the code starts.
    """

    kind: Kind
    checks: int
    entry: int
    stubs: int
    name: str
    summary: str
    code: int

    @classmethod
    def parse(cls, image: bytes) -> GuestHeader:
        """Raises ImageError if ``image`` is not a guest of this protocol."""
        start = max(0, image.find(_MAGIC))  # an ELF file has its own header before it
        if len(image) - start < _HEADER.size or not image.startswith(_MAGIC, start):
            raise ImageError(
                "This is not a pykvm guest image; build the guests with scripts/build_guests.py."
            )
        _, version, kind, checks, entry, stubs = _HEADER.unpack_from(image, start)
        if version != PROTOCOL_VERSION:
            raise ImageError(
                f"The guest image has protocol version {version}, this pykvm needs {PROTOCOL_VERSION}."
            )
        strings = image[start + _HEADER.size :].split(b"\0", 2)
        if len(strings) < 3 or kind not in set(Kind):
            raise ImageError("The header of the guest image is damaged; build it again.")
        name, summary = (text.decode("ascii", "replace") for text in strings[:2])
        code = start + (_HEADER.size + len(strings[0]) + len(strings[1]) + 2 + 15) // 16 * 16
        return cls(Kind(kind), checks, entry, stubs, name, summary, code)
