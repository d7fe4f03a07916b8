"""The workloads, on both machines: they make progress, stay clean, and notice every kind of lost page."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pykvm.errors import GuestError, KvmError, RingOverflowError, UsageError
from pykvm.guest import catalog
from pykvm.guest.protocol import Block
from pykvm.guest.workloads import Layout, WorkloadConfig, WorkloadGuest, gpa_of
from pykvm.machine import System
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.x86.cpuid import physical_address_bits
from tests.patience import patient
from tests.rings import LEAST_RING

MIB, GIB = 1 << 20, 1 << 30
MASK = (1 << 64) - 1
WORKLOADS = catalog.workloads()


def until(guest: WorkloadGuest, ready: Callable[[], bool], timeout: float = 20.0) -> None:
    """Wait while the guest runs; fails with the guest's own error or after ``timeout`` seconds."""
    deadline = time.monotonic() + patient(timeout)
    while not ready():
        assert time.monotonic() < deadline, f"not within {timeout} s: {guest.report()}"
        assert guest.runner.error is None, guest.runner.error
        time.sleep(0.005)


def until_visits(guest: WorkloadGuest, visits: int) -> None:
    start = guest.report().visits
    until(guest, lambda: guest.report().visits >= start + visits)


def slow(system: System, workload: str) -> bool:
    """Whether a visit takes long: on the model the one with string instructions over whole pages does."""
    return system.backend == "model" and workload == "strings"


def visits_of(guest: WorkloadGuest, block: int) -> int:
    return int.from_bytes(guest.memory.read(block + Block.VISITS, 8), "little")


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_workload_makes_progress_and_stays_clean(system, workload, cpl, vcpus):
    few = workload in {"idle", "strings"} or cpl == 0
    config = WorkloadConfig(
        workload, memory=4 * MIB, cpl=cpl, vcpus=vcpus, touch=256 * 1024, burst=64, quiet=3000
    )
    with WorkloadGuest.create(system, config) as guest:
        guest.runner.start()
        for _ in range(3):
            until_visits(guest, 20 if few else 2000)
            guest.runner.pause()
            before = guest.report()
            time.sleep(0.01)
            assert guest.report() == before
            guest.runner.resume()
        report = guest.report()
        assert report.corruption_count == 0
        assert report.corruptions == ()
        assert report.checks == report.visits * catalog.load(workload).header.checks
        for region in guest.layout.regions:
            block = guest.memory.read(region.block, PAGE_SIZE)
            assert int.from_bytes(block[Block.VISITS : Block.VISITS + 8], "little") > 0


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_passes_end_the_guest_with_status_0(system, workload, cpl):
    config = WorkloadConfig(
        workload, memory=2 * MIB, cpl=cpl, vcpus=2, passes=2, touch=64 * 1024, quiet=10, throttle=0
    )
    with WorkloadGuest.create(system, config) as guest:
        guest.runner.start()
        assert guest.runner.wait(patient(20)) == 0
        report = guest.report()
        assert report.passes == 4
        assert report.visits == 2 * sum(region.pages for region in guest.layout.regions)
        assert report.corruption_count == 0


def run_passes(system, config: WorkloadConfig) -> tuple[bytes, Layout, int, int]:
    """The data and ledger pages after the passes, and the two keys."""
    with WorkloadGuest.create(system, config) as guest:
        guest.runner.start()
        assert guest.runner.wait(patient(20)) == 0
        region = guest.layout.regions[0]
        block = guest.memory.read(region.block, PAGE_SIZE)
        keys = [int.from_bytes(block[at : at + 8], "little") for at in (Block.KEY1, Block.KEY2)]
        content = guest.memory.read(region.ledger, config.memory - region.ledger)
        return content, guest.layout, keys[0], keys[1]


