"""What a KVM host does about memory, as a record of behaviours.

A profile names behaviours, never versions: a host's is found by probing (``pykvm info``).  ``profile``
gives the ones that are known: a kind of host in an era of KVM, an era being a set of behaviours that changed
together between two long-term kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final

from pykvm.errors import UsageError


class Paging(Enum):
    """What the processor translates guest accesses with."""

    SHADOW = "shadow"
    """Page tables that KVM derives from the guest's (no second dimension)."""
    NPT = "npt"
    """AMD's nested page tables."""
    EPT = "ept"
    """Intel's extended page tables."""


class WriteTrackAllocation(Enum):
    """When the 2-byte write-track counts of a slot's pages are allocated (kvm-mmu.md 9)."""

    ALWAYS = "always"
    """With every slot: TDP off, or [6.1] built with CONFIG_KVM_EXTERNAL_WRITE_TRACKING."""
    SHADOW_ROOT = "first shadow root"
    """With the first shadow root of the VM (commit deae4a10f166, 5.16: a nested guest, or TDP off)."""
    EXTERNAL_USER = "first external user"
    """As SHADOW_ROOT, or when the first external user registers (commit 96316a06700f, 6.18)."""


@dataclass(frozen=True)
class Profile:
    """The behaviours of one host.  The defaults are those of mainline 6.12 with shadow paging on AMD.

    Tags as in docs/reference/kvm-mmu.md: [6.1], [>=6.12] and so on name the kernels where a behaviour was
    read or measured.
    """

    name: str = "amd-shadow"
    era: str = "6.12"

    # --- the processor and the module's parameters ---------------------------------------------------
    paging: Paging = Paging.SHADOW
    tdp_mmu: bool = False
    """The newer direct MMU; else direct faults go through shadow pages and rmaps (module parameter tdp_mmu)."""
    ept_ad: bool = False
    """EPT has A/D bits (kvm_intel.eptad): then every walk counts as a write of the tables (13.4)."""
    pml: bool = False
    """Page-modification logging: re-arming clears D, and the processor logs D 0->1 (11.3)."""
    pages_1g: bool = True
    """The host's second-stage or shadow tables may have 1 GiB leaves."""
    address_spaces: int = 2
    """2 where KVM is built with SMM (section 2)."""
    mmio_caching: bool = True
    """Accesses without a slot are remembered in SPTEs (module parameter mmio_caching)."""
    nx_huge_pages: bool = False
    """The iTLB-multihit mitigation: executing in a huge page splits it."""
    eager_page_split: bool = True
    """Enabling logging splits huge pages at once (TDP MMU only, 11.4)."""
    physical_bits: int = 46
    """The host's MAXPHYADDR."""

    # --- how guest code runs -------------------------------------------------------------------------
    emulates_all_but_user: bool = False
    """Only long-mode code at CPL 3 runs natively; the rest in KVM's emulator (kvm_pvm; hosts.md C.1)."""
    emulation_batch: int = 1024
    """Instructions that such a host emulates between two looks at requests (hosts.md D.7)."""
    reads_io_bitmap: bool = False
    """OUT and IN at CPL 3 make KVM read the TSS, which sets the A bit of its page (hosts.md B.10)."""
    exit_per_emulated_user_failure: bool = False
    """An instruction at CPL 3 that cannot be emulated exits (kvm_pvm), else the guest sees #UD (12.3)."""
    lazy_cr3_sync: bool = False
    """MOV to CR3 synchronises at the next entry only (kvm_pvm; hosts.md B.11, 4)."""

    # --- shadow MMU ----------------------------------------------------------------------------------
    zaps_unsync_children: bool = True
    """Zapping an SP zaps its unsync descendants (kvm_pvm: eager_zap_unsync_children=N; hosts.md B.11, 3)."""
    rmap_recycle_threshold: int = 1000
    """``RMAP_RECYCLE_THRESHOLD`` (10.4)."""
    sync_rebuilds_all: bool = False
    """A sync remakes every SPTE of the SP, marking it dirty again [6.1]; since 6.4 only those whose access
    changed (FNAME(sync_spte); hosts.md B.11, 1)."""
    invlpg_refetches: bool = False
    """INVLPG drops the SPTE of an unsync SP and prefetches the new one [6.1]; else it syncs it (10.5)."""
    smep_in_role: bool = False
    """role.cr4_smep instead of role.smep_andnot_wp [7.2] (10.1)."""
    flushes_on_ad_clear: bool = True
    """An SPTE update that clears A or D asks for a TLB flush; not since 6.13 [7.2] (section 8)."""
    refuses_missing_table_slot: bool = True
    """A walk through a gfn without a visible slot faults [>=6.12]; before, only an error hva (13.3)."""
    dummy_root: bool = True
    """CR3 without a slot: guest accesses fault [>=6.12]; else a triple fault [6.1] (10.2)."""
    flushes_first_root: bool = True
    """tlb_flush counts at the first root load [>=6.12] (hosts.md B.11, 7)."""

    # --- TDP MMU -------------------------------------------------------------------------------------
    tdp_spurious_marks: bool = True
    """A spurious TDP fault marks the page again [6.1, 6.12]; not [7.2] (section 5)."""
    tdp_splits_in_place: bool = True
    """A fault below a huge SPTE splits it [>=6.12]; before, it was zapped (11.1)."""
    tdp_recovers_in_place: bool = False
    """Disabling logging puts a huge SPTE in place of small ones [7.2]; before, it zapped them (11.5)."""
    masked_split_misses_last: bool = False
    """The eager split of a masked range leaves out its last gfn [6.1] (11.4)."""

    # --- faults and emulation ------------------------------------------------------------------------
    counts_emulate_before_retry: bool = False
    """pf_emulate counts each write-protected hit even if the page is unprotected then [6.1] (section 6)."""
    retries_always: bool = False
    """Retry before execution resumes the guest even if nothing was zapped [6.1] (12.3)."""
    emulates_avx: bool = False
    """VEX forms of moves are emulated [7.2] (12.8)."""
    separate_read_access: bool = False
    """ACC bits have R apart from U [7.2] (section 8)."""

    # --- dirty log and ring --------------------------------------------------------------------------
    marks_without_vcpu: bool = True
    """A mark made while no vCPU is loaded reaches the bitmap [>=6.12]; it is dropped [6.1] (3.2)."""
    ring_full_by_request: bool = True
    """The ring is looked at when its request is pending [>=6.12]; [6.1] at every entry (4.4)."""
    ring_with_bitmap: bool = False
    """KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP: other architectures only (4.8)."""
    pml_newest_first: bool = True
    """The PML buffer is read newest entry first [6.1, 6.12]; oldest first [7.2] (4.6)."""
    reset_interruptible: bool = False
    """KVM_RESET_DIRTY_RINGS stops for a signal [7.2] (4.5)."""

    # --- write tracking and slots --------------------------------------------------------------------
    write_track_allocation: WriteTrackAllocation = WriteTrackAllocation.EXTERNAL_USER
    external_write_tracking: bool = True
    """Built with CONFIG_KVM_EXTERNAL_WRITE_TRACKING (selected by KVMGT)."""
    track_query_both_spaces: bool = False
    """The write-track query looks in both address spaces [6.1, 7.2]; own one only [6.12] (section 9)."""
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
        return self.write_track_allocation is WriteTrackAllocation.ALWAYS or not self.tdp


