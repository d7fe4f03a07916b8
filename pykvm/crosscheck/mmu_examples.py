"""Worked examples of what KVM's MMU does: small scenarios and what the reference sheet says they show.

They are those of docs/reference/kvm-mmu.md, sections 14.2 (seen on a host with kvm_pvm, where CPL 0 is
emulated) and 14.3 (worked out for others: A to C for nested paging, D to G for shadow paging).  Expected
values come from there.  ``pykvm explain NAME`` shows one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pykvm.crosscheck import steps as plan
from pykvm.crosscheck.mmu_example import Example, Expected, HostKind
from pykvm.crosscheck.mmu_generate import CR0, CR4, EFER
from pykvm.crosscheck.scenario import CodeGuest, Contents, Controls, Scenario, TablePlan, VcpuPlan
from pykvm.crosscheck.steps import SlotPlan, Step
from pykvm.machine import Registers, SlotFlags
from pykvm.memory import PAGE_SIZE
from pykvm.x86.bits import Cr0, Cr4

CODE: Final = 0x1000
PML4, PDPT, PD, PT = 0x10, 0x11, 0x12, 0x13
"""Frames of the tables (14.2)."""
PAGES: Final = 0x40
_SYSTEM: Final = TablePlan(0x20000, 8, handlers=0x2000)
_LOG: Final = SlotFlags.LOG_DIRTY_PAGES
_COLD, _WARM = 0x07, 0x67
"""Flags of entries with A and D clear, and set."""
_PRESET: Final = (*range(2, 4), *range(0x20, 0x28))
"""Frames of handlers and system tables: their A is set, so that only what the example is about shows."""


# --- guests --------------------------------------------------------------------------------------


def tables(flags: Mapping[int, int], upper: int = _COLD) -> tuple[Contents, ...]:
    """Four tables that map the first frames to themselves, ``flags`` telling those of single leaves."""
    found = [
        Contents(0, table * PAGE_SIZE, (below * PAGE_SIZE | upper).to_bytes(8, "little"))
        for table, below in ((PML4, PDPT), (PDPT, PD), (PD, PT))
    ]
    preset = dict.fromkeys(_PRESET, 0x27)
    leaves = [frame * PAGE_SIZE | (preset | dict(flags)).get(frame, _COLD) for frame in range(PAGES)]
    found.append(Contents(0, PT * PAGE_SIZE, b"".join(leaf.to_bytes(8, "little") for leaf in leaves)))
    return tuple(found)


def _guest(
    code: bytes,
    *,
    cpl: int = 0,
    flags: Mapping[int, int] | None = None,
    upper: int = _COLD,
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
        slots=slots or (SlotPlan(0, 0, 0, 0, PAGES * PAGE_SIZE, _LOG),),
        contents=contents,
        vcpus=(VcpuPlan("long", cpl, registers, Controls(CR0, PML4 * PAGE_SIZE, cr4, EFER)),),
        tables=_SYSTEM if handlers else TablePlan(_SYSTEM.start, _SYSTEM.pages),
        snippets=CODE if cpl else None,
    )


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
    scenario = Scenario(name, guest or _guest(code), steps, tracker, ring)
    return Example(name, title, f"kvm-mmu.md 14.2, row {row}", scenario, expected)


# --- encodings -----------------------------------------------------------------------------------

_HLT: Final = b"\xf4"


def _disp(address: int) -> bytes:
    """ModRM and SIB of [address], an absolute address, with reg 0."""
    return b"\x04\x25" + address.to_bytes(4, "little")


def _store1(address: int, value: int = 1) -> bytes:
    return b"\xc6" + _disp(address) + bytes([value])


def _store4(address: int, value: int) -> bytes:
    return b"\xc7" + _disp(address) + value.to_bytes(4, "little")


def _store8(address: int, value: int) -> bytes:
    return b"\x48" + _store4(address, value)


def _load1(address: int) -> bytes:
    return b"\x8a" + _disp(address)


def _load_immediate(register: int, value: int) -> bytes:
    """mov of 32 bits into RAX (0), RCX (1), RSI (6), RDI (7)."""
    return bytes([0xB8 + register]) + value.to_bytes(4, "little")


_IN_PML4: Final = PML4 * PAGE_SIZE + 0x800
"""An entry of the root that maps nothing."""
_COLD_WALK: Final = (PML4, PDPT, PD, PT)

# --- 14.2 ----------------------------------------------------------------------------------------


def _real_mode() -> Example:
    code = b"\xc6\x06\x00\x50\x01" + b"\xc6\x06\x00\x60\x01" + b"\xa0\x00\x70" + _HLT
    guest = CodeGuest(
        memories=(PAGES * PAGE_SIZE,),
        slots=(SlotPlan(0, 0, 0, 0, PAGES * PAGE_SIZE, _LOG),),
        contents=(Contents(0, CODE, code),),
        vcpus=(VcpuPlan("real", 0, Registers(rip=CODE)),),
    )
    return _kernel(
        "real-mode", "two stores and a load in real mode", 1, b"",
        Expected(0, {"mmu_cache_miss": 4, "insn_emulation": 4}, exits=("Halted",)),
        Expected(1, dirty=(5, 6)),
        guest=guest, steps=(plan.Run(), plan.Collect(0)), tracker="bitmap",
    )  # fmt: skip


def _writes_to_root() -> tuple[Example, ...]:
    """Rows 3 to 7: stores to the PML4 page."""
    rows: tuple[tuple[str, str, int, bytes, Mapping[str, int]], ...] = (
        (
            "flooding", "four 8-byte stores of 0 to the PML4 page", 3,
            b"".join(_store8(_IN_PML4 + 8 * n, 0) for n in range(4)),
            {"mmu_pte_write": 3, "mmu_flooded": 1, "mmu_shadow_zapped": 1, "mmu_pde_zapped": 0},
        ),
        (
            "wide-store", "one 16-byte MOVAPS to the PML4 page", 4, b"\x0f\x29" + _disp(_IN_PML4),
            {"mmu_pte_write": 1, "mmu_flooded": 1},
        ),
        (
            "nonzero-entries", "two nonzero 8-byte stores to the PML4 page", 5,
            _store8(_IN_PML4, 2) + _store8(_IN_PML4 + 8, 2), {"mmu_pde_zapped": 2},
        ),
        (
            "byte-stores", "two 1-byte stores at entries of the PML4 page", 6,
            _store1(_IN_PML4, 2) + _store1(_IN_PML4 + 8, 2),
            {"mmu_pte_write": 2, "mmu_pde_zapped": 0, "mmu_flooded": 0},
        ),
        (
            "half-entry", "a 4-byte store at an entry of the PML4 page + 4", 7, _store4(_IN_PML4 + 4, 2),
            {"mmu_pte_write": 1, "mmu_pde_zapped": 1, "mmu_flooded": 0},
        ),
        (
            "within-entry", "a 4-byte store at an entry of the PML4 page + 2", 7, _store4(_IN_PML4 + 2, 2),
            {"mmu_pte_write": 1, "mmu_pde_zapped": 1, "mmu_flooded": 0},
        ),
        (
            "leaf-table", "four stores to the page table of the leaves", 8,
            b"".join(_store8(PT * PAGE_SIZE + 0x800 + 8 * n, 0) for n in range(4)),
            {"mmu_pte_write": 4, "mmu_unsync": 0, "mmu_flooded": 0, "mmu_pde_zapped": 0, "mmu_cache_miss": 1},
        ),
    )  # fmt: skip
    return tuple(
        _kernel(name, title, row, code + _HLT, Expected(0, counters, exits=("Halted",)))
        for name, title, row, code, counters in rows
    )


def _one_page_stores() -> tuple[Example, ...]:
    """Rows 2, 9, 10, 11: what data stores push."""
    strings = _load_immediate(7, 0x5000) + _load_immediate(6, 0x7000) + _load_immediate(1, 3)
    compare = _load_immediate(0, 1) + b"\xf0\x0f\xb1" + _disp(0x5000)
    return (
        _kernel(
            "store-load", "a store to gfn 5, a load from gfn 7, all tables cold", 2,
            _store1(0x5000) + _load1(0x7000) + _HLT,
            Expected(
                0,
                {"mmu_cache_miss": 1, "mmu_pte_write": 1, "tlb_flush": 1},
                ring=(*_COLD_WALK, PT, 5, PT),
            ),
        ),
        _kernel(
            "string-move", "REP MOVSQ of three elements from gfn 7 to gfn 5", 9,
            strings + b"\xf3\x48\xa5" + _HLT,
            Expected(0, {"insn_emulation": 6}, ring=(*_COLD_WALK, PT, PT, 5, 5, 5)),
        ),
        _kernel(
            "crossing-store", "an 8-byte store at 0x5ffc", 10, _store8(0x5FFC, 1) + _HLT,
            Expected(0, {"mmu_pte_write": 2}, ring=(*_COLD_WALK, PT, 5, PT, 6)),
        ),
        _kernel(
            "failing-cmpxchg", "LOCK CMPXCHG whose comparison fails", 11, compare + _HLT,
            Expected(0, {"mmu_pte_write": 1}),
            Expected(1, dirty=(5, *_COLD_WALK)),
            steps=(plan.Run(), plan.Collect(0)), tracker="bitmap",
        ),
        _kernel(
            "xadd", "XADD", 11, b"\x0f\xc1" + _disp(0x5000) + _HLT,
            Expected(0, {"mmu_pte_write": 1}),
            Expected(1, dirty=(5, *_COLD_WALK)),
            steps=(plan.Run(), plan.Collect(0)), tracker="bitmap",
        ),
    )  # fmt: skip


def _emulator() -> tuple[Example, ...]:
    """Rows 12, 13, 15, 20, 21."""
    present = _guest(_load1(0x7000) + _HLT, flags={7: 0x06, 0x30: 0x27})
    no_sse = _guest(b"\x0f\x29" + _disp(0x5000) + _HLT, cr4=CR4 & ~int(Cr4.OSFXSR), handlers=False)
    strings = [
        _kernel(
            f"rep-stosb-{count}", f"REP STOSB of {count} elements in a program of four instructions", 21,
            _load_immediate(7, 0x5000) + _load_immediate(1, count) + b"\xf3\xaa" + _HLT,
            Expected(0, {"insn_emulation": decodes, "mmu_pte_write": count}),
            tracker="bitmap",
        )
        for count, decodes in ((1, 5), (2000, 6), (2048, 6))
    ]  # fmt: skip
    return (
        *(
            _kernel(
                name, f"{name.upper()}, which the emulator lacks", 12, code + _HLT,
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
            "invlpg", "INVLPG", 20, b"\x0f\x01\x3c\x25" + (0x5000).to_bytes(4, "little") + _HLT,
            Expected(0, {"invlpg": 1}),
        ),
        *strings,
    )  # fmt: skip


def _translate() -> Example:
    return _kernel(
        "translate", "KVM_TRANSLATE of an address whose tables are cold", 14, _HLT,
        Expected(0, ring=_COLD_WALK),
        steps=(plan.Translate(0x5000),),
    )  # fmt: skip


def _batch() -> Example:
    """Row 16: the entries in order.  Whether the vCPU stops for the full ring on the way, and with how many
    entries beyond the limit of 192, depends on when host interrupts end a batch of emulation."""
    loop = b"\x89\x07\x90" + b"\x81\xc7\x00\x10\x00\x00" + b"\xff\xc9" + b"\x75\xf3"
    pages = 0x140
    code = _load_immediate(7, 0x50000) + _load_immediate(1, pages - 0x50) + loop + _HLT
    leaves = b"".join((frame * PAGE_SIZE | _WARM).to_bytes(8, "little") for frame in range(pages))
    base = _guest(code, upper=0x27)
    guest = CodeGuest(
        memories=(pages * PAGE_SIZE,),
        slots=(SlotPlan(0, 0, 0, 0, pages * PAGE_SIZE, _LOG),),
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
        guest=guest,
    )  # fmt: skip


def _clears() -> Example:
    pages = 100
    matrix = (
        (0, 100, ""), (0, 64, ""), (64, 36, ""), (0, 0, ""),
        *((first, count, "ClearRangeError") for first, count in (
            (1, 64), (64, 64), (0, 128), (64, 32), (128, 0), (100, 0), (0, 36),
        )),
    )  # fmt: skip
    guest = CodeGuest(
        memories=(pages * PAGE_SIZE,),
        slots=(SlotPlan(0, 0, 0, 0, pages * PAGE_SIZE, _LOG),),
        contents=(),
        vcpus=(VcpuPlan("real", 0, Registers(rip=CODE)),),
    )
    steps = tuple(plan.Clear(0, first, count) for first, count, _ in matrix)
    return _kernel(
        "clear-ranges", "KVM_CLEAR_DIRTY_LOG of a slot of 100 pages", 17, b"",
        *(Expected(number, refused=refused) for number, (_, _, refused) in enumerate(matrix)),
        guest=guest, steps=steps, tracker="manual",
    )  # fmt: skip


def _slots() -> Example:
    half = PAGES * PAGE_SIZE // 2
    code = _store1(half + 0x5000) + _HLT
    flags = dict.fromkeys(range(PAGES), _WARM)
    slots = (SlotPlan(0, 0, 0, 0, half, SlotFlags.NONE), SlotPlan(1, half, 0, half, half, _LOG))
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
        guest=_guest(code, flags=flags, upper=0x27, slots=slots),
        steps=(
            plan.Run(), plan.MoveSlot(1, 0x100000), plan.Collect(1), plan.Logging(1, False),
            plan.Logging(1, True), plan.Collect(1), plan.ReflagSlot(1, SlotFlags.READONLY),
            plan.AddSlot(SlotPlan(2, 0x100000, 0, 0, PAGE_SIZE)), plan.DeleteSlot(1), plan.Collect(0),
        ),
        tracker="bitmap",
    )  # fmt: skip


def _write_protect_toggle() -> Example:
    code = _HLT * 3 + b"".join(_store8(_IN_PML4 + 8 * n, 0) for n in range(3)) + _HLT
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
        SlotPlan(0, 0, 0, 0, first, _LOG),
        SlotPlan(1, first, 0, first, end - first, _LOG | SlotFlags.READONLY),
        SlotPlan(2, end, 0, end, PAGES * PAGE_SIZE - end, _LOG),
    )
    return _kernel(
        "read-only-tables", "tables in a READONLY slot, then a store into that slot", 22, b"",
        Expected(0, ring=(5,), exits=("Halted",)),
        Expected(1, ring=(), exits=("MmioWrite", "Halted")),
        guest=_guest(
            _store1(0x5000) + _HLT + _store1(0x18000) + _HLT, slots=slots
        ),
        steps=(plan.Run(), plan.Run(exits=2)),
    )  # fmt: skip


# --- 14.3, D to G --------------------------------------------------------------------------------


def _user(letter: str, name: str, title: str, steps: tuple[Step, ...], *expected: Expected) -> Example:
    """A row of 14.3 on shadow paging; gPTEs of the tables' own pages have A and D set."""
    guest = _guest(b"", cpl=3, flags={PD: _WARM, PT: _WARM})
    first = plan.Access("store8", 0x5000, 1)
    return Example(
        name,
        title,
        f"kvm-mmu.md 14.3, {letter}",
        Scenario(name, guest, (first, *steps), "ring", 256),
        (_FIRST_STORE, *expected),
        HostKind.SHADOW,
    )


