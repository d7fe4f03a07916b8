"""What KVM does that looks like a bug, or that a virtual machine monitor can trip over, as small scenarios.

docs/kvm-findings.md tells each in words, by its name here; ``pykvm explain NAME`` shows one.  Expected values
come from the reference sheets and from measurements on real KVM, those of ``architecture`` from the SDM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from pykvm.crosscheck import steps as plan
from pykvm.crosscheck.mmu_example import Example, Expected, HostKind
from pykvm.crosscheck.mmu_example_guests import (
    COLD_WALK,
    HLT,
    LOG,
    PAGES,
    PD,
    PDPT,
    PML4,
    PRESET,
    PT,
    SYSTEM,
    WARM,
    load1,
    load_immediate,
    store1,
    store8,
)
from pykvm.crosscheck.mmu_example_guests import guest as small_guest
from pykvm.crosscheck.mmu_examples import EXAMPLES
from pykvm.crosscheck.scenario import CodeGuest, Contents, Scenario
from pykvm.crosscheck.snippets import FETCHED, PORT
from pykvm.crosscheck.steps import SlotPlan, Step
from pykvm.memory import PAGE_SIZE

HANDLER_PORT: Final = 0x40
"""The handler of vector n writes AL to this port + n."""
PAGE_FAULT: Final = HANDLER_PORT + 14
READ_ONLY: Final = 0x65
"""Flags of a leaf entry without W, A and D set."""
BY_SECOND: Final = 1 << 21
"""Linear addresses from here on go through the second entry of the page directory, to the same page table."""
BY_THIRD: Final = 2 << 21
STACK: Final = SYSTEM.start // PAGE_SIZE
"""Frame of the stack that exceptions of user code get: the first page of the system tables."""


@dataclass(frozen=True, slots=True)
class Finding(Example):
    """``profiles``: the hosts whose models show it, a kind and an era each.  ``architecture``: what the SDM
    has in the same steps, where that is something else; the reference machine without a profile shows it.
    """

    profiles: tuple[tuple[str, str], ...] = ()
    architecture: tuple[Expected, ...] = ()


HERE: Final = (("pvm-shadow", "6.18"),)
SHADOW: Final = (
    *HERE,
    ("amd-shadow", "6.1"),
    ("amd-shadow", "6.12"),
    ("amd-shadow", "7.2"),
    ("intel-shadow", "6.1"),
)
"""Hosts with shadow paging on which real KVM showed it."""


def _flags(**frames: int) -> dict[int, int]:
    """A and D set in all leaf entries, but for those given, so that only what the finding is about shows.

    Of handlers and system tables only A is set: processors read them, which must not mark them.
    """
    preset = dict.fromkeys(range(PAGES), WARM) | dict.fromkeys(PRESET, 0x27)
    return preset | {int(name[1:], 16): flags for name, flags in frames.items()}


def _user(flags: Mapping[int, int] | None = None, more: Sequence[Contents] = ()) -> CodeGuest:
    """A guest at CPL 3 for the snippets of Access steps; all entries of its upper tables have A set."""
    made = small_guest(b"", cpl=3, flags=_flags() if flags is None else flags, upper=0x27)
    return replace(made, contents=(*made.contents, *more))


def _entry(table: int, index: int, value: int) -> Contents:
    return Contents(0, table * PAGE_SIZE + 8 * index, value.to_bytes(8, "little"))


def _finding(
    name: str,
    title: str,
    source: str,
    guest: CodeGuest,
    steps: tuple[Step, ...],
    expected: tuple[Expected, ...],
    *,
    architecture: tuple[Expected, ...] = (),
    tracker: str = "bitmap",
    ring: int = 256,
    host: HostKind = HostKind.EMULATES_KERNEL,
    profiles: tuple[tuple[str, str], ...] = HERE,
) -> Finding:
    scenario = Scenario(name, guest, steps, tracker, ring)
    return Finding(name, title, source, scenario, expected, host, profiles, architecture)


# --- a page that no log names --------------------------------------------------------------------


def _overflow() -> Finding:
    """An interrupt of the host may end the batch right behind the REP: the vCPU then stops for the full ring
    and not at HLT, and the entry is gone all the same.
    """
    code = store1(0x5000) + b"\xb0\x5a" + load_immediate(7, 0x6000) + load_immediate(1, 300)
    return _finding(
        "ring-overflow",
        "300 emulated stores between two looks at a ring of 256 entries",
        "hosts.md D.7, kvm-mmu.md 12.6",
        small_guest(code + b"\xf3\xaa" + HLT, flags=_flags(), upper=0x27),
        (plan.Run(), plan.Harvest()),
        (
            Expected(0, ring=(6,) * 256, changed=(5, 6)),
            Expected(1, refused="RingOverflowError", lost=(5,)),
        ),
        tracker="ring",
    )


# --- tables that the shadow does not follow ------------------------------------------------------


def _straddling() -> Finding:
    """The store ends in the second entry, whose low 16 bits become 0: not present."""
    last = PD * PAGE_SIZE + 6
    load = plan.Access("load1", BY_SECOND + 0x5000)
    return _finding(
        "straddling-store",
        "a store of 4 bytes that straddles two entries of a page directory",
        "hosts.md B.2, kvm-mmu.md 10.6",
        _user(more=(_entry(PD, 1, PT * PAGE_SIZE | 0x27), Contents(0, 0x5000, b"\x55"))),
        (
            load,
            plan.Access("store4", last),
            plan.Access("load_cr3", 0, PML4 * PAGE_SIZE, cpl=0),
            load,
            plan.Access("store8", PD * PAGE_SIZE + 8),
            load,
        ),
        (
            Expected(0, outs=((PORT, 0x55),)),
            Expected(1, {"mmu_pte_write": 1, "mmu_pde_zapped": 1, "mmu_flooded": 0}, changed=(PD,)),
            Expected(3, outs=((PORT, 0x55),)),
            Expected(5, outs=((PAGE_FAULT, 0),)),
        ),
        architecture=(Expected(3, outs=((PAGE_FAULT, 0),)), Expected(5, outs=((PAGE_FAULT, 0),))),
        profiles=SHADOW,
    )


def _stored_descriptor_table() -> Finding:
    """SGDT to the two last bytes of an entry that maps nothing, and over the next one: limit, then base."""
    load = plan.Access("load1", BY_THIRD + 0x5000)
    last = PD * PAGE_SIZE + 8 + 6
    sgdt = b"\x0f\x01\x06" + FETCHED
    return _finding(
        "table-entry-by-sgdt",
        "SGDT writes over an entry of a page directory",
        "kvm-mmu.md 5 (write_std), hosts.md C.2",
        _user(
            more=(
                _entry(PD, 2, PT * PAGE_SIZE | 0x27),
                Contents(0, 0x5000, b"\x55"),
                Contents(0, 0x8000, sgdt),
            )
        ),
        (
            load,
            plan.Access("fetch", 0x8000, second=last),
            plan.Access("load_cr3", 0, PML4 * PAGE_SIZE, cpl=0),
            load,
            plan.Collect(0),
            plan.Access("store8", PD * PAGE_SIZE + 16),
            load,
        ),
        (
            Expected(0, outs=((PORT, 0x55),)),
            Expected(1, {"mmu_pte_write": 0, "mmu_pde_zapped": 0, "mmu_flooded": 0}, changed=(PD,)),
            Expected(3, outs=((PORT, 0x55),)),
            Expected(4, lost=()),
            Expected(6, outs=((PAGE_FAULT, 0),)),
        ),
        architecture=(Expected(3, outs=((PAGE_FAULT, 0),)), Expected(6, outs=((PAGE_FAULT, 0),))),
    )


def _stale_until_flush() -> Finding:
    load = plan.Access("load1", 0x5000)
    return _finding(
        "stale-until-flush",
        "a page table's entry changes from one page to another, then a flush",
        "hosts.md B.1, kvm-mmu.md 10.5; SDM vol. 3, 4.10.4.3",
        _user(more=(Contents(0, 0x5000, b"\x55"), Contents(0, 0x7000, b"\x77"))),
        (
            load,
            plan.Access("store8", PT * PAGE_SIZE + 5 * 8, 0x7000 | WARM),
            load,
            plan.Access("load_cr3", 0, PML4 * PAGE_SIZE, cpl=0),
            load,
        ),
        (
            Expected(0, outs=((PORT, 0x55),)),
            Expected(1, {"mmu_unsync": 1, "pf_fixed": 1, "mmu_pte_write": 0}),
            Expected(2, {"pf_taken": 0}, outs=((PORT, 0x55),)),
            Expected(4, outs=((PORT, 0x77),)),
        ),
        profiles=SHADOW,
    )


# --- pages that are reported and were not written ------------------------------------------------


def _read() -> Finding:
    flags = _flags(f1=0x27)
    return _finding(
        "read-marks",
        "a load from a page whose entry has D set",
        "hosts.md B.0 and B.8, kvm-mmu.md 5.1",
        _user(flags),
        (plan.Access("load8", 0x5000), plan.Collect(0), plan.Access("load8", 0x5000), plan.Collect(0)),
        (Expected(0, unchanged=(5,)), Expected(1, dirty=(5,)), Expected(3, dirty=())),
        architecture=(Expected(1, dirty=()), Expected(3, dirty=())),
        profiles=SHADOW,
    )


def _failing_compare() -> Finding:
    flags = _flags(f1=0x27, f5=0x27)
    return _finding(
        "failing-cmpxchg-user",
        "a LOCK CMPXCHG at CPL 3 whose comparison fails",
        "hosts.md E; SDM vol. 2, CMPXCHG",
        _user(flags),
        (plan.Access("lock_cmpxchg8", 0x5000, 1), plan.Collect(0)),
        (Expected(0, unchanged=(5,)), Expected(1, dirty=(5, PT))),
        profiles=SHADOW,
    )


def _crossing(cpl: int) -> Finding:
    """The entry of the first page has D clear: it is set, too."""
    flags = _flags(f1=0x27, f5=0x27, f6=READ_ONLY)
    store = plan.Access("store8", 0x5FFC, 0x2222222222222222, cpl=cpl)
    written, kept = ((5,), ()) if cpl == 0 else ((), (5,))
    faults = Expected(0, outs=((PAGE_FAULT, 0x22),), changed=written, unchanged=kept)
    return _finding(
        "crossing-store-faults" + ("-emulated" if cpl == 0 else ""),
        f"a store at CPL {cpl} that crosses into a page that may not be written",
        "hosts.md E",
        _user(flags),
        (store, plan.Collect(0)),
        (faults, Expected(1, dirty=(5, PT, STACK))),
        architecture=(
            Expected(0, outs=((PAGE_FAULT, 0x22),), unchanged=(5,)),
            Expected(1, unreported=(5,)),
        ),
        profiles=SHADOW if cpl else HERE,
    )


def _aliases() -> Finding:
    made = _user(_flags(f1=0x27), (_entry(PT, PAGES, PAGES * PAGE_SIZE | WARM),))
    alias = SlotPlan(1, PAGES * PAGE_SIZE, 0, 0x5000, PAGE_SIZE, LOG)
    return _finding(
        "aliased-slots",
        "a store through one of two slots that show the same memory",
        "hosts.md D.1",
        replace(made, slots=(*made.slots, alias)),
        (plan.Access("store8", PAGES * PAGE_SIZE, 1), plan.Collect(0), plan.Collect(1)),
        (Expected(0, changed=(5,)), Expected(1, dirty=()), Expected(2, dirty=(PAGES,))),
        profiles=SHADOW,
    )


def _refused_move() -> Finding:
    """Slot 1 is somewhere else, and may not begin at 2^52: no MMU maps that gfn."""
    other = SlotPlan(1, 1 << 20, 0, 0x30000, PAGE_SIZE)
    made = _user(_flags(f1=0x27))
    load = plan.Access("load8", 0x5000)
    return _finding(
        "refused-move",
        "a slot that is not moved where it cannot be",
        "virt/kvm/kvm_main.c, kvm_set_memslot; hosts.md D.1",
        replace(made, slots=(*made.slots, other)),
        (load, load, plan.MoveSlot(1, 1 << 52), load),
        (
            Expected(0, {"mmu_cache_miss": 4, "pages_4k": 2, "pf_taken": 2}),
            Expected(1, {"pf_taken": 0}),
            Expected(2, {"mmu_shadow_zapped": 4, "pages_4k": -2}, refused="SlotError"),
            Expected(3, {"mmu_cache_miss": 4, "pages_4k": 2, "pf_taken": 2}),
        ),
    )


def _copied_root() -> Finding:
    preset = {f"f{frame:x}": 0x27 for frame in (1, *range(0x28, 0x30))}
    made = _user(_flags(**preset), (_entry(PML4, 1, PDPT * PAGE_SIZE | 0x27),))
    tables = replace(SYSTEM, pages=16)
    again, other = (plan.Access("load8", (1 << 39) + 0x5000, vcpu=vcpu) for vcpu in (0, 1))
    return _finding(
        "copied-root",
        "an entry of a shared root that another vCPU's fault made",
        "measured on 6.18 with kvm_pvm",
        replace(made, vcpus=made.vcpus * 2, tables=tables),
        (plan.Access("load8", 0x5000, vcpu=1), plan.Access("load8", 0x5000), again, other, other),
        (
            Expected(1, {"pf_taken": 0}),
            Expected(2, {"pf_taken": 1, "pf_spurious": 1, "mmu_cache_miss": 0}),
            Expected(3, {"vcpu1.pf_taken": 1, "vcpu1.pf_spurious": 1, "mmu_cache_miss": 0}),
            Expected(4, {"vcpu1.pf_taken": 0}),
        ),
    )


# --- other hosts ---------------------------------------------------------------------------------


def _nested_reads(name: str, title: str, host: HostKind, profiles: tuple[tuple[str, str], ...]) -> Finding:
    walked = COLD_WALK if host is HostKind.NESTED else COLD_WALK[::-1]
    faults = {"pf_taken": 4, "pf_fast": 4} if host is HostKind.NESTED else {"pf_taken": 0, "pf_fast": 0}
    again = Expected(2, faults, ring=walked, unchanged=(*COLD_WALK, 5))
    first = (Expected(0, ring=(*COLD_WALK, 1, 5), unchanged=(*COLD_WALK, 5)),)
    return _finding(
        name,
        title,
        "hosts.md B.9, kvm-mmu.md 5 and 13.4",
        small_guest(load1(0x5000) + HLT + b"\xeb\xf6", flags=_flags(), upper=0x27),
        (plan.Run(), plan.Harvest(), plan.Run(), plan.Harvest(), plan.Run(), plan.Harvest()),
        (*(first if host is HostKind.NESTED else ()), again, replace(again, step=4)),
        architecture=(Expected(1, dirty=()), Expected(3, dirty=()), Expected(5, dirty=())),
        tracker="ring",
        ring=1024,
        host=host,
        profiles=profiles,
    )


_FLUSH_ALL: Final = b"\x0f\x20\xe0\x48\x35\x80\x00\x00\x00\x0f\x22\xe0"
"""mov rax, cr4; xor rax, 80h; mov cr4, rax: CR4.PGE changes, which flushes everything."""


def _sync_marks() -> Finding:
    code = store1(0x5000) + store1(0x6000) + HLT
    code += store8(PT * PAGE_SIZE + 0x800, 2) + HLT + _FLUSH_ALL + HLT
    return _finding(
        "sync-marks-again",
        "a guest changes one entry of a page table and flushes by CR4.PGE",
        "kvm-mmu.md 5, hosts.md B.11",
        small_guest(code, flags=_flags(f1=0x27), upper=0x27),
        (plan.Run(), plan.Harvest(), plan.Run(), plan.Run(), plan.Harvest()),
        (
            Expected(1, dirty=(5, 6)),
            Expected(2, {"mmu_unsync": 1}, ring=(PT,), changed=(PT,), unchanged=(5, 6)),
            Expected(3, {"mmu_unsync": -1}, ring=(5, 6), unchanged=(5, 6)),
            Expected(4, dirty=(5, 6, PT)),
        ),
        architecture=(Expected(1, dirty=(5, 6)), Expected(4, dirty=(PT,))),
        tracker="ring",
        ring=1024,
        host=HostKind.NATIVE_SHADOW,
        profiles=(("amd-shadow", "6.1"), ("intel-shadow", "6.1")),
    )


def _all() -> tuple[Finding, ...]:
    return (
        _overflow(), _straddling(), _stored_descriptor_table(), _stale_until_flush(),
        _read(), _failing_compare(), _crossing(3), _crossing(0), _aliases(), _refused_move(), _copied_root(),
        _nested_reads(
            "nested-reads-mark", "a load after each harvest, with nested paging", HostKind.NESTED,
            (("amd-npt", "6.12"), ("amd-npt", "7.2"), ("intel-ept-nopml", "6.12")),
        ),
        _nested_reads(
            "pml-reads-mark", "a load after each harvest, with PML", HostKind.PML, (("intel-ept", "6.12"),)
        ),
        _sync_marks(),
    )  # fmt: skip


FINDINGS: Final[Mapping[str, Finding]] = {finding.name: finding for finding in _all()}
"""By name."""
NAMED: Final[Mapping[str, Example]] = {**EXAMPLES, **FINDINGS}
"""The worked examples and the findings, which commands know by name."""
