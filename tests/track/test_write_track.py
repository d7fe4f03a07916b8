"""The write-tracker on real KVM and on the model, at CPL 3 and CPL 0: the same notifications, and no others.

What must be reported follows from the instruction: its destination operand, what it stores there (SDM
vol. 2), and the pieces that docs/write-tracking.md promises.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from pykvm.errors import SlotAbsentError, UsageError
from pykvm.machine import MAX_TRACK_COUNT, PageTracking, System
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.track.carved import CarvedMachine
from pykvm.track.write_track import WriteTracker

from .writing import (
    BACKENDS,
    DATA,
    PAGES,
    Recorder,
    Removal,
    Write,
    Writing,
    open_backend,
    tracking_system,
    word,
)

BEFORE, FIRST, SECOND, AFTER = range(0x20F, 0x213)
"""Untracked, tracked, tracked, untracked."""
SOURCE = 0x205 * PAGE_SIZE
T, T2, END = (gfn * PAGE_SIZE for gfn in (FIRST, SECOND, AFTER))
V = 0x8877665544332211
W = 0x0102030405060708
OLD = 0xA1B2C3D4E5F60718
"""What is in memory at RDI before each case."""


@pytest.fixture(params=[3, 0], ids=["cpl3", "cpl0"])
def guest(tracking_system: System, request: pytest.FixtureRequest) -> Iterator[Writing]:
    with Writing(tracking_system.create_machine(), cpl=request.param) as made:
        made.tracker.add_gfn(FIRST)
        made.tracker.add_gfn(SECOND)
        yield made


class Case(NamedTuple):
    """``code`` with RDI = ``at``, RAX = V, RCX = W, RSI = SOURCE unless ``registers`` say otherwise."""

    text: str
    code: str
    at: int
    writes: list[tuple[int, bytes]]
    registers: dict[str, int] = {}  # noqa: RUF012


SOURCE_BYTES = bytes(range(0x40, 0x80))
S = SOURCE_BYTES
HI, LO = V >> 32, V & 0xFFFFFFFF

CASES = [
    Case("mov [rdi], al", "8807", T + 3, [(T + 3, word(V, 1))]),
    Case("mov [rdi], ax", "668907", T + 2, [(T + 2, word(V, 2))]),
    Case("mov [rdi], eax", "8907", T + 4, [(T + 4, word(V, 4))]),
    Case("mov [rdi], rax", "488907", T + 8, [(T + 8, word(V))]),
    Case("mov [rdi], rax, odd address", "488907", T + 0x123, [(T + 0x123, word(V))]),
    Case("mov dword ptr [rdi], imm", "c70778563412", T, [(T, word(0x12345678, 4))]),
    Case("mov qword ptr [rdi], -2", "48c707feffffff", T, [(T, word(-2))]),
    Case("movnti [rdi], rax", "480fc307", T, [(T, word(V))]),
    Case("last byte of the last page", "8807", END - 1, [(END - 1, word(V, 1))]),
    Case("memory, then tracked", "488907", T - 3, [(T, word(V)[3:])]),
    Case("tracked, then memory", "488907", END - 5, [(END - 5, word(V)[:5])]),
    Case("tracked, then tracked", "488907", T2 - 2, [(T2 - 2, word(V)[:2]), (T2, word(V)[2:])]),
    Case("rep movsb", "f3a4", T + 1, [(T + 1 + i, S[i : i + 1]) for i in range(5)], {"rcx": 5}),
    Case(
        "std; rep movsb; cld",
        "fdf3a4fc",
        T + 9,
        [(T + 9 - i, S[9 - i : 10 - i]) for i in range(4)],
        {"rcx": 4, "rsi": SOURCE + 9},
    ),
    Case("rep stosq", "f348ab", T + 16, [(T + 16 + 8 * i, word(V)) for i in range(3)], {"rcx": 3}),
    Case(
        "rep stosq from memory over both pages into memory",
        "f348ab",
        T - 8,
        [(T + 8 * i, word(V)) for i in range(1024)],
        {"rcx": 1026},
    ),
    Case(
        "std; rep stosw; cld",
        "fd66f3abfc",
        T2 + 2,
        [(T2 + 2 - 2 * i, word(V, 2)) for i in range(4)],
        {"rcx": 4},
    ),
    Case("stosd", "ab", T, [(T, word(V, 4))]),
    Case("movsw", "66a5", T, [(T, S[:2])]),
    Case("movsq", "48a5", T, [(T, S[:8])]),
    Case("rep stosb, nothing", "f3aa", T, [], {"rcx": 0}),
    Case("lock add [rdi], eax", "f00107", T, [(T, word(OLD + V, 4))]),
    Case("lock inc qword ptr [rdi]", "f048ff07", T, [(T, word(OLD + 1))]),
    Case("lock xadd [rdi], ecx", "f00fc10f", T, [(T, word(OLD + W, 4))]),
    Case("xchg [rdi], rax", "488707", T, [(T, word(V))]),
    Case("xchg [rdi], ax", "668707", T, [(T, word(V, 2))]),
    Case("lock cmpxchg [rdi], rcx, success", "f0480fb10f", T, [(T, word(W))], {"rax": OLD}),
    Case("lock cmpxchg [rdi], rcx, failure", "f0480fb10f", T, [(T, word(OLD))]),
    Case("cmpxchg [rdi], ecx, success", "0fb10f", T, [(T, word(W, 4))], {"rax": OLD & 0xFFFFFFFF}),
    Case("cmpxchg [rdi], ecx, failure", "0fb10f", T, [(T, word(OLD, 4))]),
    Case(
        "lock cmpxchg8b [rdi], success",
        "f00fc70f",
        T,
        [(T, word(W, 4) + word(HI, 4))],
        {"rax": OLD & 0xFFFFFFFF, "rdx": OLD >> 32, "rbx": W, "rcx": HI},
    ),
    Case("lock cmpxchg8b [rdi], failure", "f00fc70f", T, [(T, word(OLD))], {"rdx": 1}),
    Case("cmpxchg8b [rdi], failure", "0fc70f", T, [(T, word(OLD))], {"rdx": 1}),
    Case("bts qword ptr [rdi], 5", "480fba2f05", T, [(T, word(OLD | 1 << 5))]),
    Case("bts qword ptr [rdi], rax, far", "480fab07", T, [(T + 64, word(1 << 3))], {"rax": 515}),
    Case("or byte ptr [rdi], 1", "800f01", T, [(T, word(OLD | 1, 1))]),
    Case("and [rdi], eax", "2107", T, [(T, word(OLD & V, 4))]),
    Case("neg word ptr [rdi]", "66f71f", T, [(T, word(-OLD, 2))]),
    Case("not qword ptr [rdi]", "48f717", T, [(T, word(~OLD))]),
    Case("shl dword ptr [rdi], 4", "c12704", T, [(T, word((OLD & 0xFFFFFFFF) << 4, 4))]),
    Case("add qword ptr [rdi], 0", "48830700", T, [(T, word(OLD))]),
    Case("setc byte ptr [rdi]", "0f9207", T, [(T, b"\0")]),
    Case("movups [rdi], xmm0", "0f10060f1107", T + 8, [(T + 8, S[:8]), (T + 16, S[8:16])]),
    Case("movaps [rdi], xmm0", "0f10060f2907", T + 16, [(T + 16, S[:8]), (T + 24, S[8:16])]),
    Case("movdqu [rdi], xmm0", "f30f6f06f30f7f07", T + 3, [(T + 3, S[:8]), (T + 11, S[8:16])]),
    Case(
        "movups, tracked, then tracked",
        "0f10060f1107",
        T2 - 5,
        [(T2 - 5, S[:5]), (T2, S[5:13]), (T2 + 8, S[13:16])],
    ),
    Case("movups, memory, then tracked", "0f10060f1107", T - 4, [(T, S[4:12]), (T + 8, S[12:16])]),
    Case("movups, tracked, then memory", "0f10060f1107", END - 3, [(END - 3, S[:3])]),
    Case("push rax", "50", T, [(T2 + 8, word(V))], {"rsp": T2 + 16}),
    Case("push 0x55", "6a55", T, [(T2 + 8, word(0x55))], {"rsp": T2 + 16}),
    Case("push over the border", "50", T, [(T2 - 4, word(V)[:4]), (T2, word(V)[4:])], {"rsp": T2 + 4}),
    Case("call", "e800000000", T, [(T2, word(0x1005))], {"rsp": T2 + 8}),
    Case("pop qword ptr [rdi]", "8f07", T, [(T, S[:8])], {"rsp": SOURCE}),
    Case("reads only", "4839078507488b1f", T, []),
    Case("beside the tracked pages", "488907", T - 8, []),
    Case("behind the tracked pages", "488907", END, []),
]


@pytest.mark.parametrize("case", CASES, ids=[case.text for case in CASES])
def test_every_kind_of_store_is_reported_with_its_bytes(guest: Writing, case: Case) -> None:
    guest.memory.write(SOURCE, SOURCE_BYTES)
    at = case.at
    if at + 8 <= PAGES * PAGE_SIZE:
        guest.memory.write(at, word(OLD))
    before = guest.memory.read(T - PAGE_SIZE, 4 * PAGE_SIZE)
    registers = {"rax": V, "rcx": W, "rdx": 0, "rbx": 0, "rsi": SOURCE, "rdi": at} | case.registers
    guest.run(bytes.fromhex(case.code), **registers)
    assert guest.writes() == [Write(*write) for write in case.writes]
    # Whoever replays the notifications onto the old contents has the new ones.
    replayed = bytearray(before)
    for gpa, new in case.writes:
        start = gpa - T + PAGE_SIZE
        replayed[start : start + len(new)] = new
    after = guest.memory.read(T - PAGE_SIZE, 4 * PAGE_SIZE)
    assert after[PAGE_SIZE : 3 * PAGE_SIZE] == replayed[PAGE_SIZE : 3 * PAGE_SIZE]


def test_the_parts_of_a_store_in_ordinary_memory_arrive_there(guest: Writing) -> None:
    guest.run(bytes.fromhex("488907"), rdi=T - 3, rax=V)
    assert guest.memory.read(T - 3, 8) == word(V)
    guest.run(bytes.fromhex("488907"), rdi=END - 5, rax=W)
    assert guest.memory.read(END - 5, 8) == word(W)


def test_the_callback_finds_memory_changed(guest: Writing) -> None:
    found: list[bytes] = []
    guest.tracker.register(Recorder(lambda gpa, new: found.append(guest.memory.read(gpa, len(new)))))
    guest.run(bytes.fromhex("488907 8807"), rdi=T, rax=V)
    assert found == [word(V), word(V, 1)]


def test_a_guest_reads_its_own_writes_back(guest: Writing) -> None:
    """mov [rdi], rax; mov rbx, [rdi]; inc rbx; mov [rdi+8], rbx"""
    guest.run(bytes.fromhex("488907 488b1f 48ffc3 48895f08"), rdi=T, rax=V)
    assert guest.writes() == [Write(T, word(V)), Write(T + 8, word(V + 1))]


# --- counts and nodes --------------------------------------------------------------------------------------


def test_counts_are_references(guest: Writing) -> None:
    tracker = guest.tracker
    tracker.add_gfn(FIRST)
    tracker.remove_gfn(FIRST)
    assert tracker.count(FIRST) == 1
    guest.run(bytes.fromhex("488907"), rdi=T, rax=V)
    assert len(guest.writes()) == 1
    tracker.remove_gfn(FIRST)
    assert tracker.gfns == {SECOND}
    guest.run(bytes.fromhex("488907"), rdi=T, rax=W)
    assert guest.writes() == []
    assert guest.memory.read(T, 8) == word(W)
    with pytest.raises(UsageError, match="not tracked"):
        tracker.remove_gfn(FIRST)


def test_a_page_without_a_slot_is_refused(guest: Writing) -> None:
    for method in (guest.tracker.add_gfn, guest.tracker.remove_gfn):
        with pytest.raises(SlotAbsentError, match=r"no (mem)?slot"):
            method(PAGES)
    assert guest.tracker.gfns == {FIRST, SECOND}


def test_the_count_has_16_bits(guest: Writing) -> None:
    for _ in range(MAX_TRACK_COUNT - 1):
        guest.tracker.add_gfn(FIRST)
    with pytest.raises(UsageError, match="65535 times"):
        guest.tracker.add_gfn(FIRST)
    assert guest.tracker.count(FIRST) == MAX_TRACK_COUNT
    guest.tracker.close()
    guest.run(bytes.fromhex("488907"), rdi=T, rax=V)
    assert guest.writes() == []


def test_nodes_are_called_newest_first_until_they_are_unregistered(guest: Writing) -> None:
    order: list[str] = []
    nodes = {name: Recorder(lambda gpa, new, name=name: order.append(name)) for name in "abc"}
    for node in nodes.values():
        guest.tracker.register(node)
    with pytest.raises(UsageError, match="registered already"):
        guest.tracker.register(nodes["a"])
    guest.run(bytes.fromhex("8807"), rdi=T)
    assert order == ["c", "b", "a"]
    guest.tracker.unregister(nodes["b"])
    with pytest.raises(UsageError, match="not registered"):
        guest.tracker.unregister(nodes["b"])
    guest.run(bytes.fromhex("8807"), rdi=T)
    assert order == ["c", "b", "a", "c", "a"]


def test_a_node_may_unregister_itself_and_others(guest: Writing) -> None:
    old = Recorder()
    guest.tracker.register(old)

    def leave(gpa: int, new: bytes) -> None:
        guest.tracker.unregister(new_node)
        guest.tracker.unregister(old)

    new_node = Recorder(leave)
    guest.tracker.register(new_node)
    guest.run(bytes.fromhex("8807 8807"), rdi=T)
    assert len(new_node.calls) == 1
    assert old.calls == []
    assert len(guest.writes()) == 2


def test_what_a_node_raises_comes_out_of_run_after_all_were_told(guest: Writing) -> None:
    def fail(gpa: int, new: bytes) -> None:
        raise LookupError("mine")

    node = Recorder(fail)
    guest.tracker.register(node)
    vcpu = guest.load(bytes.fromhex("488907") + b"\xe6\x10", rdi=T, rax=V)
    with pytest.raises(LookupError, match="mine"):
        guest.finish(vcpu)
    assert guest.writes() == [Write(T, word(V))]
    guest.tracker.unregister(node)
    guest.finish(vcpu)
    # The model's page track stands within the instruction, which is then made anew.
    again = [] if isinstance(guest.machine, CarvedMachine) else [Write(T, word(V))]
    assert guest.writes() == again
    assert guest.memory.read(T, 8) == word(V)


def test_a_callback_may_track_and_untrack(guest: Writing) -> None:
    """As a GPU's model does when a table is linked: the very next instruction is under the new rule."""
    tracker = guest.tracker

    def change(gpa: int, new: bytes) -> None:
        if gpa == T:
            tracker.add_gfn(AFTER)
            tracker.remove_gfn(SECOND)

    tracker.register(Recorder(change))
    # mov [rdi], rax; mov [rdi+0x1000], rax; mov [rdi+0x2000], rax
    guest.run(bytes.fromhex("488907 48898700100000 48898700200000"), rdi=T, rax=V)
    assert guest.writes() == [Write(T, word(V)), Write(END, word(V))]
    assert guest.memory.read(T2, 8) == word(V)


