"""Boot states and descriptor tables, against the formats in SDM vol. 3."""

from __future__ import annotations

import struct

import pytest

from pykvm.errors import UsageError
from pykvm.guest import boot
from pykvm.guest.boot import Arena, BootMode, SystemTables, boot_state
from pykvm.memory import GuestMemory


@pytest.fixture
def memory():
    with GuestMemory(1 << 20) as made:
        yield made


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        # Flat descriptors as every operating system has them, accessed bit set (SDM vol. 3, 3.4.5).
        (boot.CODE64, 0x00AF9B000000FFFF),
        (boot.DATA, 0x00CF93000000FFFF),
        (boot.CODE64_USER, 0x00AFFB000000FFFF),
        (boot.DATA_USER, 0x00CFF3000000FFFF),
        (boot.CODE32, 0x00CF9B000000FFFF),
        (boot.CODE32_USER, 0x00CFFB000000FFFF),
        (boot.CODE16, 0x008F9B000000FFFF),
    ],
)
def test_gdt_holds_flat_segments(selector, expected, memory):
    tables = SystemTables.build(memory, Arena(0x10000, 0x80000).take, wide=True, stacks=[0x9000])
    entry = memory.read(tables.gdt.base + (selector & ~7), 8)
    assert int.from_bytes(entry, "little") == expected


def test_gdt_starts_with_the_null_descriptor_and_ends_after_the_last_tss(memory):
    tables = SystemTables.build(memory, Arena(0x10000, 0x80000).take, wide=True, stacks=[0x9000, 0xA000])
    assert memory.read(tables.gdt.base, 8) == bytes(8)
    assert tables.gdt.limit == tables.tss[1].selector + 16 - 1
    assert tables.tss[1].selector == tables.tss[0].selector + 16


@pytest.mark.parametrize("wide", [True, False])
def test_tss_gives_the_stack_and_all_ports(wide, memory):
    stack = 0x9000
    tables = SystemTables.build(memory, Arena(0x10000, 0x80000).take, wide=wide, stacks=[stack])
    segment = tables.tss[0]
    tss = memory.read(segment.base, segment.limit + 1)
    if wide:
        assert struct.unpack_from("<Q", tss, 4)[0] == stack  # RSP0
        assert struct.unpack_from("<Q", tss, 0x24)[0] == stack  # IST1
    else:
        assert struct.unpack_from("<IH", tss, 4) == (stack, boot.DATA)  # ESP0, SS0
    bitmap = struct.unpack_from("<H", tss, 0x66)[0]
    assert len(tss) == bitmap + 8192 + 1
    assert tss[bitmap:-1] == bytes(8192)
    assert tss[-1] == 0xFF  # the byte after the bitmap (SDM vol. 1, 19.5.2)
    low, high = struct.unpack_from("<II", memory.read(tables.gdt.base + segment.selector, 8))
    assert (high & 0xFF000000) | (high & 0xFF) << 16 | low >> 16 == segment.base
    assert low & 0xFFFF == segment.limit
    assert high >> 8 & 0xFF == 0x8B  # present, DPL 0, busy TSS


def test_idt_gates_lead_to_the_handlers(memory):
    handlers = [0x123456789ABC0 + 16 * vector for vector in range(32)]
    take = Arena(0x10000, 0x80000).take
    tables = SystemTables.build(memory, take, wide=True, stacks=[0x9000], handlers=handlers)
    assert tables.idt.limit == 32 * 16 - 1
    for vector, handler in enumerate(handlers):
        low, selector, ist, access, middle, high, zero = struct.unpack(
            "<HHBBHII", memory.read(tables.idt.base + 16 * vector, 16)
        )
        assert high << 32 | middle << 16 | low == handler
        assert (selector, ist, access, zero) == (boot.CODE64, 1, 0x8E, 0)


def test_idt_gates_of_32_bits(memory):
    take = Arena(0x10000, 0x80000).take
    tables = SystemTables.build(memory, take, wide=False, stacks=[0x9000], handlers=[0x12345678])
    assert memory.read(tables.idt.base, 8) == struct.pack("<HHBBH", 0x5678, boot.CODE32, 0, 0x8E, 0x1234)


def test_too_many_vcpus_for_a_gdt(memory):
    with pytest.raises(UsageError, match="vCPUs"):
        SystemTables.build(memory, Arena(0, 1 << 20).take, wide=True, stacks=[0] * 300)


PE, WP, PG, PAE, PSE, LA57, LME, LMA = 1, 1 << 16, 1 << 31, 1 << 5, 1 << 4, 1 << 12, 1 << 8, 1 << 10


@pytest.mark.parametrize(
    ("mode", "cr0", "cr4", "efer"),
    [
        (BootMode.PROTECTED16, PE, 0, 0),
        (BootMode.PROTECTED32, PE, 0, 0),
        (BootMode.PAGED32, PE | PG, PSE, 0),
        (BootMode.PAE, PE | PG, PAE, 0),
        (BootMode.LONG, PE | PG, PAE, LME | LMA),
        (BootMode.LA57, PE | PG, PAE | LA57, LME | LMA),
    ],
)
@pytest.mark.parametrize("cpl", [0, 3])
def test_control_registers_select_the_mode(mode, cr0, cr4, efer, cpl):
    """SDM vol. 3, 4.1.1 and table 4-1."""
    cr3 = 0x5000 if cr0 & PG else 0
    state = boot_state(mode, entry=0x8000, stack=0x7000, cpl=cpl, cr3=cr3)
    special = state.special
    assert special.cr0 & (PE | PG) == cr0
    assert special.cr4 & (PAE | PSE | LA57) == cr4
    assert special.efer & (LME | LMA) == efer
    assert special.cr3 == cr3
    assert special.cs.selector & 3 == special.ss.selector & 3 == special.cs.dpl == special.ss.dpl == cpl
    assert (special.cs.l, special.cs.db) == ((1, 0) if efer else (0, int(mode is not BootMode.PROTECTED16)))
    assert (state.registers.rip, state.registers.rsp) == (0x8000, 0x7000)
    assert state.registers.rflags == (0x3002 if cpl else 2)


@pytest.mark.parametrize(
    ("entry", "segment", "cs", "ip"),
    [
        (32768, None, 0, 32768),
        (74565, None, 4096, 9029),
        (1048560, None, 61440, 65520),
        (31744, 1984, 1984, 0),
    ],
)
def test_real_mode_splits_the_address(entry, segment, cs, ip):
    state = boot.real_mode(entry, segment=segment)
    assert (state.special.cs.selector, state.special.cs.base, state.registers.rip) == (cs, cs << 4, ip)
    assert state.special.cr0 & (PE | PG) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": BootMode.LONG},
        {"mode": BootMode.PROTECTED32, "cr3": 0x1000},
        {"mode": BootMode.PROTECTED32, "cpl": 1},
        {"mode": BootMode.REAL, "cpl": 3},
        {"mode": BootMode.REAL, "entry": 1 << 20},
        {"mode": BootMode.REAL, "stack": 1 << 16},
    ],
)
def test_arguments_that_do_not_fit_each_other(arguments):
    with pytest.raises(UsageError):
        boot_state(**{"entry": 0x8000, "stack": 0x7000, **arguments})


def test_arena_hands_out_each_page_once():
    arena = Arena(0x1000, 0x5000)
    assert [arena.take(), arena.take(2), arena.take()] == [0x1000, 0x2000, 0x4000]
    with pytest.raises(UsageError, match="too small"):
        arena.take()
    with pytest.raises(UsageError):
        Arena(0x1001, 0x5000)