_KINDS: Final[Mapping[str, Mapping[str, Any]]] = {
    "pvm-shadow": {
        "address_spaces": 1,
        "mmio_caching": False,
        "emulates_all_but_user": True,
        "reads_io_bitmap": True,
        "exit_per_emulated_user_failure": True,
        "lazy_cr3_sync": True,
        "zaps_unsync_children": False,
        "pages_1g": False,
        "external_write_tracking": False,
    },
    "amd-shadow": {},
    "amd-npt": {"paging": Paging.NPT, "tdp_mmu": True},
    "amd-npt-oldmmu": {"paging": Paging.NPT},
    "intel-ept": {"paging": Paging.EPT, "tdp_mmu": True, "ept_ad": True, "pml": True},
    "intel-ept-nopml": {"paging": Paging.EPT, "tdp_mmu": True, "ept_ad": True},
    "intel-ept-noad": {"paging": Paging.EPT, "tdp_mmu": True},
    "intel-shadow": {},
}

_ERAS: Final[Mapping[str, Mapping[str, Any]]] = {
    "6.1": {
        "sync_rebuilds_all": True,
        "invlpg_refetches": True,
        "refuses_missing_table_slot": False,
        "dummy_root": False,
        "flushes_first_root": False,
        "tdp_splits_in_place": False,
        "masked_split_misses_last": True,
        "counts_emulate_before_retry": True,
        "retries_always": True,
        "marks_without_vcpu": False,
        "ring_full_by_request": False,
        "write_track_allocation": WriteTrackAllocation.ALWAYS,
        "track_query_both_spaces": True,
        "own_track_node": True,
        "refuses_move_when_tracked": False,
    },
    "6.12": {"write_track_allocation": WriteTrackAllocation.EXTERNAL_USER},
    "6.18": {
        "flushes_on_ad_clear": False,
        "track_query_both_spaces": False,
    },
    "7.2": {
        "smep_in_role": True,
        "flushes_on_ad_clear": False,
        "tdp_spurious_marks": False,
        "tdp_recovers_in_place": True,
        "emulates_avx": True,
        "separate_read_access": True,
        "pml_newest_first": False,
        "reset_interruptible": True,
        "track_query_both_spaces": True,
        "has_shadow_pages_statistic": True,
    },
}

KINDS: Final = tuple(_KINDS)
"""The known kinds of hosts."""
ERAS: Final = tuple(_ERAS)
"""The eras whose behaviours are known, oldest first."""


def profile(kind: str, era: str = "6.12", **changes: Any) -> Profile:
    """The profile of a known kind of host in an era, with single behaviours changed.

    Raises UsageError for a kind, era or behaviour that does not exist.
    """
    if kind not in _KINDS:
        raise UsageError(f"There is no host profile '{kind}'; choose one of {', '.join(KINDS)}.")
    if era not in _ERAS:
        raise UsageError(f"There is no era '{era}' of KVM's behaviours; choose one of {', '.join(ERAS)}.")
    settings = dict(_ERAS[era]) | dict(_KINDS[kind])
    try:
        return replace(Profile(name=kind, era=era, **settings), **changes)
    except TypeError:
        unknown = ", ".join(sorted(set(changes) - set(Profile.__dataclass_fields__)))
        raise UsageError(f"A host profile has no behaviour '{unknown}'.") from None


DEVELOPMENT_HOST: Final = ("pvm-shadow", "6.18")
"""Kind and era of the profile of a kvm_pvm host, the first one that was measured."""
