"""Small guests for worked examples: four tables over 64 frames, and a few instructions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pykvm.crosscheck.mmu_generate import CR0, CR4, EFER
from pykvm.crosscheck.scenario import CodeGuest, Contents, Controls, TablePlan, VcpuPlan
from pykvm.crosscheck.steps import SlotPlan
from pykvm.machine import Registers, SlotFlags
from pykvm.memory import PAGE_SIZE

CODE: Final = 0x1000
PML4, PDPT, PD, PT = 0x10, 0x11, 0x12, 0x13
"""Frames of the tables (14.2)."""
PAGES: Final = 0x40
SYSTEM: Final = TablePlan(0x20000, 8, handlers=0x2000)
LOG: Final = SlotFlags.LOG_DIRTY_PAGES
COLD, WARM = 0x07, 0x67
"""Flags of entries with A and D clear, and set."""
PRESET: Final = (*range(2, 4), *range(0x20, 0x28))
"""Frames of handlers and system tables: their A is set, so that only what the example is about shows."""


def tables(flags: Mapping[int, int], upper: int = COLD) -> tuple[Contents, ...]:
    """Four tables that map the first frames to themselves, ``flags`` telling those of single leaves."""
    found = [
        Contents(0, table * PAGE_SIZE, (below * PAGE_SIZE | upper).to_bytes(8, "little"))
        for table, below in ((PML4, PDPT), (PDPT, PD), (PD, PT))
    ]
    preset = dict.fromkeys(PRESET, 0x27)
    leaves = [frame * PAGE_SIZE | (preset | dict(flags)).get(frame, COLD) for frame in range(PAGES)]
    found.append(Contents(0, PT * PAGE_SIZE, b"".join(leaf.to_bytes(8, "little") for leaf in leaves)))
    return tuple(found)


def guest(
    code: bytes,
    *,
    cpl: int = 0,
    flags: Mapping[int, int] | None = None,
    upper: int = COLD,
    slots: tuple[SlotPlan, ...] | None = None,
    cr4: int = CR4,
    handlers: bool = True,
) -> CodeGuest:
    contents = tables(flags or {}, upper)
    if cpl == 0:
        contents += (Contents(0, CODE, code),)
    registers = Registers(rip=CODE, rsp=0x4000, rflags=2)
    return CodeGuest(
        memories=(PAGES * PAGE_SIZE,),
        slots=slots or (SlotPlan(0, 0, 0, 0, PAGES * PAGE_SIZE, LOG),),
        contents=contents,
        vcpus=(VcpuPlan("long", cpl, registers, Controls(CR0, PML4 * PAGE_SIZE, cr4, EFER)),),
        tables=SYSTEM if handlers else TablePlan(SYSTEM.start, SYSTEM.pages),
        snippets=CODE if cpl else None,
    )


# --- encodings ---

HLT: Final = b"\xf4"


def disp(address: int) -> bytes:
    """ModRM and SIB of [address], an absolute address, with reg 0."""
    return b"\x04\x25" + address.to_bytes(4, "little")


def store1(address: int, value: int = 1) -> bytes:
    return b"\xc6" + disp(address) + bytes([value])


def store4(address: int, value: int) -> bytes:
    return b"\xc7" + disp(address) + value.to_bytes(4, "little")


def store8(address: int, value: int) -> bytes:
    return b"\x48" + store4(address, value)


def load1(address: int) -> bytes:
    return b"\x8a" + disp(address)


def load_immediate(register: int, value: int) -> bytes:
    """mov of 32 bits into RAX (0), RCX (1), RSI (6), RDI (7)."""
    return bytes([0xB8 + register]) + value.to_bytes(4, "little")


IN_PML4: Final = PML4 * PAGE_SIZE + 0x800
"""An entry of the root that maps nothing."""
COLD_WALK: Final = (PML4, PDPT, PD, PT)
