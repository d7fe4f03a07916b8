"""How guest code runs, and what translates for it: the behaviours that decide which kind of host this is."""

from __future__ import annotations

from math import ceil, log2
from typing import Final

from pykvm.errors import RingSizeError
from pykvm.machine import InternalError, MmioRead, MmioWrite, Shutdown, SlotFlags
from pykvm.memory import PAGE_SIZE
from pykvm.probe.bench import LOG, Answer, Bench, Needs, Probe, counts_of_a_new_slot, from_switch
from pykvm.probe.finding import How
from pykvm.probe.guest import DATA, HOLE, LOAD, PD, PDPT, PML4, PT, TSS, WINDOW_PT, Moved, ProbeError
from pykvm.profiles import Execution, Paging
from pykvm.x86.bits import Cr4, Pte
from pykvm.x86.cpuid import find, has_1g_pages, physical_address_bits

_COUNT_DOWN: Final = b"\xff\xc9\x75\xfc"
"""again: dec ecx; jnz again"""
_FLOAT_LOAD: Final = b"\xd9\x07"
"""fld dword [rdi], which KVM's emulator does not know"""
_AVX_STORE: Final = b"\xc5\xfe\x7f\x07"
"""vmovdqu [rdi], ymm0"""
_ADD: Final = b"\x48\x01\x07"
"""add [rdi], rax"""
_FEW, _BATCHES = 200, 5
_CAP_RING, _CAP_SPACES, _CAP_WITH_BITMAP = 192, 118, 225
_AVX: Final = 1 << 28
"""CPUID 1, ECX."""


def _emulates_all_but_user(bench: Bench) -> Answer:
    with bench.guest() as guest:
        guest.do(b"")
        counts = []
        for cpl in (3, 0):
            with Moved(guest) as moved:
                guest.do(_COUNT_DOWN, cpl=cpl, rcx=_FEW)
            counts.append(moved["insn_emulation"])
    if counts[0] >= _FEW:
        raise ProbeError("not even code at CPL 3 runs on the processor")
    emulated = counts[1] >= _FEW
    return (
        emulated,
        How.PROBE,
        f"{counts[1]} instructions of {2 * _FEW} emulated at CPL 0, {counts[0]} at CPL 3",
    )


