"""A tiny long-mode guest from hand-assembled bytes, for tests of KVM and of the binding.

It knows nothing of ``pykvm.guest``, so that the two check each other.  One VM with one slot, identity
mapped with 4 KiB pages whose entries have A and D set already: a walk then changes no table, and the only
pages that a store dirties are those it names.  Code runs at CPL 3 or CPL 0, one snippet per vCPU and call.

Pages: 1 code, 2 PML4, 3 PDPT, 4 PD, 5 TSS, 6 GDT (empty), 7 stack, 8 to 15 page tables, 16 on data.

What the guest itself needs is left out of the log: with nested paging the processor's walks count as writes
of the tables, and fetching code may report its page (docs/reference/hosts.md B.9).  So the first 16 pages
of the memory are seen by the guest through a second slot, ``system``, from frame ``SYSTEM`` on and without
logging; at their own frames nobody uses them.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pykvm.errors import ClosedError, PykvmError
from pykvm.kvm import KvmSystem, KvmVcpu, KvmVm
from pykvm.kvm.slots import MemorySlot
from pykvm.machine import DirtyRingFull, Exit, IoOut, Registers, SlotFlags
from pykvm.machine.protocols import DirtyPages
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.x86.bits import Rflags
from pykvm.x86.registers import DescriptorTable, Segment, SpecialRegisters
from tests.patience import patient
from tests.rings import LEAST_RING

CODE, PML4, PDPT, PD, TSS, GDT, STACK, TABLES, DATA = 1, 2, 3, 4, 5, 6, 7, 8, 16
SYSTEM = 8 * 512
PORT = 0x10
DONE = bytes([0xE6, PORT])
"""out 0x10, al"""
SPIN = b"\xeb\xfe"
"""jmp $"""
STORE = b"\x48\x89\x07" + DONE
"""mov [rdi], rax; out 0x10, al"""
LOAD = b"\x48\x8b\x07" + DONE
"""mov rax, [rdi]; out 0x10, al"""
STORES = b"\x48\x89\x0f\x48\x01\xd7\x48\xff\xc9\x75\xf5" + DONE
"""again: mov [rdi], rcx; add rdi, rdx; dec rcx; jnz again; out 0x10, al"""
COUNT_FOR_EVER = b"\x48\xff\xc1\xeb\xfb"
"""again: inc rcx; jmp again"""
OUT_FOR_EVER = DONE + b"\xeb\xfc"
"""again: out 0x10, al; jmp again"""
ROUND_FOR_EVER = bytes.fromhex("4c89c7 4c89c9 48ffc3 48891f 4801d7 48ffc9 75f2 ebea")
"""top: mov rdi, r8; mov rcx, r9; again: inc rbx; mov [rdi], rbx; add rdi, rdx; dec rcx; jnz again; jmp top"""

_P, _W, _U, _A, _D = 1, 2, 4, 0x20, 0x40


def _page_tables(pages: int) -> dict[int, bytes]:
    """Table page to contents: a 4-level map of ``pages`` pages (SDM vol. 3, 4.5), identical from DATA on."""
    upper = _P | _W | _U | _A
    full = -(-pages // 512)
    tables = {
        PML4: struct.pack("<Q", SYSTEM + PDPT << 12 | upper),
        PDPT: struct.pack("<Q", SYSTEM + PD << 12 | upper),
        PD: b"".join(struct.pack("<Q", SYSTEM + TABLES + i << 12 | upper) for i in range(full)),
    }
    for i in range(full):
        tables[TABLES + i] = b"".join(
            struct.pack("<Q", _leaf(page)) for page in range(i * 512, min((i + 1) * 512, pages))
        )
    return tables


def _leaf(page: int) -> int:
    """D stays clear in what is only read, since a read of a page with D set may dirty it (hosts.md B.0)."""
    gfn = page if page >= DATA else SYSTEM + page
    return gfn << 12 | _P | _W | _U | _A | (_D if page == STACK or page >= DATA else 0)


def _special(cpl: int, start: SpecialRegisters) -> SpecialRegisters:
    code = Segment(0, 0xFFFFFFFF, 0x33 if cpl else 8, 0xB, 1, cpl, 0, 1, 1, 1)
    data = Segment(0, 0xFFFFFFFF, 0x2B if cpl else 0x10, 3, 1, cpl, 1, 1, 0, 1)
    start.cs = code
    start.ds = start.es = start.fs = start.gs = start.ss = data
    # Ports at CPL 3 come from RFLAGS.IOPL, not from an I/O permission bitmap: QEMU's TCG takes a TSS that is
    # busy for none that has one.
    start.tr = Segment(TSS << 12, 0x67, 0x40, 0xB, 1, 0, 0, 0, 0, 0)
    start.gdt = DescriptorTable(GDT << 12, 0xFF)
    start.idt = DescriptorTable(0, 0)
    start.cr0 = 0x80010033
    start.cr3 = SYSTEM + PML4 << 12
    start.cr4 = 0x620
    start.efer = 0x500
    return start


class Tiny:
    """The guest; ``vm`` may have been prepared (ring, manual protection) and must have no vCPU yet."""

    def __init__(
        self,
        vm: KvmVm,
        *,
        pages: int = 2048,
        cpl: int = 3,
        vcpus: int = 1,
        flags: SlotFlags = SlotFlags.LOG_DIRTY_PAGES,
    ) -> None:
        assert DATA <= pages <= SYSTEM
        self.vm = vm
        self.pages = pages
        self._rflags = Rflags.FIXED | (Rflags.IOPL3 if cpl else 0)
        self.memory = GuestMemory(pages * PAGE_SIZE)
        # Written once, so that the host has a page of its own everywhere (hosts.md A, untouched memory).
        self.memory.view()[::PAGE_SIZE] = 0
        for gfn, data in _page_tables(pages).items():
            self.memory.write(gfn * PAGE_SIZE, data)
        self.slot: MemorySlot = vm.create_slot(self.memory, 0, flags=flags)
        self.system: MemorySlot = vm.create_slot(
            self.memory, SYSTEM * PAGE_SIZE, size=DATA * PAGE_SIZE, slot_id=SYSTEM
        )
        self.vcpus: list[KvmVcpu] = []
        for _ in range(vcpus):
            vcpu = vm.create_vcpu()
            # First, since newer kernels take EFER.LME only where the CPUID has long mode.
            vcpu.set_cpuid(vm.supported_cpuid)
            vcpu.set_special_registers(_special(cpl, vcpu.get_special_registers()))
            self.vcpus.append(vcpu)

    @property
    def vcpu(self) -> KvmVcpu:
        return self.vcpus[0]

    def load(self, code: bytes, vcpu: KvmVcpu | None = None, **registers: int) -> KvmVcpu:
        """Put ``code`` where the vCPU (by default the first) executes next, with these registers."""
        vcpu = vcpu or self.vcpu
        at = CODE * PAGE_SIZE + self.vcpus.index(vcpu) * 64
        assert len(code) <= 64
        self.memory.write(at, code)
        registers.setdefault("rflags", self._rflags)
        vcpu.set_registers(Registers(rip=at, rsp=(STACK + 1) * PAGE_SIZE, **registers))
        return vcpu

    def run(self, code: bytes, vcpu: KvmVcpu | None = None, **registers: int) -> Exit:
        """``load``, then run to the first exit."""
        return self.load(code, vcpu, **registers).run()

    def store(self, gfn: int, count: int = 1, vcpu: KvmVcpu | None = None) -> Exit:
        """Write the first 8 bytes of ``count`` pages from ``gfn`` on; the first exit."""
        return self.run(STORES, vcpu, rdi=gfn * PAGE_SIZE, rcx=count, rdx=PAGE_SIZE)

    def finish(self, vcpu: KvmVcpu | None = None, on_full: Callable[[], object] | None = None) -> int:
        """Run to the end of the snippet; the number of times the ring was full on the way."""
        vcpu = vcpu or self.vcpu
        for full in range(1000):
            exit_ = vcpu.run()
            if not isinstance(exit_, DirtyRingFull):
                assert exit_ == IoOut(PORT, 1, exit_.data if isinstance(exit_, IoOut) else b"")
                return full
            assert on_full is not None, "the ring is full"
            on_full()
        raise AssertionError("the vCPU never got out of DIRTY_RING_FULL")

    def close(self) -> None:
        self.vm.close()
        self.memory.close()

    def __enter__(self) -> Tiny:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def done(exit_: Exit) -> bool:
    """Whether a snippet ended as it should."""
    return isinstance(exit_, IoOut) and exit_.port == PORT


def gfns(pages: DirtyPages, slot: int = 0) -> list[int]:
    return [int(gfn) for gfn in pages.gfns(slot)]


def ring_guest(system: KvmSystem, entries: int, **options: int) -> Tiny:
    """A guest in ring mode."""
    vm = system.create_machine()
    vm.enable_dirty_ring(entries)
    return Tiny(vm, **options)  # type: ignore[arg-type]


def emulates_cpl0_in_batches(system: KvmSystem) -> bool:
    """Whether CPL 0 runs past the ring's soft limit: a probe of behaviour (docs/reference/hosts.md D.7).

    230 stores are more than the limit of a 256-entry ring (192) and less than the ring, so nothing is lost.
    A batch may be cut short by an interrupt of the host, hence the tries.  A host that does not take such a
    ring logs with the processor (PML), which runs the guest.
    """
    if LEAST_RING > 256:
        return False
    for _ in range(20):
        with ring_guest(system, 256, cpl=0) as guest:
            first = guest.store(DATA, 230)
            assert done(first) or isinstance(first, DirtyRingFull), first
            if done(first):
                return True
    return False


class Runner:
    """A thread in which a vCPU runs until told otherwise; keeps its exits and the error it ended with."""

    def __init__(self, vcpu: KvmVcpu, keep: Callable[[Exit], bool] = lambda _: True) -> None:
        self.exits: list[Exit] = []
        self.error: PykvmError | None = None
        self.stop = False
        self._keep = keep
        self._vcpu = vcpu
        self.thread = threading.Thread(target=self._main, daemon=True)
        self.thread.start()

    def _main(self) -> None:
        try:
            while not self.stop:
                exit_ = self._vcpu.run()
                if self._keep(exit_):
                    self.exits.append(exit_)
        except PykvmError as error:
            self.error = error

    def wait_until_running(self) -> None:
        for _ in range(int(patient(20_000))):
            if self._vcpu.running:
                return
            threading.Event().wait(0.0005)
        raise AssertionError("the vCPU did not start")

    def end(self) -> None:
        """Kick it out for good."""
        self.stop = True
        for _ in range(200):
            if not self.thread.is_alive():
                return
            with suppress(ClosedError):
                self._vcpu.kick()
            self.thread.join(0.1)
        raise AssertionError("the vCPU thread did not end")


@contextmanager
def running(vcpu: KvmVcpu) -> Iterator[Runner]:
    """Run a loaded vCPU in a thread for the length of a with statement."""
    runner = Runner(vcpu)
    try:
        runner.wait_until_running()
        yield runner
    finally:
        runner.end()
