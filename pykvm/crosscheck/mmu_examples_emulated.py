"""Worked examples of kvm-mmu.md, section 14.2: seen on a host with kvm_pvm, where CPL 0 is emulated."""

from __future__ import annotations

from collections.abc import Mapping

from pykvm.crosscheck import steps as plan
from pykvm.crosscheck.mmu_example import Example, Expected
from pykvm.crosscheck.mmu_example_guests import (
    CODE,
    COLD_WALK,
    HLT,
    IN_PML4,
    LOG,
    PAGES,
    PML4,
    PT,
    WARM,
    disp,
    load1,
    load_immediate,
    store1,
    store4,
    store8,
)
from pykvm.crosscheck.mmu_example_guests import guest as small_guest
from pykvm.crosscheck.mmu_generate import CR0, CR4
from pykvm.crosscheck.scenario import CodeGuest, Contents, Scenario, VcpuPlan
from pykvm.crosscheck.steps import SlotPlan, Step
from pykvm.machine import Registers, SlotFlags
from pykvm.memory import PAGE_SIZE
from pykvm.x86.bits import Cr0, Cr4


def _kernel(
    name: str,
    title: str,
    row: int,
    code: bytes,
    *expected: Expected,
    guest: CodeGuest | None = None,
    steps: tuple[Step, ...] = (plan.Run(),),
    tracker: str = "ring",
    ring: int = 256,
) -> Example:
    """A row of 14.2: a program at CPL 0."""
    scenario = Scenario(name, guest or small_guest(code), steps, tracker, ring)
    return Example(name, title, f"kvm-mmu.md 14.2, row {row}", scenario, expected)


def _real_mode() -> Example:
    code = b"\xc6\x06\x00\x50\x01" + b"\xc6\x06\x00\x60\x01" + b"\xa0\x00\x70" + HLT
    made = CodeGuest(
        memories=(PAGES * PAGE_SIZE,),
        slots=(SlotPlan(0, 0, 0, 0, PAGES * PAGE_SIZE, LOG),),
        contents=(Contents(0, CODE, code),),
        vcpus=(VcpuPlan("real", 0, Registers(rip=CODE)),),
    )
    return _kernel(
        "real-mode", "two stores and a load in real mode", 1, b"",
        Expected(0, {"mmu_cache_miss": 4, "insn_emulation": 4}, exits=("Halted",)),
        Expected(1, dirty=(5, 6)),
        guest=made, steps=(plan.Run(), plan.Collect(0)), tracker="bitmap",
    )  # fmt: skip


def _writes_to_root() -> tuple[Example, ...]:
    """Rows 3 to 7: stores to the PML4 page."""
    rows: tuple[tuple[str, str, int, bytes, Mapping[str, int]], ...] = (
        (
            "flooding", "four 8-byte stores of 0 to the PML4 page", 3,
            b"".join(store8(IN_PML4 + 8 * n, 0) for n in range(4)),
            {"mmu_pte_write": 3, "mmu_flooded": 1, "mmu_shadow_zapped": 1, "mmu_pde_zapped": 0},
        ),
        (
            "wide-store", "one 16-byte MOVAPS to the PML4 page", 4, b"\x0f\x29" + disp(IN_PML4),
            {"mmu_pte_write": 1, "mmu_flooded": 1},
        ),
        (
            "nonzero-entries", "two nonzero 8-byte stores to the PML4 page", 5,
            store8(IN_PML4, 2) + store8(IN_PML4 + 8, 2), {"mmu_pde_zapped": 2},
        ),
        (
            "byte-stores", "two 1-byte stores at entries of the PML4 page", 6,
            store1(IN_PML4, 2) + store1(IN_PML4 + 8, 2),
            {"mmu_pte_write": 2, "mmu_pde_zapped": 0, "mmu_flooded": 0},
        ),
        (
            "half-entry", "a 4-byte store at an entry of the PML4 page + 4", 7, store4(IN_PML4 + 4, 2),
            {"mmu_pte_write": 1, "mmu_pde_zapped": 1, "mmu_flooded": 0},
        ),
        (
            "within-entry", "a 4-byte store at an entry of the PML4 page + 2", 7, store4(IN_PML4 + 2, 2),
            {"mmu_pte_write": 1, "mmu_pde_zapped": 1, "mmu_flooded": 0},
        ),
        (
            "leaf-table", "four stores to the page table of the leaves", 8,
            b"".join(store8(PT * PAGE_SIZE + 0x800 + 8 * n, 0) for n in range(4)),
            {"mmu_pte_write": 4, "mmu_unsync": 0, "mmu_flooded": 0, "mmu_pde_zapped": 0, "mmu_cache_miss": 1},
        ),
    )  # fmt: skip
    return tuple(
        _kernel(name, title, row, code + HLT, Expected(0, counters, exits=("Halted",)))
        for name, title, row, code, counters in rows
    )


