"""A guest of the shadow MMU without a processor: tests make its accesses one by one.

Page tables by hand, one slot from gfn 0 on, and what each access did: marks in order, counters that moved.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from pykvm.model.mmu.outcomes import EmulateInstruction, GuestPageFault
from pykvm.model.mmu.vcpu import ControlChange, VcpuMmu
from pykvm.model.mmu.vm import Mmu
from pykvm.model.paging import Access, Control
from pykvm.profiles import profile

HOST: Final = 0x1000_0000_0000
P, W, U, A, D, PS = 1, 2, 4, 0x20, 0x40, 0x80
TABLE: Final = P | W | U | A
PAGE: Final = P | W | U | A | D
READ, STORE, FETCH = int(Access.USER), int(Access.USER | Access.WRITE), int(Access.USER | Access.FETCH)
LONG: Final = Control(0x80010001, 0, 0x20, 0xD00)
PAE: Final = Control(0x80010001, 0, 0x20, 0)
PAGING_32: Final = Control(0x80010001, 0, 0, 0)
LA57: Final = Control(0x80010001, 0, 0x1020, 0xD00)
UNPAGED: Final = Control(1, 0, 0, 0)


class Did(NamedTuple):
    """What one action did: the gfns that were pushed, in order, and the counters that moved."""

    pushed: list[int]
    moved: dict[str, int]
    emulate: EmulateInstruction | None = None
    fault: GuestPageFault | None = None


class ShadowGuest:
    """A VM with one slot of ``pages`` pages that logs, and vCPUs with rings."""

    def __init__(
        self,
        kind: str = "amd-shadow",
        era: str = "6.12",
        *,
        pages: int = 4096,
        flags: int = 1,
        **changes: object,
    ) -> None:
        self.mmu = Mmu(profile(kind, era, **changes))
        self.mmu.enable_dirty_ring(65536)
        slot = self.mmu.memslots.set_region(
            0, flags, 0, pages * 4096, HOST, memoryview(bytearray(pages * 4096))
        )
        assert slot is not None
        self.slot = slot
        self.vcpus: list[VcpuMmu] = []
        self._seen: dict[tuple[int, str], int] = {}

    def vcpu(self, control: Control, root: int) -> VcpuMmu:
        """Another vCPU, with CR3 pointing to a gfn."""
        vcpu = self.mmu.create_vcpu()
        self.vcpus.append(vcpu)
        self.mmu.loaded = vcpu
        vcpu.set_control(control._replace(cr3=root << 12), ControlChange.HOST)
        return vcpu

    def entry(self, table: int, index: int, value: int) -> None:
        """Write an 8-byte entry as the VMM would: KVM does not see it."""
        self.slot.words[table * 512 + index] = value

    def entry_4(self, table: int, index: int, value: int) -> None:
        """The same for a 4-byte entry."""
        at = table * 4096 + index * 4
        self.slot.data[at : at + 4] = value.to_bytes(4, "little")

    def read(self, table: int, index: int) -> int:
        """An 8-byte entry."""
        return self.slot.words[table * 512 + index]

    # --- actions -------------------------------------------------------------------------------------

    def did(self, emulate: EmulateInstruction | None = None, fault: GuestPageFault | None = None) -> Did:
        """What happened since the last action; the rings are emptied without arming anything."""
        pushed = []
        moved: dict[str, int] = {}
        for vcpu in self.vcpus:
            ring = vcpu.ring
            assert ring is not None
            while ring.used:
                pushed.append(ring.entries[ring.reset_index & ring.size - 1].offset)
                ring.reset_index += 1
        for number, counters in enumerate((self.mmu.counters, *(vcpu.counters for vcpu in self.vcpus))):
            for name, value in counters.as_dict().items():
                if change := value - self._seen.get((number, name), 0):
                    moved[name] = moved.get(name, 0) + change
                self._seen[number, name] = value
        moved.pop("mmu_shadow_pages", None)
        return Did(pushed, moved, emulate, fault)

    def enter(self, vcpu: VcpuMmu) -> Did:
        """KVM_RUN up to the first instruction."""
        self.mmu.loaded = vcpu
        assert vcpu.enter()
        return self.did()

    def access(self, vcpu: VcpuMmu, linear: int, access: int, rip: int = 0x1000) -> Did:
        """One access of native code; the guest is entered first, and what that did is not reported."""
        self.enter(vcpu)
        vcpu.rip = rip
        try:
            vcpu.translate(linear, access)
        except EmulateInstruction as emulate:
            return self.did(emulate=emulate)
        except GuestPageFault as fault:
            return self.did(fault=fault)
        return self.did()

    def store(self, vcpu: VcpuMmu, linear: int, rip: int = 0x1000) -> Did:
        return self.access(vcpu, linear, STORE, rip)

    def load(self, vcpu: VcpuMmu, linear: int) -> Did:
        return self.access(vcpu, linear, READ)

    def emulated_store(self, vcpu: VcpuMmu, gpa: int, data: bytes) -> Did:
        """A store of KVM's emulator, its translation done."""
        self.mmu.loaded = vcpu
        assert vcpu.emulator_write(gpa, data)
        return self.did()

    def map_long(self, root: int, tables: tuple[int, int, int], first: int, pages: int, flags: int) -> None:
        """An identity map of gfns in 4-level tables (PDPT, PD, PT), all below 2 MiB of linear addresses."""
        above = root
        for table in tables:
            self.entry(above, 0, table << 12 | TABLE)
            above = table
        for gfn in range(first, first + pages):
            self.entry(tables[2], gfn, gfn << 12 | flags)
