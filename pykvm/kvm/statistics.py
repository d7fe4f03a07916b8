"""KVM's binary statistics (api.rst 4.133)."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
from functools import lru_cache
from typing import NamedTuple

from pykvm.abi import lib
from pykvm.abi.managed import Managed
from pykvm.errors import CapabilityError, HostError, KvmError
from pykvm.machine.statistics import Statistic, Statistics, StatisticType, StatisticUnit

_HEADER = struct.Struct("<6I")  # flags, name_size, num_desc, id_offset, desc_offset, data_offset
_DESCRIPTOR = struct.Struct("<IhHII")  # flags, exponent, size, offset, bucket_size; then the name
_BASES = {0: 10, 1: 2}


class _Entry(NamedTuple):
    """A descriptor, and where its values lie in the data block."""

    name: str
    values: struct.Struct
    offset: int
    type: StatisticType | int
    unit: StatisticUnit | int
    base: int
    exponent: int
    bucket_size: int


class StatisticsFd(Managed):
    """The statistics of a VM or a vCPU: readable from any thread, while the vCPU runs and after it is gone.

    The layout is read once.  Values are found by their descriptors' offsets: they do not lie in the
    descriptors' order, whatever api.rst says (docs/reference/kvm-mmu.md, section 6).
    """

    def __init__(self, fd: int) -> None:
        super().__init__(self.new_handle(fd))
        self._lock = threading.Lock()
        self._layout: tuple[str, list[_Entry], int, int] | None = None
        self._single: tuple[list[str], list[int]] | None = None

    def snapshot(self) -> Statistics:
        """All values now, in one read; values that KVM changes meanwhile may be from slightly different
        moments.  Raises ClosedError."""
        with self._lock:
            if self._layout is None:
                self._layout = self._read_layout()
            identity, entries, start, size = self._layout
            data = self._read(start, size)
        return Statistics(
            identity,
            {
                e.name: Statistic(
                    e.name,
                    e.values.unpack_from(data, e.offset),
                    e.type,
                    e.unit,
                    e.base,
                    e.exponent,
                    e.bucket_size,
                )
                for e in entries
            },
        )

    def counters(self) -> dict[str, int]:
        """The statistics that are single values, by name: as ``snapshot``, but about ten times as fast."""
        with self._lock:
            if self._layout is None:
                self._layout = self._read_layout()
            _, entries, start, size = self._layout
            if self._single is None:
                single = [entry for entry in entries if entry.values.size == 8]
                self._single = [entry.name for entry in single], [entry.offset // 8 for entry in single]
            data = self._read(start, size)
        names, places = self._single
        values = memoryview(data)[: size & ~7].cast("Q")
        return dict(zip(names, [values[place] for place in places], strict=True))

    def _read_layout(self) -> tuple[str, list[_Entry], int, int]:
        _, name_size, count, id_offset, desc_offset, data_offset = _HEADER.unpack(self._read(0, _HEADER.size))
        identity = _text(self._read(id_offset, name_size))
        stride = _DESCRIPTOR.size + name_size
        block = self._read(desc_offset, stride * count)
        entries = _entries(block, stride)
        return identity, entries, data_offset, max(e.offset + e.values.size for e in entries)

    def _read(self, offset: int, size: int) -> bytes:
        # The lock keeps ``close`` out, so the descriptor cannot be somebody else's meanwhile.
        data = os.pread(self.fileno(), size, offset)
        if len(data) != size:
            raise HostError(f"The statistics end after {len(data)} of {size} bytes at offset {offset}.")
        return data

    def close(self) -> None:
        with self._lock:
            super().close()


@lru_cache(maxsize=16)
def _entries(block: bytes, stride: int) -> list[_Entry]:
    """What descriptors of ``stride`` bytes say: the same for all VMs of a kernel, and for all vCPUs."""
    entries = []
    for position in range(0, len(block), stride):
        flags, exponent, size, offset, bucket_size = _DESCRIPTOR.unpack_from(block, position)
        entries.append(
            _Entry(
                _text(block[position + _DESCRIPTOR.size : position + stride]),
                struct.Struct(f"<{size}Q"),
                offset,
                _known(StatisticType, flags & 0xF),
                _known(StatisticUnit, flags >> 4 & 0xF),
                _BASES.get(flags >> 8 & 0xF, 10),
                exponent,
                bucket_size,
            )
        )
    return entries


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("ascii", "replace")


def _known(
    kind: type[StatisticType] | type[StatisticUnit], value: int
) -> StatisticType | StatisticUnit | int:
    try:
        return kind(value)
    except ValueError:
        return value


class Measured(Managed):
    """A VM or vCPU with statistics (KVM_CAP_BINARY_STATS_FD)."""

    _statistics: StatisticsFd | None = None
    _statistics_lock = threading.Lock()  # one for all: held while a descriptor is made

    def open_statistics(self) -> StatisticsFd:
        """KVM_GET_STATS_FD (api.rst 4.133): a descriptor of its own, for the caller to close.

        Raises CapabilityError before Linux 5.14, BusyError for a vCPU that runs.
        """
        try:
            return StatisticsFd(self.ioctl_int(lib.KVM_GET_STATS_FD, 0, "KVM_GET_STATS_FD"))
        except KvmError as error:
            if error.errno != errno.ENOTTY:
                raise
            raise CapabilityError("Statistics need KVM_CAP_BINARY_STATS_FD, that is Linux 5.14.") from None

    def statistics(self) -> Statistics:
        """A snapshot (api.rst 4.133); also while vCPUs run.  Raises CapabilityError, ClosedError."""
        return self._kept_statistics().snapshot()

    def counters(self) -> dict[str, int]:
        """The statistics that are single values, by name; fast enough to be read after every step."""
        return self._kept_statistics().counters()

    def _kept_statistics(self) -> StatisticsFd:
        with self._statistics_lock:
            if self._statistics is None:
                self._statistics = self.open_statistics()
            return self._statistics

    def close_statistics(self) -> None:
        """Close the descriptor behind ``statistics``."""
        with self._statistics_lock:
            if self._statistics is not None:
                self._statistics.close()


class VcpuStatistics(Measured):
    """Statistics of a vCPU."""

    def prepare_statistics(self) -> None:
        """Take the descriptor now: once the vCPU runs, its ioctls have to wait until it stops."""
        with contextlib.suppress(CapabilityError):
            self._statistics = self.open_statistics()
