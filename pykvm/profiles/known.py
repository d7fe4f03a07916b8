"""The hosts whose behaviours are known: a kind of host in an era of KVM.

An era is a set of behaviours that changed together between two long-term kernels.  Its name is the kernel in
which they were read or measured: no code compares it with a version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from pykvm.errors import UsageError
from pykvm.profiles.profile import Paging, Profile, WriteTrackAllocation

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
        "dummy_root": False,
        "copies_root_entries": True,
        "replaces_linked_child": True,
        "external_write_tracking": False,
    },
    "amd-shadow": {"resets_at_shutdown": True},
    "amd-npt": {"paging": Paging.NPT, "tdp_mmu": True, "resets_at_shutdown": True},
    "amd-npt-oldmmu": {"paging": Paging.NPT, "resets_at_shutdown": True},
    "intel-ept": {"paging": Paging.EPT, "tdp_mmu": True, "ept_ad": True, "pml": True},
    "intel-ept-nopml": {"paging": Paging.EPT, "tdp_mmu": True, "ept_ad": True},
    "intel-ept-noad": {"paging": Paging.EPT, "tdp_mmu": True},
    "intel-shadow": {},
}

_LATER: Final[Mapping[str, Any]] = {
    "flushes_on_ad_clear": False,
    "tdp_spurious_marks": False,
    "tdp_recovers_in_place": True,
    "pml_newest_first": False,
    "reset_interruptible": True,
}
"""What changed between 6.12 and 6.18."""

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
    "6.12": {},
    "6.18": _LATER,
    "7.2": {
        **_LATER,
        "smep_in_role": True,
        "emulates_avx": True,
        "separate_read_access": True,
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
