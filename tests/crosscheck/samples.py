"""Fixed scenarios for the tests, small enough to be checked by reading."""

from __future__ import annotations

from pykvm.crosscheck import steps as plan
from pykvm.crosscheck.scenario import (
    CodeGuest,
    Contents,
    Mapping,
    Scenario,
    Surplus,
    TablePlan,
    VcpuPlan,
)
from pykvm.crosscheck.steps import SlotPlan, Step
from pykvm.machine import Registers, SlotFlags
from pykvm.memory import PAGE_SIZE

PAGES = 64
CODE, STACK, HANDLERS, TABLES = 0x1000, 0x3000, 0x4000, 0x8000
DATA = 0x80000
"""Linear and guest-physical address of the data: memory 1, slot 1."""
DATA_PAGES = 16
LOG = SlotFlags.LOG_DIRTY_PAGES
PORT = 0x10
MODES = (("real", 0), ("protected32", 0), ("protected32", 3), ("long", 0), ("long", 3))
OUT = b"\xe6\x10"
"""out 0x10, al"""
HALT = b"\xf4\xeb\xfd"
"""again: hlt; jmp again"""


def store(gpa: int, mode: str) -> bytes:
    """mov byte [gpa], 0x5a, changing DI only; in real mode DS must be DATA >> 4."""
    if mode == "real":
        return b"\xbf" + (gpa - DATA).to_bytes(2, "little") + b"\xc6\x05\x5a"
    return b"\xbf" + gpa.to_bytes(4, "little") + b"\xc6\x07\x5a"


def load(gpa: int, mode: str) -> bytes:
    """mov bl, [gpa], changing DI and BL."""
    if mode == "real":
        return b"\xbf" + (gpa - DATA).to_bytes(2, "little") + b"\x8a\x1d"
    return b"\xbf" + gpa.to_bytes(4, "little") + b"\x8a\x1f"


def prologue(mode: str) -> bytes:
    """mov ax, DATA >> 4; mov ds, ax; mov es, ax in real mode."""
    return b"\xb8\x00\x80\x8e\xd8\x8e\xc0" if mode == "real" else b""


def guest(
    mode: str,
    cpl: int,
    *programs: bytes,
    slots: tuple[SlotPlan, ...] | None = None,
    data_flags: int = 0x27,
    mappings: tuple[Mapping, ...] | None = None,
) -> CodeGuest:
    """One vCPU per program; entries of tables have A set and D clear, so a read dirties nothing."""
    code = tuple(Contents(0, CODE + 0x400 * n, prologue(mode) + each) for n, each in enumerate(programs))
    flags = 0x202 if cpl else 2
    vcpus = tuple(
        VcpuPlan(mode, cpl, Registers(rip=CODE + 0x400 * n, rsp=STACK - 0x800 * n, rflags=flags, rax=0x41))
        for n in range(len(programs))
    )
    if mappings is None:
        data = Mapping(DATA, DATA, DATA_PAGES * PAGE_SIZE, flags=data_flags)
        mappings = (Mapping(0, 0, PAGES * PAGE_SIZE, flags=0x27), data) if mode == "long" else ()
    return CodeGuest(
        memories=(PAGES * PAGE_SIZE, DATA_PAGES * PAGE_SIZE),
        slots=slots or (SlotPlan(0, 0, 0, 0, PAGES * PAGE_SIZE, LOG), data_slot()),
        contents=(*code, Contents(1, 0, bytes(range(256)))),
        vcpus=vcpus,
        tables=TablePlan(TABLES, 40, handlers=HANDLERS),
        mappings=mappings,
    )


def data_slot(slot: int = 1, *, flags: SlotFlags = LOG) -> SlotPlan:
    return SlotPlan(slot, DATA, 1, 0, DATA_PAGES * PAGE_SIZE, flags)


def scenario(
    name: str,
    made: CodeGuest,
    *steps: Step,
    tracker: str = "bitmap",
    ring_entries: int = 1024,
    surplus: tuple[Surplus, ...] = (),
) -> Scenario:
    return Scenario(name, made, steps, tracker, ring_entries, surplus)


def page(number: int) -> int:
    """The address of a data page."""
    return DATA + number * PAGE_SIZE


def writer(mode: str, *numbers: int) -> bytes:
    """Stores to these data pages, one OUT after each; then HLT or, where that is forbidden, OUT for ever."""
    return b"".join(store(page(n), mode) + OUT for n in numbers) + OUT + HALT


def every_step(mode: str = "long", cpl: int = 3) -> Scenario:
    """One scenario with all kinds of steps; some are refused."""
    made = guest(mode, cpl, writer(mode, 1, 2) + b"\xe4\x11" + OUT)
    return scenario(
        f"every step in {mode} at CPL {cpl}",
        made,
        plan.Run(),
        plan.Collect(1),
        plan.Clear(1, 0, DATA_PAGES, b"\xff\xff"),
        plan.Harvest(),
        plan.HostWrite(1, 0x3000, b"host"),
        plan.Logging(1, False),
        plan.Logging(1, True),
        plan.Run(),
        plan.Answer(0, b"\x01"),
        plan.AddSlot(SlotPlan(5, 0x200000, 1, 0, PAGE_SIZE, LOG)),
        plan.MoveSlot(5, 0x300000),
        plan.ReflagSlot(5, SlotFlags.NONE),
        plan.ReflagSlot(5, SlotFlags.READONLY),
        plan.DeleteSlot(5),
        plan.DeleteSlot(5),
        plan.ReadStatistics(),
        plan.SaveLoad(False),
        plan.SetRegisters(0, Registers(rip=CODE, rsp=STACK, rflags=2)),
        plan.SaveLoad(True),
        plan.Run(0, 2, fill=7),
        plan.SingleStep(0, 1),
        plan.Collect(1),
        surplus=(Surplus(0, 0, PAGES, 11, "tests"), Surplus(1, 0, DATA_PAGES, 11, "tests")),
    )