def test_sequential_leaves_exactly_the_memory_that_the_protocol_says(system):
    """Every byte of data and ledger, computed here from the rules in guests/pykvm.inc."""
    passes = 300  # more than the 256 visits after which spots are used again
    config = WorkloadConfig("sequential", memory=2 * MIB, passes=passes, touch=16 * PAGE_SIZE)
    content, layout, key1, key2 = run_passes(system, config)
    region = layout.regions[0]
    expected = bytearray(len(content))

    def put(linear: int, value: int) -> None:
        at = linear - region.ledger
        expected[at : at + 8] = (value & MASK).to_bytes(8, "little")

    for number in range(region.pages):
        put(region.ledger + 8 * number, passes)
        page = region.data + number * region.step
        for visit in range(1, passes + 1):
            spot = visit * 29 % 256 * 8
            stamp = (visit * key1 + page + spot) * key2
            put(page + spot, stamp)
            put(page + 4096 - 8 - spot, -stamp)
    assert content == bytes(expected)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_memory_is_decided_by_the_seed_and_not_by_the_privilege_level(system, workload):
    def content(seed: int, cpl: int) -> bytes:
        config = WorkloadConfig(
            workload, memory=2 * MIB, passes=2, touch=32 * PAGE_SIZE, cpl=cpl, seed=seed, quiet=5, throttle=0
        )
        return run_passes(system, config)[0]

    first = content(7, 3)
    assert content(7, 3) == first
    assert content(7, 0) == first
    assert content(8, 3) != first


def test_hotspot_prefers_the_hot_set(system):
    config = WorkloadConfig("hotspot", memory=4 * MIB, passes=40, hot_pages=50, hot_percent=80)
    with WorkloadGuest.create(system, config) as guest:
        guest.runner.start()
        assert guest.runner.wait(patient(20)) == 0
        region = guest.layout.regions[0]
        ledger = np.frombuffer(guest.memory.read(region.ledger, 8 * region.pages), dtype=np.uint64)
        hot = ledger[:50].sum() / ledger.sum()
        assert 0.79 < hot < 0.83  # 80 % and the tail's share of them
        assert (ledger[50:] > 0).mean() > 0.95


@pytest.mark.parametrize(("stride", "pages"), [(17, 64), (16, 64), (63, 64), (1000, 64), (6, 45), (1, 1)])
def test_stride_reaches_every_page(system, stride, pages):
    config = WorkloadConfig("stride", memory=2 * MIB, passes=3, touch=pages * PAGE_SIZE, stride=stride)
    with WorkloadGuest.create(system, config) as guest:
        guest.runner.start()
        assert guest.runner.wait(patient(20)) == 0
        region = guest.layout.regions[0]
        assert region.pages == pages
        assert guest.memory.read(region.ledger, 8 * pages) == (3).to_bytes(8, "little") * pages


def test_smp_counts_every_visit_of_every_vcpu(system):
    passes = 20_000 if system.backend == "kvm" else 50
    config = WorkloadConfig("smp", memory=4 * MIB, vcpus=4, passes=passes, touch=64 * PAGE_SIZE)
    with WorkloadGuest.create(system, config) as guest:
        guest.runner.start()
        assert guest.runner.wait(patient(20)) == 0
        count = int.from_bytes(guest.memory.read(guest.layout.shared, 8), "little")
        # A vCPU that is done waits for the others; it does not count on.
        assert count == guest.report().visits == 4 * passes * 16


# --- corruption ----------------------------------------------------------------------------------


@pytest.fixture(params=[0, 3], ids=["cpl0", "cpl3"])
def busy(request, system):
    """A sequential guest that is paused after more than one pass over its 32 pages."""
    config = WorkloadConfig("sequential", memory=4 * MIB, cpl=request.param, touch=32 * PAGE_SIZE, throttle=0)
    with WorkloadGuest.create(system, config) as guest:
        guest.runner.start()
        until(guest, lambda: guest.report().passes >= 2)
        guest.runner.pause()
        yield guest