def test_untracking_in_the_middle_of_a_store_loses_no_byte(guest: Writing) -> None:
    """Its second piece lies in a page that is not tracked any more when it comes: written, not reported."""
    guest.memory.write(SOURCE, SOURCE_BYTES)

    def untrack(gpa: int, new: bytes) -> None:
        guest.tracker.unregister(node)
        guest.tracker.remove_gfn(SECOND)

    node = Recorder(untrack)
    guest.tracker.register(node)
    guest.run(bytes.fromhex("0f1006 0f1107"), rdi=T2 - 8, rsi=SOURCE)
    assert guest.writes() == [Write(T2 - 8, S[:8])]
    assert guest.memory.read(T2 - 8, 16) == S[:16]


def test_two_trackers_share_a_machine(guest: Writing) -> None:
    with WriteTracker(guest.machine) as other:
        assert other.machine is guest.machine
        node = Recorder()
        other.register(node)
        other.add_gfn(SECOND)
        other.add_gfn(BEFORE)
        guest.tracker.remove_gfn(SECOND)
        guest.run(bytes.fromhex("488907"), rdi=T2, rax=V)
        assert node.writes == [Write(T2, word(V))]
        assert guest.writes() == []
    guest.run(bytes.fromhex("488907"), rdi=T2, rax=V)
    assert len(node.calls) == 1


