"""Page-modification logging: the processor's own list of pages written (kvm-mmu.md 11.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pykvm.model.mmu.vcpu import VcpuMmu

ENTRIES: Final = 512
"""PML_LOG_NR_ENTRIES: one page of 64-bit addresses."""


class PmlBuffer:
    """The buffer of one vCPU: guest-physical addresses of pages whose EPT D flag went from 0 to 1."""

    __slots__ = ("_gfns", "_vcpu")

    def __init__(self, vcpu: VcpuMmu) -> None:
        self._vcpu = vcpu
        self._gfns: list[int] = []

    def __len__(self) -> int:
        return len(self._gfns)

    @property
    def is_full(self) -> bool:
        """The next D flag to be set exits first (SDM vol. 3, 28.3.6)."""
        return len(self._gfns) == ENTRIES

    def log(self, gfn: int) -> None:
        """The processor sets the D flag of the leaf that maps gfn."""
        self._gfns.append(gfn)

    def flush(self) -> None:
        """``vmx_flush_pml_buffer``, first thing after every exit: mark what was logged.

        Newest first or oldest first as the profile says, which is the order of ring entries.
        """
        if not self._gfns:
            return
        gfns, self._gfns = self._gfns, []
        mmu = self._vcpu.mmu
        if mmu.journal is not None:
            mmu.journal.note(f"the exit reads {len(gfns)} PML entries", "kvm-mmu.md 11.3")
        if mmu.profile.pml_newest_first:
            gfns.reverse()
        lookup = mmu.memslots.lookup
        for gfn in gfns:
            slot = lookup(gfn, self._vcpu.load_as_id)
            if slot is not None:
                mmu.mark_page_dirty(slot, gfn)