def _emulation_batch(bench: Bench) -> Answer:
    named = bench.evidence.parameter("kvm_pvm.pvm_emul_batch")
    if named is not None:
        return int(named[1]), How.PARAMETER, "=".join(named)
    with bench.guest() as guest:
        guest.do(b"", cpl=0)
        instructions, exits = _BATCHES * 1024, []
        for _ in range(5):
            with Moved(guest) as moved:
                guest.do(_COUNT_DOWN, cpl=0, rcx=instructions // 2)
            exits.append(moved["exits"])
    if min(exits) < 2:
        raise ProbeError("batches do not count as exits here")
    # One exit is the port's.  An interrupt of the host may end a batch early and so add one, but nothing
    # saves one: the next power of two is what is meant.
    batch = 1 << ceil(log2(instructions / (min(exits) - 1)))
    return batch, How.PROBE, f"{instructions} instructions in {min(exits)} exits"


def _paging(bench: Bench) -> Answer:
    with bench.guest() as guest:
        window = guest.window(0, DATA)
        with Moved(guest) as first:
            guest.load(window)
        with Moved(guest) as table:
            guest.store(WINDOW_PT * PAGE_SIZE + 8 * 100, 0)
    bench.first_load = {name: first[name] for name in ("mmu_cache_miss", "tlb_flush")}
    if table["mmu_unsync"] or table["mmu_pte_write"]:
        return Paging.SHADOW, How.PROBE, "a guest's write to its page table is seen by KVM (mmu_unsync)"
    for kind, name in ((Paging.NPT, "kvm_amd.npt"), (Paging.EPT, "kvm_intel.ept")):
        found = bench.evidence.switch(name)
        if found is not None and found[1]:
            return kind, How.PARAMETER, f"{name}=Y, and no table of the guest is shadowed"
    vendor = {"amd": Paging.NPT, "intel": Paging.EPT}.get(bench.evidence.vendor)
    if vendor is None:
        raise ProbeError("no table of the guest is shadowed, and nothing says whose processor it is")
    return vendor, How.BUILD, f"the processor is {bench.evidence.vendor}'s; no table is shadowed"


def _tdp_mmu(bench: Bench) -> Answer:
    made = bench.first_load["mmu_cache_miss"]
    return made == 0, How.PROBE, f"{made} pages of the older MMU made by a first load (mmu_cache_miss)"


def _ept_ad(bench: Bench) -> Answer:
    with bench.guest(flags=LOG) as guest:
        guest.load(DATA * PAGE_SIZE)
        guest.dirty()
        guest.load(DATA * PAGE_SIZE)
        tables = guest.dirty() & {PML4, PDPT, PD, PT}
    return bool(tables), How.PROBE, f"a load with all A bits set makes {len(tables)} tables dirty"


def _pml(bench: Bench) -> Answer:
    if not bench.capability(_CAP_RING):
        return from_switch(bench, "kvm_intel.pml")
    with bench.system.create_machine() as machine:
        try:
            machine.enable_dirty_ring(256)
        except RingSizeError:
            return True, How.PROBE, "a ring of 256 entries is too small: 512 more are kept in reserve"
    return False, How.PROBE, "a ring of 256 entries is enough"


def _pages_1g(bench: Bench) -> Answer:
    paging = bench.value("paging")
    if paging is Paging.NPT:
        return True, How.BUILD, "NPT has leaves of 1 GiB"
    if paging is Paging.EPT:
        flag = "vmx:ept_1gb" in bench.evidence.flags
        return flag, How.CAPABILITY, f"the processor {'has' if flag else 'lacks'} the VMX flag ept_1gb"
    with bench.system.create_machine() as machine:
        offered = has_1g_pages(machine.supported_cpuid)
    return offered, How.CAPABILITY, f"CPUID PDPE1GB is {'' if offered else 'not '}offered to guests"


def _address_spaces(bench: Bench) -> Answer:
    answer = bench.capability(_CAP_SPACES)
    return max(answer, 1), How.CAPABILITY, f"KVM_CAP_MULTI_ADDRESS_SPACE is {answer}"


def _ring_with_bitmap(bench: Bench) -> Answer:
    answer = bench.capability(_CAP_WITH_BITMAP)
    return bool(answer), How.CAPABILITY, f"KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP is {answer}"


def _physical_bits(bench: Bench) -> Answer:
    with bench.system.create_machine() as machine:
        bits = physical_address_bits(machine.supported_cpuid)
    return bits, How.CAPABILITY, f"CPUID 80000008h offers {bits}"


def _mmio_caching(bench: Bench) -> Answer:
    with bench.guest() as guest:
        address = guest.window(0, HOLE)
        with Moved(guest) as moved:
            if not isinstance(guest.run(LOAD, rdi=address), MmioRead):
                raise ProbeError("a load without a slot is no MMIO exit")
            guest.vcpu.reply(bytes(8))
    made = moved["pf_mmio_spte_created"]
    return made > 0, How.PROBE, f"pf_mmio_spte_created moves by {made} for a load without a slot"


def _reads_io_bitmap(bench: Bench) -> Answer:
    with bench.guest() as guest:
        guest.set_entry(PT, TSS, guest.entry(PT, TSS) & ~int(Pte.A))
        guest.do(b"")
        read = bool(guest.entry(PT, TSS) & Pte.A)
    return (
        read,
        How.PROBE,
        f"OUT at CPL 3 with IOPL 3 {'sets' if read else 'leaves'} the A bit of the TSS's page",
    )


def _exit_per_emulated_user_failure(bench: Bench) -> Answer:
    with bench.guest() as guest:
        reason = guest.run(_FLOAT_LOAD, rdi=guest.window(0, HOLE))
    if isinstance(reason, InternalError):
        return True, How.PROBE, "FLD without a slot at CPL 3: KVM_EXIT_INTERNAL_ERROR"
    if isinstance(reason, Shutdown):
        return False, How.PROBE, "FLD without a slot at CPL 3: #UD for the guest"
    raise ProbeError(f"FLD without a slot ended with {reason}")


def _emulates_avx(bench: Bench) -> Answer:
    with bench.guest() as guest:
        leaf = find(guest.vm.supported_cpuid, 1)
        if leaf is None or not leaf.ecx & _AVX:
            raise ProbeError("guests have no AVX here")
        address = guest.window(0, HOLE)
        guest.do(b"")
        guest.change(cr4=guest.vcpu.get_special_registers().cr4 | Cr4.OSXSAVE)
        set_xcrs = getattr(guest.vcpu, "set_xcrs", None)
        if set_xcrs is None:
            raise ProbeError("XCR0 cannot be set here")
        set_xcrs({0: 7})
        reason = guest.run(_AVX_STORE, rdi=address)
    if isinstance(reason, MmioWrite):
        return True, How.PROBE, "VMOVDQU without a slot: an MMIO exit"
    if isinstance(reason, (InternalError, Shutdown)):
        return False, How.PROBE, f"VMOVDQU without a slot is not emulated ({type(reason).__name__})"
    raise ProbeError(f"VMOVDQU without a slot ended with {reason}")


def _retries_always(bench: Bench) -> Answer:
    with bench.guest() as guest:
        guest.vm.create_slot(
            guest.memory,
            HOLE * PAGE_SIZE,
            size=PAGE_SIZE,
            memory_offset=DATA * PAGE_SIZE,
            flags=SlotFlags.READONLY,
        )
        address = guest.window(0, HOLE)
        guest.load(address)
        with Moved(guest) as moved:
            reason = guest.run(_ADD, rdi=address, rax=1)
    if not isinstance(reason, MmioWrite):
        raise ProbeError(f"ADD to a read-only slot ended with {reason}")
    faults = moved["pf_emulate"]
    return faults > 1, How.PROBE, f"ADD to a read-only slot takes {faults} faults that ask for emulation"


def _shadow_pages_statistic(bench: Bench) -> Answer:
    with bench.system.create_machine() as machine:
        has = "mmu_shadow_pages" in machine.statistics()
    return has, How.CAPABILITY, f"the statistic mmu_shadow_pages is {'there' if has else 'missing'}"


def _external_write_tracking(bench: Bench) -> Answer:
    has = bench.evidence.external_write_tracking
    if has is not None:
        return has, How.BUILD, f"KVM has {'' if has else 'no '}functions for external users of write tracking"
    if bench.value("paging") is Paging.SHADOW:
        raise ProbeError("nothing says how KVM was built, and with shadow paging it makes no difference")
    has = counts_of_a_new_slot(bench)
    return has, How.BUILD, f"a slot has {'' if has else 'no '}write-track counts from the start"


def _nx_huge_pages(bench: Bench) -> Answer:
    return from_switch(bench, "kvm.nx_huge_pages")


def _eager_page_split(bench: Bench) -> Answer:
    return from_switch(bench, "kvm.eager_page_split")


def _execution(bench: Bench) -> Answer:
    named = bench.evidence.emulator
    for emulator in (Execution.TCG, Execution.BOCHS):
        if named.startswith(emulator.value):
            return emulator, How.CAPABILITY, f"the host is emulated by {named}"
    return Execution.HARDWARE, How.CAPABILITY, "nothing says that the host is emulated"


def _tdp_root_level(bench: Bench) -> Answer:
    flags = bench.evidence.flags
    if bench.value("paging") is Paging.NPT:
        flag = "la57" in flags
        return 5 if flag else 4, How.CAPABILITY, f"the host {'runs' if flag else 'does not run'} with LA57"
    return 4, How.ASSUMED, "shows only in counters of the older MMU"


KIND_PROBES: Final = (
    Probe("emulates_all_but_user", Needs.ANY, _emulates_all_but_user),
    Probe("emulation_batch", Needs.EMULATED, _emulation_batch),
    Probe("paging", Needs.ANY, _paging),
    Probe("tdp_mmu", Needs.TDP, _tdp_mmu),
    Probe("ept_ad", Needs.EPT, _ept_ad),
    Probe("pml", Needs.ANY, _pml),
)
"""What decides the kind, in this order."""

OTHER_PROBES: Final = (
    Probe("pages_1g", Needs.ANY, _pages_1g),
    Probe("address_spaces", Needs.ANY, _address_spaces),
    Probe("mmio_caching", Needs.ANY, _mmio_caching),
    Probe("nx_huge_pages", Needs.ANY, _nx_huge_pages),
    Probe("eager_page_split", Needs.ANY, _eager_page_split),
    Probe("physical_bits", Needs.ANY, _physical_bits),
    Probe("execution", Needs.ANY, _execution),
    Probe("tdp_root_level", Needs.TDP, _tdp_root_level),
    Probe("reads_io_bitmap", Needs.ANY, _reads_io_bitmap),
    Probe("exit_per_emulated_user_failure", Needs.ANY, _exit_per_emulated_user_failure),
    Probe("retries_always", Needs.ANY, _retries_always),
    Probe("emulates_avx", Needs.ANY, _emulates_avx),
    Probe("ring_with_bitmap", Needs.ANY, _ring_with_bitmap),
    Probe("external_write_tracking", Needs.ANY, _external_write_tracking),
    Probe("has_shadow_pages_statistic", Needs.ANY, _shadow_pages_statistic),
)
