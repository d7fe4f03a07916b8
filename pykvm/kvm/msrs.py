"""Model-specific registers: which there are, reading and writing them (api.rst 4.3, 4.18, 4.19).

KVM works through a list and stops at the first register that it refuses, returning how many went well.
That count becomes an error that names the register; nothing is ever silently left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

from pykvm.abi import ffi, lib
from pykvm.abi.managed import Managed
from pykvm.errors import MsrError, UsageError
from pykvm.kvm.capabilities import Capability, Extensions

BATCH = 255  # KVM takes fewer than MAX_IO_MSRS = 256 at once (arch/x86/kvm/x86.c)
_LIST_CAPACITY = 4096


def _index_list(owner: Managed, request: int, operation: str) -> tuple[int, ...]:
    # SAFETY: room for _LIST_CAPACITY indices; KVM refuses with E2BIG rather than write beyond.
    table = ffi.new("struct pykvm_msr_list *", {"nmsrs": _LIST_CAPACITY, "indices": _LIST_CAPACITY})
    owner.ioctl(request, table, operation)
    return tuple(table.indices[0 : table.nmsrs])


def _transfer(
    owner: Managed, request: int, operation: str, pairs: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """One ioctl for at most BATCH registers; the (index, value) pairs that KVM worked through."""
    # SAFETY: the array has exactly ``nmsrs`` entries and lives until the ioctl returns.
    table = ffi.new("struct pykvm_msrs *", {"nmsrs": len(pairs), "entries": len(pairs)})
    for i, (index, value) in enumerate(pairs):
        if not (0 <= index < 1 << 32 and 0 <= value < 1 << 64):
            raise UsageError(
                f"MSR {index:#x} with value {value:#x}: 32 and 64 bits, unsigned, are the limits."
            )
        table.entries[i].index = index
        table.entries[i].data = value
    done = owner.ioctl(request, table, operation)
    return [(table.entries[i].index, table.entries[i].data) for i in range(done)]


def _read(owner: Managed, indices: Iterable[int]) -> tuple[dict[int, int], list[int]]:
    """Values of those that can be read, and those that cannot."""
    wanted = list(dict.fromkeys(indices))
    values: dict[int, int] = {}
    refused: list[int] = []
    while wanted:
        batch = wanted[:BATCH]
        done = _transfer(owner, lib.KVM_GET_MSRS, "KVM_GET_MSRS", [(index, 0) for index in batch])
        values.update(done)
        refused += batch[len(done) : len(done) + 1]
        wanted = wanted[len(done) + (len(done) < len(batch)) :]
    return values, refused


def _read_all(owner: Managed, indices: Iterable[int]) -> dict[int, int]:
    values, refused = _read(owner, indices)
    if refused:
        raise MsrError(
            refused[0], "KVM_GET_MSRS", "this host does not know it, or not for this guest's CPUID."
        )
    return values


class SystemMsrs(Extensions):
    """MSRs that the host offers."""

    @cached_property
    def msr_indices(self) -> tuple[int, ...]:
        """KVM_GET_MSR_INDEX_LIST (api.rst 4.3): MSRs that make up a vCPU's state on this host."""
        return _index_list(self, lib.KVM_GET_MSR_INDEX_LIST, "KVM_GET_MSR_INDEX_LIST")

    @cached_property
    def feature_msr_indices(self) -> tuple[int, ...]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST (api.rst 4.3, KVM_CAP_GET_MSR_FEATURES).  Raises CapabilityError."""
        self.require(Capability.GET_MSR_FEATURES, "KVM_GET_MSR_FEATURE_INDEX_LIST")
        return _index_list(self, lib.KVM_GET_MSR_FEATURE_INDEX_LIST, "KVM_GET_MSR_FEATURE_INDEX_LIST")

    def get_feature_msrs(self, indices: Iterable[int] | None = None) -> dict[int, int]:
        """KVM_GET_MSRS on /dev/kvm (api.rst 4.18, KVM_CAP_GET_MSR_FEATURES): the host's feature MSRs.

        By default all that can be read.  Raises CapabilityError; MsrError for a wanted one that is refused.
        """
        self.require(Capability.GET_MSR_FEATURES, "KVM_GET_MSRS on /dev/kvm")
        if indices is None:
            return _read(self, self.feature_msr_indices)[0]
        return _read_all(self, indices)


class VcpuMsrs(Managed):
    """MSRs of a vCPU, read and written as the host, which may do what the guest may not."""

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS (api.rst 4.18) by index.  Raises MsrError naming the first that KVM refuses."""
        return _read_all(self, indices)

    def get_readable_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """As ``get_msrs``, leaving out those that KVM refuses."""
        return _read(self, indices)[0]

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """KVM_SET_MSRS (api.rst 4.19) in the mapping's order.

        Raises MsrError naming the first that KVM refuses (unknown, read-only, reserved bits); those before
        it are set then.
        """
        pairs = list(values.items())
        for start in range(0, len(pairs), BATCH):
            batch = pairs[start : start + BATCH]
            done = _transfer(self, lib.KVM_SET_MSRS, "KVM_SET_MSRS", batch)
            if len(done) < len(batch):
                index, value = batch[len(done)]
                raise MsrError(
                    index,
                    "KVM_SET_MSRS",
                    f"the value {value:#x} has reserved bits, or this host or guest lacks the register; "
                    f"{start + len(done)} of {len(pairs)} were set before it.",
                )
