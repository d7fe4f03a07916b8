"""What a KVM host does about memory, as a record of behaviours.

A profile names behaviours, never versions: a host's is found by probing (``pykvm info``).  The text of each
field says in which kernels the behaviour was read or measured, and the commit that changed it where that is
known; [6.1], [>=6.12] and so on are the tags of docs/reference/kvm-mmu.md, numbers in brackets its sections.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Paging(Enum):
    """What the processor translates guest accesses with."""

    SHADOW = "shadow"
    """Page tables that KVM derives from the guest's (no second dimension)."""
    NPT = "npt"
    """AMD's nested page tables."""
    EPT = "ept"
    """Intel's extended page tables."""


class Execution(Enum):
    """What carries out the code that a host runs natively.

    Most hosts of kinds other than one's own are watched under an emulator (docs/labs.md), and where that
    deviates from the processor it stands for, so do the faults that KVM gets to see.
    """

    HARDWARE = "hardware"
    """A processor by its manual."""
    TCG = "qemu-tcg"
    """QEMU 10: an instruction that reads and writes an operand does so with two accesses, so that it faults
    as a read first; CLFLUSH accesses nothing; SVM lacks DecodeAssists, and KVM emulates MOV to CR0 and CR4;
    with NPT a #PF for a reserved bit has P = 0, bit 8 of a PML4E is not reserved, and a PDPTE gets an A
    flag."""
    BOCHS = "bochs"
    """Bochs 3: with EPT without A/D, setting A and D in a guest table is no write for EPT, so that neither
    write protection nor a log sees it."""


class WriteTrackAllocation(Enum):
    """When the 2-byte write-track counts of a slot's pages are allocated where TDP is on (kvm-mmu.md 9).

    Without TDP each policy allocates with every slot, since KVM's own shadow pages need the counts.
    """

    ALWAYS = "always"
    """With every slot if KVM is built with CONFIG_KVM_EXTERNAL_WRITE_TRACKING, else as SHADOW_ROOT [6.1]."""
    SHADOW_ROOT = "shadow-root"
    """With the first shadow root of the VM, that is a nested guest's (commit deae4a10f166, Linux 5.16)."""
    EXTERNAL_USER = "external"
    """As SHADOW_ROOT, or when the first external user registers (commit a364c014a2c1, Linux 6.9)."""