_FIRST_STORE: Final = Expected(
    0,
    {"pf_taken": 2, "pf_fixed": 2, "mmu_cache_miss": 4, "pages_4k": 2, "pf_fast": 0},
    ring=(*_COLD_WALK, PT, 5),
)


def _shadow() -> tuple[Example, ...]:
    """In G the sheet worked out pf_fixed for the refetch; it is pf_spurious (hosts.md B.2), since the shadow
    page of the leaf table is there and only links to it are made again."""
    unused = 8 * 0x100
    return (
        _user("D", "first-store", "the first store of a guest at CPL 3, all tables cold", ()),
        _user(
            "E", "store-to-page-table", "a store to the page table that maps it",
            (plan.Access("store8", PT * PAGE_SIZE + unused, 2),),
            Expected(1, {"pf_taken": 1, "pf_fixed": 1, "mmu_unsync": 1, "mmu_pte_write": 0}, ring=(PT,)),
        ),
        _user(
            "F", "store-to-directory", "a MOV to the page directory",
            (plan.Access("store8", PD * PAGE_SIZE + unused, 2),),
            Expected(
                1,
                {"pf_taken": 1, "pf_emulate": 1, "mmu_pte_write": 1, "mmu_pde_zapped": 1, "pages_4k": 1},
                ring=(PD,),
            ),
        ),
        _user(
            "G", "add-to-directory", "an ADD to the page directory, which is tried natively first",
            (plan.Access("add8", PD * PAGE_SIZE + unused, 2),),
            Expected(
                1,
                {
                    "pf_taken": 3, "pf_emulate": 2, "pf_spurious": 1, "mmu_shadow_zapped": 1,
                    "mmu_cache_miss": 1, "mmu_pte_write": 1, "mmu_pde_zapped": 1,
                },
                ring=(PD,),
            ),
        ),
    )  # fmt: skip