def test_untracked_pages_are_not_told_to_nodes_of_a_carved_machine(guest: Writing) -> None:
    """Not even the part of a store that comes out of the guest when its page is tracked no more."""
    if not isinstance(guest.machine, CarvedMachine):
        pytest.skip("KVM's page track tells all emulated writes (kvm-mmu.md 9)")
    node = Recorder(lambda gpa, new: guest.tracker.count(SECOND) and guest.tracker.remove_gfn(SECOND))
    guest.machine.register_track_notifier(node)
    guest.run(bytes.fromhex("488907"), rdi=T2 - 2, rax=V)
    assert node.calls == [Write(T2 - 2, word(V)[:2])]
    assert guest.memory.read(T2 - 2, 8) == word(V)


# --- slots -------------------------------------------------------------------------------------------------


def test_deleting_a_slot_is_told_and_ends_its_tracking(guest: Writing) -> None:
    with GuestMemory(4 * PAGE_SIZE) as memory:
        slot = guest.machine.create_slot(memory, 1 << 30)
        gfn = (1 << 30) // PAGE_SIZE + 2
        guest.tracker.add_gfn(gfn)
        slot.delete()
        assert not slot.alive
        assert guest.recorder.calls == [Removal(gfn - 2, 4)]
        assert guest.tracker.gfns == {FIRST, SECOND}
        with pytest.raises(SlotAbsentError):
            guest.tracker.remove_gfn(gfn)
        guest.machine.create_slot(memory, 1 << 30)
        assert guest.tracker.count(gfn) == 0


