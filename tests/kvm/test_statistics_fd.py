"""Binary statistics: parsed by offsets, moving as KVM's rules say, readable at any time."""

from __future__ import annotations

import os
import struct
import threading

import pytest

from pykvm.errors import BusyError, ClosedError, HostError
from pykvm.kvm import KvmVm
from pykvm.kvm.statistics import StatisticsFd
from pykvm.machine.statistics import StatisticType, StatisticUnit
from pykvm.memory import PAGE_SIZE

from .tiny import DATA, SPIN, TABLES, Tiny, done, running

NAME_SIZE = 48


def descriptor(flags: int, exponent: int, size: int, offset: int, bucket: int, name: str) -> bytes:
    return struct.pack(f"<IhHII{NAME_SIZE}s", flags, exponent, size, offset, bucket, name.encode())


def statistics_file(descriptors: list[bytes], data: bytes, *, gap: int = 0) -> int:
    """A file as api.rst 4.133 describes it, its blocks in an order of its own, ``gap`` bytes apart."""
    table = b"".join(descriptors)
    data_offset = 24 + gap
    desc_offset = data_offset + len(data) + gap
    id_offset = desc_offset + len(table) + gap
    header = struct.pack("<6I", 0, NAME_SIZE, len(descriptors), id_offset, desc_offset, data_offset)
    pad = bytes(gap)
    fd = os.memfd_create("statistics")
    os.write(fd, header + pad + data + pad + table + pad + b"kvm-7/vcpu-3".ljust(NAME_SIZE, b"\0"))
    return fd


def test_values_lie_where_the_descriptors_say() -> None:
    data = struct.pack("<6Q", 10, 20, 30, 40, 50, 2**64 - 1)
    fd = statistics_file(
        [
            descriptor(0x001, 0, 1, 40, 0, "later"),
            descriptor(0x024, -9, 3, 8, 0, "histogram"),
            descriptor(0x113, 10, 1, 0, 4, "first"),
            descriptor(0x0FF, 0, 1, 32, 0, "of the future"),
        ],
        data,
        gap=16,
    )
    with StatisticsFd(fd) as opened:
        values = opened.snapshot()
        assert values.id == "kvm-7/vcpu-3"
        assert [(s.name, s.values) for s in values.values()] == [
            ("later", (2**64 - 1,)),
            ("histogram", (20, 30, 40)),
            ("first", (10,)),
            ("of the future", (50,)),
        ]
        later, histogram, first, future = values.values()
        assert (later.type, later.unit) == (StatisticType.INSTANT, StatisticUnit.NONE)
        assert (histogram.type, histogram.unit) == (StatisticType.LOG_HIST, StatisticUnit.SECONDS)
        assert (histogram.base, histogram.exponent, histogram.value) == (10, -9, 90)
        assert (first.base, first.exponent, first.bucket_size) == (2, 10, 4)
        assert (future.type, future.unit) == (15, 15), "unknown kinds stay numbers"


def test_a_truncated_file_is_no_crash() -> None:
    fd = statistics_file([descriptor(0, 0, 1, 4096, 0, "far away")], bytes(8))
    with StatisticsFd(fd) as opened, pytest.raises(HostError, match="statistics end"):
        opened.snapshot()


def test_names_and_units_of_a_real_vm(vm: KvmVm) -> None:
    vcpu = vm.create_vcpu(5)
    of_vm, of_vcpu = vm.statistics(), vcpu.statistics()
    assert of_vm.id == f"kvm-{os.getpid()}"
    assert of_vcpu.id == f"kvm-{os.getpid()}/vcpu-5"
    assert {"remote_tlb_flush", "pages_4k", "max_mmu_rmap_size"} <= set(of_vm)
    assert {"exits", "pf_taken", "halt_wait_hist"} <= set(of_vcpu)
    assert of_vm["pages_4k"].type == StatisticType.INSTANT
    assert of_vm["max_mmu_rmap_size"].type == StatisticType.PEAK
    histogram = of_vcpu["halt_wait_hist"]
    assert (histogram.type, len(histogram.values)) == (StatisticType.LOG_HIST, 32)
    wait = of_vcpu["halt_wait_ns"]
    assert (wait.unit, wait.base, wait.exponent) == (StatisticUnit.SECONDS, 10, -9)


def test_page_counters_move_with_the_pages_touched(vm: KvmVm) -> None:
    """Logging forbids large pages: 10 fresh pages are 10 faults and 10 present 4 KiB entries."""
    with Tiny(vm) as guest:
        assert done(guest.store(DATA))
        pages, faults = vm.statistics(), guest.vcpu.statistics()
        assert done(guest.store(DATA + 1, 10))
        moved = vm.statistics() - pages
        assert moved["pages_4k"] == 10
        assert (guest.vcpu.statistics() - faults)["pf_taken"] == 10
        assert (guest.vcpu.statistics() - faults)["pf_fixed"] == 10
        faults = guest.vcpu.statistics()
        assert done(guest.store(DATA + 1, 10))
        assert "pf_taken" not in guest.vcpu.statistics() - faults


def test_the_rmap_peak_is_not_taken_for_its_neighbour(vm: KvmVm) -> None:
    """Three aliases of one page make a chain of 2 before the last insertion (kvm-mmu.md section 6).

    Where KVM shadows the guest's tables; the TDP MMU has no such chains.  In the descriptors' order the
    value would be that of max_mmu_page_hash_collisions.
    """
    with Tiny(vm) as guest:
        for alias in (1, 2):
            entry = (DATA << 12 | 0x67).to_bytes(8, "little")
            guest.memory.write(TABLES * PAGE_SIZE + 8 * (DATA + alias), entry)
        assert done(guest.store(DATA, 3))
        values = vm.statistics()
        shadowed = values.value("mmu_cache_miss") > 0
        assert values.value("max_mmu_rmap_size") == (2 if shadowed else 0)


def test_a_running_vcpu_can_be_measured(vm: KvmVm) -> None:
    with Tiny(vm) as guest:
        guest.load(SPIN)
        with running(guest.vcpu):
            answers = []
            reader = threading.Thread(target=lambda: answers.append(guest.vcpu.statistics()), daemon=True)
            reader.start()
            reader.join(10)
            assert answers, "the statistics of a running vCPU block"
            assert len(vm.statistics()) > 10
            with pytest.raises(BusyError):
                guest.vcpu.open_statistics()


def test_a_kick_counts_as_a_signal_exit(vm: KvmVm) -> None:
    with Tiny(vm) as guest:
        guest.load(SPIN)
        before = guest.vcpu.statistics()
        with running(guest.vcpu):
            pass
        assert (guest.vcpu.statistics() - before)["signal_exits"] >= 1


def test_a_descriptor_of_ones_own_outlives_the_vm(vm: KvmVm) -> None:
    vcpu = vm.create_vcpu()
    with vcpu.open_statistics() as own:
        vm.close()
        assert own.snapshot().value("exits") == 0
        for closed in (vm, vcpu):
            with pytest.raises(ClosedError):
                closed.statistics()
    with pytest.raises(ClosedError):
        own.snapshot()


def test_no_descriptor_is_left(vm: KvmVm) -> None:
    before = len(os.listdir("/proc/self/fd"))
    other = vm.system.create_machine()
    other.create_vcpu().statistics()
    other.statistics()
    other.close()
    assert len(os.listdir("/proc/self/fd")) == before
