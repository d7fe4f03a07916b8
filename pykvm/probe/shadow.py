"""Behaviours of the shadow MMU: what a guest sees when it edits its tables and asks KVM to follow."""

from __future__ import annotations

from typing import Final

from pykvm.machine import Kicked
from pykvm.memory import PAGE_SIZE
from pykvm.probe.bench import LOG, Answer, Bench, Needs, Probe
from pykvm.probe.finding import How
from pykvm.probe.guest import DATA, LEAF, PD, PML4, TABLE, WINDOW, WINDOW_PT, Moved, ProbeError, ProbeGuest
from pykvm.x86.bits import Cr4, Pte

_MOV_CR3: Final = b"\x0f\x22\xd8"
"""mov cr3, rax"""
_INVLPG: Final = b"\x0f\x01\x3f"
"""invlpg [rdi]"""
_STORE_BYTE: Final = b"\x88\x07"
"""mov [rdi], al"""
_LOAD_EACH: Final = b"\x48\x8b\x07\x48\x81\xc7\x00\x10\x00\x00\x48\xff\xc9\x75\xf1"
"""again: mov rax, [rdi]; add rdi, 4096; dec rcx; jnz again"""
_ALIAS_TABLES: Final = (10, 11)
"""Frames of tables, all of whose entries map the same page: 1024, more than the 1002 that KVM keeps."""
_ENTRIES: Final = 512
_NOWHERE: Final = 0x400_0000
_UNUSED: Final = 100
"""An entry of the window's table that nobody uses."""


def _edit(guest: ProbeGuest, index: int, value: int) -> None:
    """Let the guest write an entry of the window's table, which makes the table unsynchronised."""
    before = guest.counters()["mmu_unsync"]
    guest.store(WINDOW_PT * PAGE_SIZE + 8 * index, value)
    if guest.counters()["mmu_unsync"] <= before:
        raise ProbeError("the guest's page table did not become unsynchronised")


def _lazy_cr3_sync(bench: Bench) -> Answer:
    with bench.guest() as guest:
        guest.load(guest.window(0, DATA))
        guest.do(b"", cpl=0)
        guest.load(WINDOW)
        _edit(guest, _UNUSED, 0)
        guest.do(_MOV_CR3, cpl=0, rax=PML4 * PAGE_SIZE)
        left = guest.counters()["mmu_unsync"]
    return left > 0, How.PROBE, f"{left} tables unsynchronised right behind a MOV to CR3"


def _zaps_unsync_children(bench: Bench) -> Answer:
    with bench.guest() as guest:
        guest.load(guest.window(0, DATA))
        _edit(guest, _UNUSED, 0)
        with Moved(guest) as moved:
            # A byte within an entry: the directory's shadow page is zapped at once (kvm-mmu.md 10.6).
            guest.do(_STORE_BYTE, rdi=PD * PAGE_SIZE + 8 * _UNUSED + 1)
    zapped = moved["mmu_shadow_zapped"]
    if not zapped:
        raise ProbeError("the directory was not zapped")
    return (
        zapped > 1,
        How.PROBE,
        f"zapping a directory over an unsynchronised table zaps {zapped} shadow pages",
    )


def _sync_rebuilds_all(bench: Bench) -> Answer:
    with bench.guest(flags=LOG) as guest:
        guest.store(guest.window(0, DATA))
        _edit(guest, _UNUSED, 0)
        guest.dirty()
        guest.resync()
        again = DATA in guest.dirty()
    return again, How.PROBE, f"a sync reports an unchanged page {'again' if again else 'not again'}"


def _invlpg_refetches(bench: Bench) -> Answer:
    with bench.guest() as guest:
        address = guest.window(0, DATA)
        guest.load(address)
        guest.do(_INVLPG, cpl=0, rdi=_NOWHERE)
        guest.load(address)
        _edit(guest, 0, DATA + 1 << 12 | LEAF)
        guest.do(b"", cpl=0)
        with Moved(guest) as moved:
            guest.do(_INVLPG, cpl=0, rdi=address)
    dropped = -moved["pages_4k"]
    if dropped not in (0, 1):
        raise ProbeError(f"pages_4k fell by {dropped} at an INVLPG")
    return dropped == 0, How.PROBE, f"INVLPG of a page that was mapped elsewhere drops {dropped} mappings"


def _smep_in_role(bench: Bench) -> Answer:
    with bench.guest() as guest:
        guest.do(b"")
        guest.change(cr4=guest.vcpu.get_special_registers().cr4 | Cr4.SMEP)
        with Moved(guest) as moved:
            guest.do(b"")
    made = moved["mmu_cache_miss"]
    return made > 0, How.PROBE, f"CR4.SMEP set: {made} further shadow pages"


def _flushes_on_ad_clear(bench: Bench) -> Answer:
    with bench.guest() as guest:
        guest.store(guest.window(0, DATA))
        _edit(guest, 0, DATA << 12 | LEAF | Pte.NX)
        with Moved(guest) as moved:
            guest.resync()
    # One flush is for protecting the table that is synchronised; the other one is what is looked for.
    requests = moved["remote_tlb_flush_requests"]
    return requests > 1, How.PROBE, f"a sync that remakes an entry asks for {requests} flushes"


def _dummy_root(bench: Bench) -> Answer:
    with bench.guest() as guest:
        guest.do(b"")
        guest.change(cr3=_NOWHERE)
        with Moved(guest) as moved:
            reason = guest.resume()
    if isinstance(reason, Kicked):
        raise ProbeError("the guest did not stop with CR3 outside of the slots")
    faults = moved["pf_guest"]
    return (
        faults > 0,
        How.PROBE,
        f"CR3 without a slot: {faults} page faults of the guest before it shuts down",
    )


def _flushes_first_root(bench: Bench) -> Answer:
    flushes = bench.first_load["tlb_flush"]
    return flushes > 0, How.PROBE, f"tlb_flush moves by {flushes} until a first load was done"


def _rmap_recycle_threshold(bench: Bench) -> Answer:
    with bench.guest() as guest:
        for number, table in enumerate(_ALIAS_TABLES):
            guest.set_entry(PD, 2 + number, table << 12 | TABLE)
            for index in range(_ENTRIES):
                guest.set_entry(table, index, DATA << 12 | LEAF)
        with Moved(guest) as moved:
            guest.do(_LOAD_EACH, rdi=2 * WINDOW, rcx=_ENTRIES * len(_ALIAS_TABLES))
        longest = guest.counters()["max_mmu_rmap_size"]
    if moved["pages_4k"] >= _ENTRIES * len(_ALIAS_TABLES):
        raise ProbeError(f"{moved['pages_4k']} mappings of a page are kept")
    return longest - 1, How.PROBE, f"no page has more than {longest} mappings while it gets one more"


SHADOW_PROBES: Final = (
    Probe("lazy_cr3_sync", Needs.SHADOW, _lazy_cr3_sync),
    Probe("zaps_unsync_children", Needs.SHADOW, _zaps_unsync_children),
    Probe("rmap_recycle_threshold", Needs.SHADOW, _rmap_recycle_threshold),
    Probe("sync_rebuilds_all", Needs.SHADOW, _sync_rebuilds_all),
    Probe("invlpg_refetches", Needs.SHADOW, _invlpg_refetches),
    Probe("smep_in_role", Needs.SHADOW, _smep_in_role),
    Probe("flushes_on_ad_clear", Needs.SHADOW, _flushes_on_ad_clear),
    Probe("dummy_root", Needs.SHADOW, _dummy_root),
    Probe("flushes_first_root", Needs.SHADOW, _flushes_first_root),
)