def test_the_machine_says_that_it_tracks(guest: Writing) -> None:
    assert isinstance(guest.machine, PageTracking)


# --- programs ----------------------------------------------------------------------------------------------

STORES = [
    ("488907", 8),
    ("8907", 4),
    ("668907", 2),
    ("8807", 1),
    ("480107", 8),
    ("f0480fc107", 8),
    ("488707", 8),
    ("f0480fb10f", 8),
    ("0fb10f", 4),
    ("f3a4", 1),
    ("f348ab", 8),
    ("0f10060f1107", 16),
    ("f7d8890748f717", 8),
]


def random_program(choose: random.Random) -> list[tuple[bytes, dict[str, int]]]:
    steps = []
    for _ in range(choose.randrange(3, 12)):
        code, size = choose.choice(STORES)
        border = choose.choice([T, T2, END])
        at = choose.choice([border - choose.randrange(size + 1), choose.randrange(T - 64, END + 64)])
        registers = {
            "rax": choose.choice([choose.randrange(1 << 64), 0]),
            "rcx": choose.randrange(1, 6) if code.startswith("f3") else choose.randrange(1 << 64),
            "rsi": choose.randrange(T - 256, END + 256),
            "rdi": at,
        }
        steps.append((bytes.fromhex(code), registers))
    return steps


@pytest.mark.kvm
@pytest.mark.parametrize("number", range(12))
def test_random_programs_are_reported_alike_everywhere(number: int) -> None:
    """Real KVM and both models at CPL 3 and CPL 0: one sequence of notifications, one memory."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}: random_program(random.Random({seed}))")
    program = random_program(random.Random(seed))
    results = {}
    for backend in BACKENDS:
        with open_backend(backend) as opened:
            for cpl in (3, 0):
                with Writing(opened.create_machine(), cpl=cpl) as guest:
                    guest.memory.write(T - PAGE_SIZE, random.Random(seed).randbytes(4 * PAGE_SIZE))
                    guest.tracker.add_gfn(FIRST)
                    guest.tracker.add_gfn(SECOND)
                    for code, registers in program:
                        guest.run(code, **registers)
                    memory = guest.memory.read(DATA * PAGE_SIZE, (PAGES - DATA) * PAGE_SIZE)
                    results[backend, cpl] = (guest.writes(), memory)
    expected = results["kvm", 3]
    assert expected[0] or all(r["rdi"] + 64 < T or r["rdi"] >= END for _, r in program)
    assert all(result == expected for result in results.values())


__all__ = ["tracking_system"]