def _one_page_stores() -> tuple[Example, ...]:
    """Rows 2, 9, 10, 11: what data stores push."""
    strings = load_immediate(7, 0x5000) + load_immediate(6, 0x7000) + load_immediate(1, 3)
    compare = load_immediate(0, 1) + b"\xf0\x0f\xb1" + disp(0x5000)
    return (
        _kernel(
            "store-load", "a store to gfn 5, a load from gfn 7, all tables cold", 2,
            store1(0x5000) + load1(0x7000) + HLT,
            Expected(
                0,
                {"mmu_cache_miss": 1, "mmu_pte_write": 1, "tlb_flush": 1},
                ring=(*COLD_WALK, PT, 5, PT),
            ),
        ),
        _kernel(
            "string-move", "REP MOVSQ of three elements from gfn 7 to gfn 5", 9,
            strings + b"\xf3\x48\xa5" + HLT,
            Expected(0, {"insn_emulation": 6}, ring=(*COLD_WALK, PT, PT, 5, 5, 5)),
        ),
        _kernel(
            "crossing-store", "an 8-byte store at 0x5ffc", 10, store8(0x5FFC, 1) + HLT,
            Expected(0, {"mmu_pte_write": 2}, ring=(*COLD_WALK, PT, 5, PT, 6)),
        ),
        _kernel(
            "failing-cmpxchg", "LOCK CMPXCHG whose comparison fails", 11, compare + HLT,
            Expected(0, {"mmu_pte_write": 1}),
            Expected(1, dirty=(5, *COLD_WALK)),
            steps=(plan.Run(), plan.Collect(0)), tracker="bitmap",
        ),
        _kernel(
            "xadd", "XADD", 11, b"\x0f\xc1" + disp(0x5000) + HLT,
            Expected(0, {"mmu_pte_write": 1}),
            Expected(1, dirty=(5, *COLD_WALK)),
            steps=(plan.Run(), plan.Collect(0)), tracker="bitmap",
        ),
    )  # fmt: skip


def _emulator() -> tuple[Example, ...]:
    """Rows 12, 13, 15, 20, 21."""
    present = small_guest(load1(0x7000) + HLT, flags={7: 0x06, 0x30: 0x27})
    no_sse = small_guest(b"\x0f\x29" + disp(0x5000) + HLT, cr4=CR4 & ~int(Cr4.OSFXSR), handlers=False)
    strings = [
        _kernel(
            f"rep-stosb-{count}", f"REP STOSB of {count} elements in a program of four instructions", 21,
            load_immediate(7, 0x5000) + load_immediate(1, count) + b"\xf3\xaa" + HLT,
            Expected(0, {"insn_emulation": decodes, "mmu_pte_write": count}),
            tracker="bitmap",
        )
        for count, decodes in ((1, 5), (2000, 6), (2048, 6))
    ]  # fmt: skip
    return (
        *(
            _kernel(
                name, f"{name.upper()}, which the emulator lacks", 12, code + HLT,
                Expected(0, {"insn_emulation_fail": 1}, exits=("InternalError",)),
            )
            for name, code in (
                ("cmpxchg16b", b"\x48\x0f\xc7\x0c\x25" + (0x5000).to_bytes(4, "little")),
                ("paddd", b"\x66\x0f\xfe\xc1"),
            )
        ),
        _kernel(
            "no-sse", "MOVAPS with CR4.OSFXSR = 0 and no IDT", 13, b"",
            Expected(0, exits=("Shutdown",)), guest=no_sse,
        ),
        _kernel(
            "not-present", "a load from a page that is not present", 15, b"",
            Expected(0, {"pf_guest": 1}, exits=("IoOut",)), guest=present,
        ),
        _kernel(
            "invlpg", "INVLPG", 20, b"\x0f\x01\x3c\x25" + (0x5000).to_bytes(4, "little") + HLT,
            Expected(0, {"invlpg": 1}),
        ),
        *strings,
    )  # fmt: skip


def _translate() -> Example:
    return _kernel(
        "translate", "KVM_TRANSLATE of an address whose tables are cold", 14, HLT,
        Expected(0, ring=COLD_WALK),
        steps=(plan.Translate(0x5000),),
    )  # fmt: skip


def _batch() -> Example:
    """Row 16: the entries in order.  Whether the vCPU stops for the full ring on the way, and with how many
    entries beyond the limit of 192, depends on when host interrupts end a batch of emulation."""
    loop = b"\x89\x07\x90" + b"\x81\xc7\x00\x10\x00\x00" + b"\xff\xc9" + b"\x75\xf3"
    pages = 0x140
    code = load_immediate(7, 0x50000) + load_immediate(1, pages - 0x50) + loop + HLT
    leaves = b"".join((frame * PAGE_SIZE | WARM).to_bytes(8, "little") for frame in range(pages))
    base = small_guest(code, upper=0x27)
    made = CodeGuest(
        memories=(pages * PAGE_SIZE,),
        slots=(SlotPlan(0, 0, 0, 0, pages * PAGE_SIZE, LOG),),
        contents=(*base.contents[:3], Contents(0, PT * PAGE_SIZE, leaves), base.contents[-1]),
        vcpus=base.vcpus,
        tables=base.tables,
    )
    return _kernel(
        "ring-full", "a ring of 256 entries and a batch of 1,024 emulated instructions", 16, b"",
        Expected(
            0,
            ring=tuple(0x50 + page for page in range(pages - 0x50)),
        ),
        guest=made,
    )  # fmt: skip