@dataclass(frozen=True)
class Profile:
    """The behaviours of one host.  The defaults are those of mainline 6.12 with shadow paging on AMD."""

    name: str = "amd-shadow"
    era: str = "6.12"

    # --- the processor and the module's parameters ---------------------------------------------------
    paging: Paging = Paging.SHADOW
    tdp_mmu: bool = False
    """The newer direct MMU; else direct faults go through shadow pages and rmaps (kvm.tdp_mmu; 11.1)."""
    ept_ad: bool = False
    """EPT has A/D bits (kvm_intel.eptad): then every walk counts as a write of the tables (13.4)."""
    pml: bool = False
    """Page-modification logging (kvm_intel.pml): re-arming clears D, and the processor logs D 0->1 (11.3)."""
    pages_1g: bool = True
    """The host's second-stage or shadow tables may have 1 GiB leaves: NPT always, EPT where the processor has
    them, shadow tables where the guest may have them (CPUID PDPE1GB; not on kvm_pvm, hosts.md B.8)."""
    execution: Execution = Execution.HARDWARE
    """What carries out native code: a processor, or which emulator of one (docs/reference/labs.md)."""
    tdp_root_level: int = 4
    """Levels of the second-stage tables: with NPT those of the host's own paging (5 with LA57), with EPT 5
    where the processor has them and MAXPHYADDR exceeds 48.  Only the older MMU's counters tell."""
    address_spaces: int = 2
    """2 where KVM is built with CONFIG_KVM_SMM (section 2)."""
    mmio_caching: bool = True
    """Accesses without a slot are remembered in SPTEs (kvm.mmio_caching; section 8)."""
    nx_huge_pages: bool = False
    """The iTLB-multihit mitigation: executing in a huge page splits it (kvm.nx_huge_pages; 7.2)."""
    eager_page_split: bool = True
    """Enabling logging splits huge pages at once (kvm.eager_page_split; TDP MMU only, 11.4)."""
    physical_bits: int = 46
    """The host's MAXPHYADDR."""

    # --- how guest code runs -------------------------------------------------------------------------
    emulates_all_but_user: bool = False
    """Only long-mode code at CPL 3 runs natively; the rest in KVM's emulator (kvm_pvm; hosts.md C.1)."""
    emulation_batch: int = 1024
    """Instructions that such a host emulates between two looks at requests (kvm_pvm.pvm_emul_batch; hosts.md
    D.7)."""
    reads_io_bitmap: bool = False
    """OUT and IN at CPL 3 make KVM read the TSS whatever IOPL says, which sets the A bit of the TSS's page
    (kvm_pvm; hosts.md B.10)."""
    exit_per_emulated_user_failure: bool = False
    """An instruction at CPL 3 that cannot be emulated exits (kvm_pvm; hosts.md C.2), else the guest sees #UD
    (12.3)."""
    resets_at_shutdown: bool = False
    """A triple fault leaves the vCPU as INIT does, ready to run from the reset vector (kvm_amd, whose VMCB is
    undefined then; hosts.md C.2), else as it was."""
    lazy_cr3_sync: bool = False
    """MOV to CR3 synchronises at the next entry only (kvm_pvm, where CPL 0 is emulated; hosts.md B.11, 4).
    Follows from ``emulates_all_but_user``: told for people, the model needs no second switch."""

    # --- shadow MMU ----------------------------------------------------------------------------------
    zaps_unsync_children: bool = True
    """Zapping an SP zaps its unsync descendants (10.3); not with kvm_pvm's eager_zap_unsync_children=N
    (hosts.md B.11, 3)."""
    copies_root_entries: bool = False
    """Each vCPU runs on a copy of its root's entries (kvm_pvm): one that another vCPU made is learnt by a
    spurious fault, or with the next flush of the whole TLB."""
    replaces_linked_child: bool = False
    """A fault whose walk leads to another table, or with other rights, than the shadow page linked there was
    made for replaces it (seen on 6.18.44: the host stored into a table that is shadowed); else the fault goes
    on in the linked page."""
    rmap_recycle_threshold: int = 1000
    """``RMAP_RECYCLE_THRESHOLD``: a gfn with more leaf SPTEs loses them all (10.4)."""
    sync_rebuilds_all: bool = False
    """A sync remakes every SPTE of the SP, marking it dirty again [6.1]; since commit e6722d9211b2 (Linux
    6.4) only those whose access changed (FNAME(sync_spte), 10.5; hosts.md B.11, 1)."""
    invlpg_refetches: bool = False
    """INVLPG drops the SPTE of an unsync SP and prefetches the new one [6.1]; since commit 9fd4a4e3a3d9
    (Linux 6.4) it syncs it (10.5; hosts.md B.11, 2)."""
    smep_in_role: bool = False
    """role.cr4_smep [7.2] instead of role.smep_andnot_wp [6.1 to 6.18]: toggling SMEP makes other SPs (10.1;
    hosts.md B.8)."""
    flushes_on_ad_clear: bool = True
    """An SPTE update that clears A or D asks for a TLB flush [6.1, 6.12]; not since commits b7ed46b201a4 and
    856cf4a60cff (Linux 6.13) (section 8)."""
    refuses_missing_table_slot: bool = True
    """A walk through a gfn without a visible slot faults (commit b5b359ac30d4, Linux 6.6) [>=6.12]; before,
    only an error hva did, so that KVM's internal slots could hold tables (13.3).  Told for people: the model
    has no internal slots."""
    dummy_root: bool = True
    """CR3 without a slot: guest accesses fault (commit 0e3223d8d00a, Linux 6.6) [>=6.12]; else a triple fault
    at entry [6.1] (10.2), as on kvm_pvm (hosts.md C.3)."""
    flushes_first_root: bool = True
    """tlb_flush counts at the first root load [>=6.12]; one less [6.1] (hosts.md B.11, 7)."""

    # --- TDP MMU -------------------------------------------------------------------------------------
    tdp_spurious_marks: bool = True
    """A spurious TDP fault marks the page again [6.1, 6.12]; not since commit 386d69f9f29b (Linux 6.13)
    (section 5)."""
    tdp_splits_in_place: bool = True
    """A fault below a huge SPTE splits it (commit c4b33d28ea51, Linux 6.2) [>=6.12]; before, it was zapped
    (11.1)."""
    tdp_recovers_in_place: bool = False
    """Disabling logging puts a huge SPTE in place of small ones (commit 13e2e4f62a4b, Linux 6.13); before, it
    zapped them [6.1, 6.12] (11.5)."""
    masked_split_misses_last: bool = False
    """The eager split of a masked range leaves out its last gfn [6.1] (11.4)."""

    # --- faults and emulation ------------------------------------------------------------------------
    counts_emulate_before_retry: bool = False
    """pf_emulate counts each write-protected hit even if the page is unprotected then [6.1]; since the write
    protection has a result of its own (commit 989a84c93f59 and those after it, Linux 6.12) it does not
    (section 6)."""
    retries_always: bool = False
    """Retry before execution resumes the guest even if nothing was zapped [6.1]; since commit c1edcc41c360
    (Linux 6.12) only if something was (12.3)."""
    emulates_avx: bool = False
    """VEX forms of moves are emulated [7.2] (commit f0585a714a75, after Linux 6.18; 12.8)."""
    separate_read_access: bool = False
    """ACC bits have R apart from U [7.2] (section 8)."""

    # --- dirty log and ring --------------------------------------------------------------------------
    marks_without_vcpu: bool = True
    """A mark made while no vCPU is loaded reaches the bitmap [>=6.12]; it is dropped [6.1] (3.2; commit
    86bdf3ebcfe1, Linux 6.2)."""
    ring_full_by_request: bool = True
    """The ring is looked at when its request is pending (commit cf87ac739e48, Linux 6.2) [>=6.12]; at every
    entry [6.1] (4.4)."""
    ring_with_bitmap: bool = False
    """KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP: other architectures only (4.8)."""
    pml_newest_first: bool = True
    """The PML buffer is read newest entry first [6.1, 6.12]; oldest first since commit 37c3ddfe5238 (Linux
    6.14) (4.6)."""
    reset_interruptible: bool = False
    """KVM_RESET_DIRTY_RINGS stops for a signal (commit 49005a2a3d2a, Linux 6.17) (4.5).  Told for people: no
    signal comes in the middle of the model's resets."""

    # --- write tracking and slots --------------------------------------------------------------------
    write_track_allocation: WriteTrackAllocation = WriteTrackAllocation.EXTERNAL_USER
    external_write_tracking: bool = True
    """Built with CONFIG_KVM_EXTERNAL_WRITE_TRACKING (selected by KVMGT; section 9)."""
    track_query_both_spaces: bool = False
    """The write-track query looks in both address spaces [6.1, 7.2]; own one only [6.12] (section 9; commit
    0f38453cdb2e fixed it, and stable kernels have that, too)."""
    own_track_node: bool = False
    """KVM's MMU is itself a registered track_write node, called last [6.1] (9.1)."""
    refuses_move_when_tracked: bool = True
    """Moving a slot fails with EINVAL while an external user is registered [>=6.12] (section 2)."""
    has_shadow_pages_statistic: bool = False
    """The statistic mmu_shadow_pages [7.2] (section 6)."""

    @property
    def tdp(self) -> bool:
        """Two-dimensional paging."""
        return self.paging is not Paging.SHADOW

    @property
    def reserved_ring_entries(self) -> int:
        """Entries beyond the soft limit of a dirty ring (4.2): 64, and PML's 512."""
        return 64 + (512 if self.pml else 0)

    @property
    def walks_write_tables(self) -> bool:
        """The processor's own walk of guest tables counts as a write of them, whatever they hold (13.4)."""
        return self.paging is Paging.NPT or (self.paging is Paging.EPT and self.ept_ad)

    @property
    def write_track_eager(self) -> bool:
        """Whether a VM has write-track counts from its first slot on."""
        if not self.tdp:
            return True
        return self.write_track_allocation is WriteTrackAllocation.ALWAYS and self.external_write_tracking
