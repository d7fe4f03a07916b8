"""A GPU's page tables in guest memory, shadowed by what the write-tracker reports, against a fresh walk.

The guest edits its tables in every way that it has; after each step the shadow's mappings must be those of a
walk through guest memory, and exactly the tables of that walk are tracked.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from pykvm.errors import SlotAbsentError
from pykvm.guest.ppgtt import PRESENT, TOP, WRITABLE, Mapping, Ppgtt, entries, walk
from pykvm.machine import System
from pykvm.memory import PAGE_SIZE, GuestMemory
from tests.patience import patient

from .writing import PAGES, Writing, tracking_system, word

P, PW = PRESENT, PRESENT | WRITABLE
ROOT = 0x210
POOL = range(ROOT, ROOT + 12)
"""Pages that serve as tables, at whatever level they are linked."""
SOURCE = 0x230 * PAGE_SIZE

MOV8, MOV4, MOV1 = "488907", "8907", "8807"
XCHG, CMPXCHG, BTS, AND1 = "488707", "f0480fb10f", "480fab07", "2007"
MOVUPS, STOSQ, MOVSQ = "0f10060f1107", "f348ab", "f348a5"


class Gpu:
    """A guest with a GPU."""

    def __init__(self, system: System, cpl: int, vcpus: int = 1) -> None:
        self.guest = Writing(system.create_machine(), cpl=cpl, vcpus=vcpus)
        self.tracker = self.guest.tracker
        self.ppgtt = Ppgtt(ROOT, self.read, self.tracker)
        self.tracker.register(self.ppgtt)

    def read(self, gfn: int) -> bytes | None:
        return self.guest.memory.read(gfn * PAGE_SIZE, PAGE_SIZE) if gfn < PAGES else None

    def store(self, code: str, gfn: int, offset: int, *, number: int = 0, **registers: int) -> None:
        registers.setdefault("rsi", SOURCE)
        self.guest.run(bytes.fromhex(code), number, rdi=gfn * PAGE_SIZE + offset, **registers)

    def link(self, gfn: int, index: int, target: int, bits: int = PW) -> None:
        self.store(MOV8, gfn, 8 * index, rax=target * PAGE_SIZE | bits)

    def reachable(self, gfn: int = ROOT, level: int = TOP) -> set[tuple[int, int]]:
        table = self.read(gfn)
        if table is None:
            return set()
        found = {(gfn, level)}
        if level > 1:
            for _, entry in entries(table):
                found |= self.reachable(entry >> 12 & (1 << 40) - 1, level - 1)  # bits 51:12
        return found

    def check(self) -> None:
        assert self.ppgtt.mappings() == walk(self.read, ROOT)
        assert self.ppgtt.tables == self.reachable()
        levels = [gfn for gfn, _ in self.reachable()]
        assert {gfn: self.tracker.count(gfn) for gfn in POOL if self.tracker.count(gfn)} == {
            gfn: levels.count(gfn) for gfn in levels if gfn in POOL
        }


@pytest.fixture(params=[3, 0], ids=["cpl3", "cpl0"])
def gpu(tracking_system: System, request: pytest.FixtureRequest) -> Iterator[Gpu]:
    made = Gpu(tracking_system, request.param)
    with made.guest:
        yield made


def build(gpu: Gpu) -> None:
    """ROOT[0] to 0x211[1] to 0x212[2] to 0x213[3] to page 0x300, read-only at the PD's level."""
    gpu.link(ROOT, 0, 0x211)
    gpu.link(0x211, 1, 0x212)
    gpu.link(0x212, 2, 0x213, P)
    gpu.link(0x213, 3, 0x300)


VA = 1 << 30 | 2 << 21 | 3 << 12


def test_a_mapping_is_built_and_translated(gpu: Gpu) -> None:
    assert gpu.ppgtt.translate(VA) is None
    build(gpu)
    gpu.check()
    assert gpu.ppgtt.mappings() == {VA >> 12: Mapping(0x300000, writable=False)}
    assert gpu.ppgtt.translate(VA + 0x123) == 0x300123
    assert gpu.ppgtt.translate(VA, write=True) is None
    gpu.store(BTS, 0x212, 16, rax=1)  # W
    assert gpu.ppgtt.translate(VA + 8, write=True) == 0x300008
    assert gpu.tracker.gfns == {ROOT, 0x211, 0x212, 0x213}


