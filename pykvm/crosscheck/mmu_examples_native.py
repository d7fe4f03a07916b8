"""Worked examples of kvm-mmu.md, section 14.3: nested paging, and shadow paging at CPL 3 and 0."""

from __future__ import annotations

from typing import Final

from pykvm.crosscheck import steps as plan
from pykvm.crosscheck.mmu_example import Example, Expected, HostKind
from pykvm.crosscheck.mmu_example_guests import (
    COLD_WALK,
    HLT,
    LOG,
    PAGES,
    PD,
    PT,
    WARM,
    disp,
    store1,
    store8,
)
from pykvm.crosscheck.mmu_example_guests import guest as small_guest
from pykvm.crosscheck.scenario import Scenario
from pykvm.crosscheck.steps import SlotPlan, Step
from pykvm.machine import SlotFlags
from pykvm.memory import PAGE_SIZE


def _nested(letter: str, name: str, title: str, host: HostKind, *expected: Expected, logs: bool) -> Example:
    """A store at CPL 0, run natively; where the slot does not log yet, once before and once after it does."""
    code = store1(0x5000) + HLT + b"\xeb\xf5"
    slots = (SlotPlan(0, 0, 0, 0, PAGES * PAGE_SIZE, LOG if logs else SlotFlags.NONE),)
    steps: tuple[Step, ...] = () if logs else (plan.Run(), plan.Logging(0, True))
    scenario = Scenario(
        name, small_guest(code, slots=slots), (*steps, plan.Run(), plan.Harvest()), "ring", 1024
    )
    return Example(name, title, f"kvm-mmu.md 14.3, {letter}", scenario, expected, host)


def _two_dimensions() -> tuple[Example, ...]:
    walked = (*COLD_WALK, 5)
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
                0, {"pf_taken": 6, "pf_fixed": 6, "pf_fast": 0, "pages_4k": 6}, ring=(*COLD_WALK, 1, 5)
            ),
            logs=True,
        ),
        _nested(
            "C", "pml-rearmed", "a store after logging was enabled, with PML", HostKind.PML,
            Expected(2, {"pf_taken": 0, "pf_fixed": 0, "pf_fast": 0}, ring=walked[::-1]),
            logs=False,
        ),
    )  # fmt: skip


def _user(letter: str, name: str, title: str, steps: tuple[Step, ...], *expected: Expected) -> Example:
    """A row of 14.3 on shadow paging; gPTEs of the tables' own pages have A and D set.

    On other hosts the OUT makes the processor read the TSS, which is one fault more.
    """
    made = small_guest(b"", cpl=3, flags={PD: WARM, PT: WARM})
    first = plan.Access("store8", 0x5000, 1)
    return Example(
        name,
        title,
        f"kvm-mmu.md 14.3, {letter}",
        Scenario(name, made, (first, *steps), "ring", 256),
        (_FIRST_STORE, *expected),
        HostKind.EMULATES_KERNEL,
    )


_FIRST_STORE: Final = Expected(
    0,
    {"pf_taken": 2, "pf_fixed": 2, "mmu_cache_miss": 4, "pages_4k": 2, "pf_fast": 0},
    ring=(*COLD_WALK, PT, 5),
)


_TO_PAGE_TABLE: Final = {"pf_taken": 1, "pf_fixed": 1, "mmu_unsync": 1, "mmu_pte_write": 0}
_TO_DIRECTORY: Final = {
    "pf_taken": 1, "pf_emulate": 1, "mmu_pte_write": 1, "mmu_pde_zapped": 1, "pages_4k": 1,
}  # fmt: skip
_BY_ADD: Final = {
    "pf_taken": 3, "pf_emulate": 2, "pf_spurious": 1, "mmu_shadow_zapped": 1, "mmu_cache_miss": 1,
    "mmu_pte_write": 1, "mmu_pde_zapped": 1,
}  # fmt: skip
"""The sheet worked out pf_fixed for the refetch; it is pf_spurious (hosts.md B.2), since the shadow page of
the leaf table is there and only links to it are made again."""


def _shadow() -> tuple[Example, ...]:
    """D to G at CPL 3 on a host with a software backend, whose OUT the emulator carries out."""
    unused = 8 * 0x100
    return (
        _user("D", "first-store", "the first store of a guest at CPL 3, all tables cold", ()),
        _user(
            "E", "store-to-page-table", "a store to the page table that maps it",
            (plan.Access("store8", PT * PAGE_SIZE + unused, 2),),
            Expected(1, _TO_PAGE_TABLE, ring=(PT,)),
        ),
        _user(
            "F", "store-to-directory", "a MOV to the page directory",
            (plan.Access("store8", PD * PAGE_SIZE + unused, 2),),
            Expected(1, _TO_DIRECTORY, ring=(PD,)),
        ),
        _user(
            "G", "add-to-directory", "an ADD to the page directory, which is tried natively first",
            (plan.Access("add8", PD * PAGE_SIZE + unused, 2),),
            Expected(1, _BY_ADD, ring=(PD,)),
        ),
    )  # fmt: skip


def _native(letter: str, name: str, title: str, code: bytes, *expected: Expected) -> Example:
    """The same at CPL 0 where that runs natively: nothing but the stores and HLT."""
    flags = {PD: WARM, PT: WARM}
    made = small_guest(store8(0x5000, 1) + HLT + code + HLT, flags=flags)
    steps = (plan.Run(), plan.Run()) if code else (plan.Run(),)
    scenario = Scenario(name, made, steps, "ring", 256)
    source = f"kvm-mmu.md 14.3, {letter}"
    return Example(name, title, source, scenario, (_FIRST_STORE, *expected), HostKind.NATIVE_SHADOW)


def _native_shadow() -> tuple[Example, ...]:
    """D to G to the last counter, decodes by the emulator included."""
    unused = 8 * 0x100
    return (
        _native("D", "first-store-native", "the first store of a guest at CPL 0, all tables cold", b""),
        _native(
            "E", "store-to-page-table-native", "a store to the page table that maps it, at CPL 0",
            store8(PT * PAGE_SIZE + unused, 2),
            Expected(1, _TO_PAGE_TABLE | {"insn_emulation": 0}, ring=(PT,)),
        ),
        _native(
            "F", "store-to-directory-native", "a MOV to the page directory, at CPL 0",
            store8(PD * PAGE_SIZE + unused, 2),
            Expected(1, _TO_DIRECTORY | {"insn_emulation": 1}, ring=(PD,)),
        ),
        _native(
            "G", "add-to-directory-native", "an ADD to the page directory, at CPL 0",
            b"\x48\x83" + disp(PD * PAGE_SIZE + unused) + b"\x02",
            Expected(1, _BY_ADD | {"insn_emulation": 2}, ring=(PD,)),
        ),
    )  # fmt: skip


def native_examples() -> tuple[Example, ...]:
    """All of them, in order."""
    return (*_two_dimensions(), *_shadow(), *_native_shadow())