def distant_page(guest: WorkloadGuest) -> int:
    """The linear address of a page that the guest is not visiting right now (RBX is its page number)."""
    region = guest.layout.regions[0]
    current = guest.machine.vcpus[0].get_registers().rbx
    return region.page_address((current + region.pages // 2) % region.pages)


def go_on(guest: WorkloadGuest, visits: int) -> None:
    guest.runner.resume()
    until_visits(guest, visits)
    guest.runner.pause()


def step_away(guest: WorkloadGuest, page: int) -> None:
    """Go on until the guest is not in the middle of a visit to ``page``: it has checked that one already."""
    region = guest.layout.regions[0]
    while region.page_address(guest.machine.vcpus[0].get_registers().rbx) == page:
        go_on(guest, 3)


def test_overwritten_page_is_found_and_named(busy):
    page = distant_page(busy)
    busy.memory.write(page, b"\xa5" * PAGE_SIZE)
    go_on(busy, 100)
    report = busy.report()
    assert report.corruption_count >= len(report.corruptions) > 0
    assert {record.page for record in report.corruptions} == {page}
    first = report.corruptions[0]
    assert first.found == 0xA5A5A5A5A5A5A5A5
    assert first.gpa & -PAGE_SIZE == page
    assert "never wrote" in first.cause
    assert f"{page:#x}" in str(first)


def test_lost_page_is_found_and_named(busy):
    page = distant_page(busy)
    busy.memory.discard(page, PAGE_SIZE)
    go_on(busy, 100)
    records = busy.report().corruptions
    assert records
    assert {record.page for record in records} == {page}
    assert "zero" in records[0].cause


def test_single_overwritten_word_is_found_within_256_visits_of_its_page(busy):
    go_on(busy, 32 * 30)
    page = distant_page(busy)
    words = np.frombuffer(busy.memory.read(page, PAGE_SIZE), dtype=np.uint64)
    word = int(np.flatnonzero(words)[7])
    busy.memory.write(page + 8 * word, b"\xff" * 8)
    go_on(busy, 32 * 260)
    records = busy.report().corruptions
    assert [(record.gpa, record.page) for record in records] == [(page + 8 * word, page)]


@pytest.mark.parametrize("passes", [1, 3])
def test_page_that_went_back_in_time_is_found_and_named(busy, passes):
    page = distant_page(busy)
    old = busy.memory.read(page, PAGE_SIZE)
    go_on(busy, 32 * passes)
    step_away(busy, page)
    busy.memory.write(page, old)
    go_on(busy, 100)
    records = busy.report().corruptions
    assert records
    assert {record.page for record in records} == {page}
    assert "zero instead" in records[0].cause or "older state" in records[0].cause


def test_page_that_went_back_by_more_than_256_visits_names_the_visit(system):
    config = WorkloadConfig("sequential", memory=4 * MIB, touch=32 * PAGE_SIZE)
    with WorkloadGuest.create(system, config) as guest:
        guest.runner.start()
        until(guest, lambda: guest.report().passes >= 600)
        guest.runner.pause()
        page = distant_page(guest)
        old = guest.memory.read(page, PAGE_SIZE)
        entry = guest.layout.regions[0].ledger_entry(page)
        visit = int.from_bytes(guest.memory.read(entry, 8), "little")
        go_on(guest, 32 * 100)
        step_away(guest, page)
        guest.memory.write(page, old)
        go_on(guest, 100)
        first = guest.report().corruptions[0]
        assert first.page == page
        assert visit - 256 < first.visit - 256 * ((first.visit - visit) // 256) <= visit + 256
        assert "older state" in first.cause


def test_ledger_page_that_went_back_in_time_is_found_and_named(busy):
    ledger = busy.layout.regions[0].ledger
    old = busy.memory.read(ledger, PAGE_SIZE)
    go_on(busy, 32 * 3)
    busy.memory.write(ledger, old)
    go_on(busy, 100)
    records = busy.report().corruptions
    assert records
    # The one entry that the vCPU has in a register right now may be written back over the old one.
    assert {record.page for record in records} == {ledger}
    assert "ledger is older" in records[0].cause


def test_lost_ledger_page_is_found_and_named(busy):
    ledger = busy.layout.regions[0].ledger
    busy.memory.discard(ledger, PAGE_SIZE)
    go_on(busy, 100)
    records = busy.report().corruptions
    assert records
    assert {record.page for record in records} == {ledger}


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("workload", [name for name in WORKLOADS if name != "sequential"])
def test_every_workload_finds_pages_that_went_back_in_time(system, workload, cpl):
    config = WorkloadConfig(
        workload, memory=2 * MIB, cpl=cpl, touch=8 * PAGE_SIZE, quiet=20, burst=4, throttle=0, hot_percent=50
    )
    with WorkloadGuest.create(system, config) as guest:
        guest.runner.start()
        until_visits(guest, 30)
        guest.runner.pause()
        region = guest.layout.regions[0]
        length = region.pages * region.step
        old = guest.memory.read(region.data, length)
        go_on(guest, 60)
        guest.memory.write(region.data, old)
        go_on(guest, 60)
        report = guest.report()
        assert report.corruption_count > 0
        for record in report.corruptions:
            assert region.data <= record.page < region.data + length


@pytest.mark.parametrize("offset", [0x800, 0x17F8, 0x2400, 0x33F8])
def test_strings_compares_both_ends_of_pattern_and_copy(system, offset):
    config = WorkloadConfig("strings", memory=4 * MIB, touch=32 * PAGE_SIZE)
    with WorkloadGuest.create(system, config) as guest:
        guest.runner.start()
        until(guest, lambda: guest.report().passes >= 2)
        guest.runner.pause()
        word = distant_page(guest) + offset
        guest.memory.write(word, b"\x5a" * 8)
        go_on(guest, 20)
        assert [(record.gpa, record.found) for record in guest.report().corruptions] == [
            (word, 0x5A5A5A5A5A5A5A5A)
        ]


def test_smp_notices_that_the_shared_page_went_back_in_time(system):
    config = WorkloadConfig("smp", memory=4 * MIB, vcpus=2, touch=32 * PAGE_SIZE)
    with WorkloadGuest.create(system, config) as guest:
        guest.runner.start()
        # Both must have seen the count: one that starts later has nothing to compare with.
        until(guest, lambda: all(visits_of(guest, block) > 10 for block in guest.layout.blocks))
        guest.runner.pause()
        guest.memory.write(guest.layout.shared, (3).to_bytes(8, "little"))
        go_on(guest, 500)
        records = guest.report().corruptions
        assert {record.page for record in records} == {guest.layout.shared}
        assert "backwards" in records[0].cause


@pytest.mark.parametrize("workload", ["smp", "strings"])
def test_reports_survive_a_vcpu_block_of_garbage(system, workload):
    """The block is guest memory: it may be lost like any other page."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with WorkloadGuest.create(system, WorkloadConfig(workload, memory=2 * MIB)) as guest:
        for content in (bytes(PAGE_SIZE), b"\xff" * PAGE_SIZE, chance.randbytes(PAGE_SIZE)):
            guest.memory.write(guest.layout.blocks[0], content)
            report = guest.report()
            assert len(report.corruptions) <= 64
            assert all(str(record) for record in report.corruptions)


def test_corruption_callback_and_exit_status(system):
    config = WorkloadConfig("sequential", memory=4 * MIB, touch=8 * PAGE_SIZE)
    seen = []
    with WorkloadGuest.create(system, config) as guest:
        guest.on_corruption = seen.append
        guest.runner.start()
        until(guest, lambda: guest.report().passes >= 2)
        guest.runner.pause()
        guest.memory.write(guest.layout.regions[0].data, b"\x11" * PAGE_SIZE)
        limit = guest.report().passes + 1000
        guest.memory.write(guest.layout.blocks[0] + Block.PASS_LIMIT, limit.to_bytes(8, "little"))
        guest.runner.resume()
        assert guest.runner.wait(patient(20)) == 1
        report = guest.report()
        assert tuple(seen) == report.corruptions
        # The whole page was overwritten: 512 words, each of which is found once, of which 64 are recorded.
        assert len(report.corruptions) == 64
        assert report.corruption_count > 64


# --- exceptions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize(
    ("code", "name"),
    [
        (b"\x48\x8b\x04\x25\x10\x00\x00\x00", r"#PF \(vector 14, error code 0x[04]\).*CR2 0x10"),
        (b"\x0f\x0b", r"#UD \(vector 6, error code 0x0\)"),
        (b"\x31\xc9\xf7\xf1", r"#DE \(vector 0, error code 0x0\)"),
    ],
    ids=["null pointer", "ud2", "division by zero"],
)
def test_exceptions_are_reported_with_vector_rip_and_cr2(system, cpl, code, name):
    with WorkloadGuest.create(system, WorkloadConfig("sequential", memory=2 * MIB, cpl=cpl)) as guest:
        guest.memory.write(0x9000, code)
        vcpu = guest.machine.vcpus[0]
        registers = vcpu.get_registers()
        registers.rip = 0x9000
        vcpu.set_registers(registers)
        guest.runner.start()
        at = 0x9002 if code[0] == 0x31 else 0x9000
        with pytest.raises(GuestError, match=rf"vCPU 0 took {name}") as error:
            guest.runner.wait(patient(10))
        assert f"at RIP {at:#x}, CPL {cpl}" in str(error.value)


def test_triple_fault_is_reported(system):
    with WorkloadGuest.create(system, WorkloadConfig("sequential", memory=2 * MIB)) as guest:
        vcpu = guest.machine.vcpus[0]
        special = vcpu.get_special_registers()
        special.idt.limit = 0
        vcpu.set_special_registers(special)
        guest.memory.write(0x9000, b"\x0f\x0b")
        registers = vcpu.get_registers()
        registers.rip = 0x9000
        vcpu.set_registers(registers)
        guest.runner.start()
        with pytest.raises(GuestError, match="triple fault"):
            guest.runner.wait(patient(10))


# --- memory, adoption, rings ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "memory", [64 * GIB, pytest.param(1 << 40, marks=pytest.mark.slow)], ids=["64 GiB", "1 TiB"]
)
def test_large_sparse_memory_touches_a_thousand_scattered_pages(system, memory):
    memory = min(memory, (1 << physical_address_bits(system.supported_cpuid)) - GIB)
    config = WorkloadConfig("stride", memory=memory, touch=1000 * PAGE_SIZE, passes=20)
    with WorkloadGuest.create(system, config) as guest:
        guest.runner.start()
        assert guest.runner.wait(patient(60)) == 0
        region = guest.layout.regions[0]
        assert region.pages == 1000
        assert region.page_address(999) > 0.99 * memory
        # 4 KiB of page tables per GiB, the pages themselves, and little else.
        assert guest.memory.allocated < memory // MIB * 4 + 1000 * PAGE_SIZE + 256 * 1024
        assert guest.report().corruption_count == 0
        slots = guest.machine.slots
        assert [(slot.gpa, slot.size) for slot in slots.values()] == [
            (0, 3 * GIB),
            (4 * GIB, memory - 3 * GIB),
        ]


def test_memory_ends_where_the_physical_addresses_of_a_guest_do(system, monkeypatch):
    """The hole below 4 GiB counts: 4 GiB of memory end at 5 GiB."""
    config = WorkloadConfig("stride", memory=4 * GIB, touch=1000 * PAGE_SIZE)
    for bits in (32, 33):
        leaves = [replace(e, eax=bits) if e.function == 0x80000008 else e for e in system.supported_cpuid]
        with system.create_machine() as machine:
            monkeypatch.setattr(type(machine), "supported_cpuid", leaves)
        if bits == 32:
            with pytest.raises(UsageError, match=r"4096 MiB .* 32 physical .* at most 3072 MiB"):
                WorkloadGuest.create(system, config)
        else:
            WorkloadGuest.create(system, config).close()


def test_memory_above_the_hole_is_where_the_second_slot_says(system):
    """A page beyond 3 GiB of memory is reported with its guest-physical address, beyond 4 GiB."""
    config = WorkloadConfig("sequential", memory=4 * GIB, touch=16 * PAGE_SIZE)
    with WorkloadGuest.create(system, config) as guest:
        guest.runner.start()
        until(guest, lambda: guest.report().passes >= 2)
        guest.runner.pause()
        page = guest.layout.regions[0].page_address(15)
        assert page > 3 * GIB
        guest.memory.write(page, b"\x77" * PAGE_SIZE)
        go_on(guest, 1000)
        assert {record.page for record in guest.report().corruptions} == {gpa_of(page)}
        assert gpa_of(page) == page + GIB


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("workload", ["hotspot", "strings", "smp"])
def test_adopted_guest_goes_on_from_memory_and_registers(system, workload, cpl):
    """What a migration does, in one process: copy memory and vCPU states to another machine."""
    config = WorkloadConfig(workload, memory=2 * MIB, cpl=cpl, vcpus=2, touch=64 * PAGE_SIZE)
    visits = 10 if slow(system, workload) else 100
    with WorkloadGuest.create(system, config) as source:
        source.runner.start()
        until_visits(source, visits)
        source.runner.pause()
        before = source.report()
        machine = system.create_machine()
        memory = GuestMemory(config.memory)
        memory.write(0, source.memory.read(0, config.memory))
        machine.create_slot(memory, 0)
        for vcpu in source.machine.vcpus:
            machine.create_vcpu(vcpu.id).load_state(vcpu.save_state())
        with WorkloadGuest.adopt(machine, memory, config) as copy:
            assert copy.report() == before
            copy.runner.start()
            until_visits(copy, 2 * visits)
            assert copy.report().corruption_count == 0
        assert source.report() == before


def test_adopt_refuses_a_machine_that_does_not_fit(system):
    with system.create_machine() as machine, GuestMemory(2 * MIB) as memory:
        with pytest.raises(UsageError, match="vCPUs"):
            WorkloadGuest.adopt(machine, memory, WorkloadConfig(memory=2 * MIB))


@pytest.mark.parametrize(("workload", "cpl"), [(name, 3) for name in WORKLOADS] + [("random", 0), ("smp", 0)])
def test_smallest_dirty_ring_overflows_in_no_guest(system, workload, cpl):
    """CPL 0 guests keep their stores apart, so that even a host that emulates in batches keeps up."""
    config = WorkloadConfig(workload, memory=LEAST_RING * 16384, cpl=cpl, vcpus=2, quiet=100)
    full: list[int] = []

    def enable(machine):
        machine.enable_dirty_ring(LEAST_RING)

    with WorkloadGuest.create(system, config, prepare=enable) as guest:

        def collect(vcpu):
            guest.machine.collect_rings([vcpu])
            full.append(vcpu.id)

        guest.runner.on_ring_full = collect
        for slot in guest.machine.slots.values():
            slot.set_flags(slot.flags | slot.flags.__class__.LOG_DIRTY_PAGES)
        guest.runner.start()
        until(guest, lambda: len(full) >= (2 if slow(system, workload) else 6))
        guest.runner.pause()
        assert guest.report().corruption_count == 0


def test_full_ring_without_a_tracker_is_an_error(system):
    def enable(machine):
        machine.enable_dirty_ring(LEAST_RING)

    config = WorkloadConfig("sequential", memory=LEAST_RING * 16384)
    with WorkloadGuest.create(system, config, prepare=enable) as guest:
        for slot in guest.machine.slots.values():
            slot.set_flags(slot.flags.__class__.LOG_DIRTY_PAGES)
        guest.runner.start()
        with pytest.raises(RingOverflowError, match="nobody collects"):
            guest.runner.wait(patient(20))


def test_create_cleans_up_when_prepare_fails(system):
    machines = []

    def fail(machine):
        machines.append(machine)
        raise KvmError(22, "KVM_ENABLE_CAP")

    with pytest.raises(KvmError):
        WorkloadGuest.create(system, WorkloadConfig(memory=2 * MIB), prepare=fail)
    assert machines[0].closed


@pytest.mark.parametrize("cpl", [0, 3])
def test_pause_and_resume_storm_on_a_running_guest(system, cpl):
    config = WorkloadConfig("smp", memory=4 * MIB, cpl=cpl, vcpus=3, touch=64 * PAGE_SIZE)
    with WorkloadGuest.create(system, config) as guest:
        guest.runner.start()
        last = 0
        for _ in range(60):
            guest.runner.pause()
            visits = guest.report().visits
            assert visits >= last
            assert guest.report().visits == visits
            last = visits
            guest.runner.resume()
        until_visits(guest, 100)
        assert guest.report().corruption_count == 0


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"workload": "nonsense"},
        {"memory": 3 * MIB},
        {"memory": 0},
        {"memory": 2 << 40},
        {"vcpus": 0},
        {"vcpus": 65},
        {"cpl": 1},
        {"seed": -1},
        {"passes": -1},
        {"touch": 1 << 63},
        {"hot_percent": 101},
        {"stride": 0},
        {"burst": 0},
        {"throttle": -1},
    ],
)
def test_bad_configurations_are_refused(arguments):
    with pytest.raises(UsageError):
        WorkloadConfig(**arguments)


def test_memory_too_small_for_the_vcpus_is_refused():
    with pytest.raises(UsageError, match="too small"):
        Layout.of(WorkloadConfig(memory=2 * MIB, vcpus=64))


@pytest.mark.parametrize("vcpus", [1, 3, 64])
@pytest.mark.parametrize("memory", [8 * MIB, 64 * MIB, 4 * GIB, 1 << 40])
@pytest.mark.parametrize("touch", [0, 4 * MIB])
@pytest.mark.parametrize("workload", ["random", "strings"])
def test_regions_are_disjoint_and_within_memory(vcpus, memory, touch, workload):
    layout = Layout.of(WorkloadConfig(workload, memory=memory, vcpus=vcpus, touch=touch))
    unit = 4 * PAGE_SIZE if workload == "strings" else PAGE_SIZE
    end = layout.data_start
    for region in layout.regions:
        assert region.ledger >= end
        assert region.data >= region.ledger + 8 * region.pages
        assert region.step >= unit
        assert region.step % PAGE_SIZE == region.data % PAGE_SIZE == 0
        end = region.page_address(region.pages - 1) + unit
        if touch:
            assert region.pages <= touch // unit // vcpus
    assert end <= memory