def test_building_bottom_up_tracks_tables_when_they_are_linked(gpu: Gpu) -> None:
    gpu.link(0x213, 3, 0x300)
    gpu.link(0x212, 2, 0x213)
    assert gpu.tracker.gfns == {ROOT}
    gpu.link(ROOT, 0, 0x211)
    gpu.link(0x211, 1, 0x212)
    gpu.check()
    assert gpu.tracker.gfns == {ROOT, 0x211, 0x212, 0x213}


def test_unlinking_ends_the_tracking_of_the_branch_unless_another_holds_it(gpu: Gpu) -> None:
    build(gpu)
    gpu.link(0x211, 5, 0x212)
    gpu.store(MOV8, 0x211, 8, rax=0)
    gpu.check()
    assert gpu.tracker.gfns == {ROOT, 0x211, 0x212, 0x213}
    gpu.store(AND1, 0x211, 40, rax=0xFE)  # P of the second link goes with a byte
    gpu.check()
    assert gpu.tracker.gfns == {ROOT, 0x211}
    gpu.store(MOV8, 0x213, 0, rax=0x301000 | P)
    gpu.check()


def test_halves_of_an_entry_take_effect_one_by_one(gpu: Gpu) -> None:
    """As the guest's memory does; the first half alone may link a table that nobody meant."""
    build(gpu)
    gpu.store(MOV4, ROOT, 8 * 7 + 4, rax=0x1)
    gpu.check()
    gpu.store(MOV4, ROOT, 8 * 7, rax=0x211000 | P)
    gpu.check()
    assert gpu.ppgtt.translate(7 << 39 | VA) is None  # the frame lies beyond the guest's memory
    gpu.store(MOV4, ROOT, 8 * 7 + 4, rax=0)
    gpu.check()
    assert gpu.ppgtt.translate(7 << 39 | VA) == 0x300000


def test_one_store_into_two_entries_links_and_unlinks_both(gpu: Gpu) -> None:
    """mov [rdi], rax at offset 4: the upper half of entry 0 and the lower half of entry 1."""
    build(gpu)
    gpu.store(MOV8, ROOT, 4, rax=(0x214 * PAGE_SIZE | PW) << 32)
    gpu.check()
    assert gpu.tracker.gfns == {ROOT, 0x211, 0x212, 0x213, 0x214}
    gpu.store(MOV8, ROOT, 4, rax=1)
    gpu.check()
    assert gpu.tracker.gfns == {ROOT}


def test_a_table_that_points_to_itself_is_walked_once_per_level(gpu: Gpu) -> None:
    gpu.link(ROOT, 5, ROOT)
    gpu.check()
    assert gpu.tracker.count(ROOT) == 4
    gpu.link(ROOT, 6, ROOT)
    gpu.check()
    assert len(gpu.ppgtt.mappings()) == 16
    gpu.store(MOV8, ROOT, 40, rax=0)
    gpu.store(MOV8, ROOT, 48, rax=0)
    gpu.check()
    assert gpu.tracker.count(ROOT) == 1


def test_tables_in_a_slot_that_goes_are_forgotten(gpu: Gpu) -> None:
    guest = gpu.guest
    with GuestMemory(4 * PAGE_SIZE) as more:
        base = PAGES + 64
        slot = guest.machine.create_slot(more, base * PAGE_SIZE)
        plain = gpu.read
        gpu.ppgtt._read = lambda gfn: (
            more.read((gfn - base) * PAGE_SIZE, PAGE_SIZE) if 0 <= gfn - base < 4 else plain(gfn)
        )
        build(gpu)
        more.write(0, word(0x212 * PAGE_SIZE | PW))
        gpu.link(ROOT, 1, base)
        gpu.link(0x211, 1, base + 1)
        assert len(gpu.ppgtt.mappings()) == 1
        assert gpu.ppgtt.tables == {
            (ROOT, 4), (0x211, 3), (base + 1, 2), (base, 3), (0x212, 2), (0x213, 1)
        }  # fmt: skip
        slot.delete()
        assert gpu.ppgtt.tables == {(ROOT, 4), (0x211, 3)}
        assert gpu.tracker.gfns == {ROOT, 0x211}
        gpu.check()