def _clears() -> Example:
    pages = 100
    matrix = (
        (0, 100, ""), (0, 64, ""), (64, 36, ""), (0, 0, ""),
        *((first, count, "ClearRangeError") for first, count in (
            (1, 64), (64, 64), (0, 128), (64, 32), (128, 0), (100, 0), (0, 36),
        )),
    )  # fmt: skip
    made = CodeGuest(
        memories=(pages * PAGE_SIZE,),
        slots=(SlotPlan(0, 0, 0, 0, pages * PAGE_SIZE, LOG),),
        contents=(),
        vcpus=(VcpuPlan("real", 0, Registers(rip=CODE)),),
    )
    steps = tuple(plan.Clear(0, first, count) for first, count, _ in matrix)
    return _kernel(
        "clear-ranges", "KVM_CLEAR_DIRTY_LOG of a slot of 100 pages", 17, b"",
        *(Expected(number, refused=refused) for number, (_, _, refused) in enumerate(matrix)),
        guest=made, steps=steps, tracker="manual",
    )  # fmt: skip


def _slots() -> Example:
    half = PAGES * PAGE_SIZE // 2
    code = store1(half + 0x5000) + HLT
    flags = dict.fromkeys(range(PAGES), WARM)
    slots = (SlotPlan(0, 0, 0, 0, half, SlotFlags.NONE), SlotPlan(1, half, 0, half, half, LOG))
    return _kernel(
        "slot-changes", "a logging slot that moves, stops and starts to log, and goes", 18, b"",
        Expected(0, exits=("Halted",)),
        Expected(1, refused=""),
        Expected(2, dirty=(0x105,)),
        Expected(3, refused="", counters={"remote_tlb_flush_requests": 0}),
        Expected(4, refused="", counters={"remote_tlb_flush_requests": 1}),
        Expected(5, dirty=()),
        Expected(6, refused="SlotChangeError"),
        Expected(7, refused="SlotOverlapError"),
        Expected(8, refused=""),
        Expected(9, refused="LoggingDisabledError"),
        guest=small_guest(code, flags=flags, upper=0x27, slots=slots),
        steps=(
            plan.Run(), plan.MoveSlot(1, 0x100000), plan.Collect(1), plan.Logging(1, False),
            plan.Logging(1, True), plan.Collect(1), plan.ReflagSlot(1, SlotFlags.READONLY),
            plan.AddSlot(SlotPlan(2, 0x100000, 0, 0, PAGE_SIZE)), plan.DeleteSlot(1), plan.Collect(0),
        ),
        tracker="bitmap",
    )  # fmt: skip


def _write_protect_toggle() -> Example:
    code = HLT * 3 + b"".join(store8(IN_PML4 + 8 * n, 0) for n in range(3)) + HLT
    off, on = CR0 & ~int(Cr0.WP), CR0
    return _kernel(
        "wp-toggle", "CR0.WP 1 to 0 to 1, then three stores to the PML4 page", 19, code,
        Expected(0, {"mmu_cache_miss": 1}),
        Expected(2, {"mmu_cache_miss": 1}),
        Expected(4, {"mmu_cache_miss": 0}),
        Expected(5, {"mmu_flooded": 2, "mmu_pte_write": 3, "mmu_shadow_zapped": 2}),
        Expected(6, {"mmu_shadow_zapped": 1}),
        steps=(
            plan.Run(), plan.SetControls(cr0=off), plan.Run(), plan.SetControls(cr0=on), plan.Run(),
            plan.Run(), plan.SetControls(cr0=off),
        ),
    )  # fmt: skip


def _read_only() -> Example:
    first = PML4 * PAGE_SIZE
    end = 0x20000
    slots = (
        SlotPlan(0, 0, 0, 0, first, LOG),
        SlotPlan(1, first, 0, first, end - first, LOG | SlotFlags.READONLY),
        SlotPlan(2, end, 0, end, PAGES * PAGE_SIZE - end, LOG),
    )
    return _kernel(
        "read-only-tables", "tables in a READONLY slot, then a store into that slot", 22, b"",
        Expected(0, ring=(5,), exits=("Halted",)),
        Expected(1, ring=(), exits=("MmioWrite", "Halted")),
        guest=small_guest(
            store1(0x5000) + HLT + store1(0x18000) + HLT, slots=slots
        ),
        steps=(plan.Run(), plan.Run(exits=2)),
    )  # fmt: skip


def emulated_examples() -> tuple[Example, ...]:
    """All rows, in order."""
    return (
        _real_mode(), *_one_page_stores(), *_writes_to_root(), *_emulator(), _translate(), _batch(),
        _clears(),
        _slots(), _write_protect_toggle(), _read_only(),
    )  # fmt: skip