# --- 14.3, A to C --------------------------------------------------------------------------------


def _nested(letter: str, name: str, title: str, host: HostKind, *expected: Expected, logs: bool) -> Example:
    """A store at CPL 0, run natively; where the slot does not log yet, once before and once after it does."""
    code = _store1(0x5000) + _HLT + b"\xeb\xf5"
    slots = (SlotPlan(0, 0, 0, 0, PAGES * PAGE_SIZE, _LOG if logs else SlotFlags.NONE),)
    steps: tuple[Step, ...] = () if logs else (plan.Run(), plan.Logging(0, True))
    scenario = Scenario(name, _guest(code, slots=slots), (*steps, plan.Run(), plan.Harvest()), "ring", 1024)
    return Example(name, title, f"kvm-mmu.md 14.3, {letter}", scenario, expected, host)


def _two_dimensions() -> tuple[Example, ...]:
    walked = (*_COLD_WALK, 5)
    return (
        _nested(
            "A", "nested-rearmed", "a store after logging was enabled, with nested paging", HostKind.NESTED,
            Expected(1, {"remote_tlb_flush_requests": 1}),
            Expected(2, {"pf_taken": 5, "pf_fixed": 5, "pf_fast": 5}, ring=walked),
            logs=False,
        ),
        _nested(
            "B", "nested-first-store", "the first store of a guest whose slot logs, with nested paging",
            HostKind.NESTED,
            Expected(
                0, {"pf_taken": 6, "pf_fixed": 6, "pf_fast": 0, "pages_4k": 6}, ring=(*_COLD_WALK, 1, 5)
            ),
            logs=True,
        ),
        _nested(
            "C", "pml-rearmed", "a store after logging was enabled, with PML", HostKind.PML,
            Expected(2, {"pf_taken": 0, "pf_fixed": 0, "pf_fast": 0}, ring=walked[::-1]),
            logs=False,
        ),
    )  # fmt: skip


EXAMPLES: Final[Mapping[str, Example]] = {
    example.name: example
    for example in (
        _real_mode(), *_one_page_stores(), *_writes_to_root(), *_emulator(), _translate(), _batch(),
        _clears(), _slots(), _write_protect_toggle(), _read_only(), *_two_dimensions(),
        *_shadow(),
    )
}  # fmt: skip
"""By name."""