def test_giving_up_ends_all_tracking(gpu: Gpu) -> None:
    build(gpu)
    gpu.ppgtt.close()
    gpu.ppgtt.close()
    assert gpu.tracker.gfns == frozenset()
    assert gpu.ppgtt.mappings() == {}
    with pytest.raises(SlotAbsentError):
        Ppgtt(PAGES, gpu.read, gpu.tracker)


class Edit(NamedTuple):
    """``code`` at ``offset`` of table ``gfn``; ``source`` goes to where RSI points."""

    code: str
    gfn: int
    offset: int
    registers: dict[str, int]
    source: bytes = b""


def random_edit(choose: random.Random) -> Edit:
    """Entries 0, 1 and 511 of few tables, so that paths through four levels come about."""

    def entry() -> int:
        if choose.random() < 0.15:
            return choose.choice([0, choose.randrange(1 << 64), PAGES * PAGE_SIZE | PW])
        return choose.choice(POOL) * PAGE_SIZE | choose.choice([P, PW, PW, PW, 0])

    gfn = choose.choice([ROOT, *POOL])
    at = 8 * choose.choice([0, 0, 1, 511])
    code = choose.choice([MOV8] * 6 + [MOV4, MOV1, XCHG, CMPXCHG, BTS, AND1, MOVUPS, STOSQ, MOVSQ])
    registers = {"rax": entry(), "rcx": entry()}
    source = b""
    if code == MOV4:
        at += choose.choice([0, 4])
        registers["rax"] = entry() >> choose.choice([0, 32])
    elif code == MOV8 and at < 16 and choose.random() < 0.3:
        at += 4
        registers["rax"] = entry() << 32 & (1 << 64) - 1
    elif code == MOV1:
        at += choose.randrange(8)
    elif code == CMPXCHG:
        registers["rax"] = choose.choice([0, entry()])
    elif code == BTS:
        registers["rax"] = choose.choice([0, 1])
    elif code == MOVUPS:
        at = choose.choice([0, 8 - 4, PAGE_SIZE - 8, PAGE_SIZE - 16])
        source = word(entry()) + word(entry())
    elif code == STOSQ:
        at, registers = 0, {"rax": 0, "rcx": 512}
    elif code == MOVSQ:
        registers["rcx"] = choose.randrange(1, 4)
        source = b"".join(word(entry()) for _ in range(3))
        at = min(at, PAGE_SIZE - 16)
    return Edit(code, gfn, at, registers, source)


@pytest.mark.parametrize("number", range(3))
def test_random_edits_leave_the_shadow_in_step(gpu: Gpu, number: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}: 80 times random_edit(random.Random({seed}))")
    choose = random.Random(seed)
    build(gpu)
    most = 0
    for _ in range(80):
        edit = random_edit(choose)
        gpu.guest.memory.write(SOURCE, edit.source)
        gpu.store(edit.code, edit.gfn, edit.offset, **edit.registers)
        gpu.check()
        most = max(most, len(gpu.ppgtt.mappings()))
    assert most


def test_two_vcpus_edit_at_once(tracking_system: System) -> None:
    """Their callbacks track and untrack tables while the other one is in the guest; in the end all is right.

    Each edits the words of its own half of every table, since a store of both to one word has no order that
    the test could know.
    """
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    gpu = Gpu(tracking_system, 3, vcpus=2)
    failed: list[BaseException] = []

    def edit(number: int, choose: random.Random) -> None:
        try:
            for _ in range(60):
                gfn = choose.choice([ROOT, *POOL])
                at = 8 * (2 * choose.choice([0, 1, 255]) + number)
                entry = choose.choice([*POOL, 0x300]) * PAGE_SIZE | choose.choice([PW, P, 0])
                gpu.store(MOV8, gfn, at, number=number, rax=entry)
        except BaseException as error:
            failed.append(error)

    with gpu.guest:
        threads = [threading.Thread(target=edit, args=(n, random.Random(seed + n))) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(patient(60))
        assert not any(thread.is_alive() for thread in threads)
        assert failed == []
        gpu.check()


__all__ = ["tracking_system"]
