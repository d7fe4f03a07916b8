"""Translated string instructions, and stores that make an exit due, do exactly what the interpreter's do."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.machine.exits import Exit, Halted, InternalError, MmioWrite, Shutdown
from pykvm.model.cpu.instruction import CS
from tests.model.duo import ABSENT_PAGE, CODE, DATA, HANDLERS, PAGE, SIZE, STORES, Duo, Machine

RAX, RCX, RBP, RSI, RDI = 0, 1, 5, 6, 7


# --- string instructions -------------------------------------------------------------------------------


def string_loop(random: Random, opcode: int) -> bytes:
    """Twenty or so times a string instruction with the same registers."""
    places = [
        DATA,
        DATA + 8,
        DATA + 0xFF0,
        DATA + 0xFF1,
        DATA + 0x3000,
        ABSENT_PAGE - 0x808,
        SIZE - 0x200,
        CODE,
    ]
    body = b"".join(
        bytes([0xB8 | register]) + value.to_bytes(4, "little")
        for register, value in (
            (RDI, random.choice(places)),
            (RSI, random.choice(places)),
            (RCX, random.choice([0, 1, 2, 100, 100, 511, 513, 1025])),
        )
    )
    body += bytes([0xFD]) if random.random() < 0.1 else bytes([0xFC])
    body += random.choice([b"\xf3", b"\xf3", b"\xf2", b""]) + random.choice([b"", b"\x66"]) + bytes([opcode])
    body += bytes.fromhex("83c201 ffcd")  # add edx, 1 ; dec ebp
    return body + bytes([0x75, -(len(body) + 2) & 0xFF, 0xF4])


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("opcode", [0xA4, 0xA5, 0xAA, 0xAB])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 32))
def test_string_instructions_agree(bits: int, opcode: int, seed: int) -> None:
    random = Random(seed)
    duo = Duo(bits, string_loop(random, opcode), {RAX: random.getrandbits(32), RBP: 24}, hot=1)
    for machine in duo:
        machine.put(DATA, Random(seed).randbytes(0x6000))
    for _ in range(12):
        exits = duo.run(random.choice([1, 3, 10, 20]))
        if any(isinstance(exit, Halted | InternalError) for exit in exits):
            break
        if random.random() < 0.3:
            assert duo.plain.ram.collect() == duo.fast.ram.collect()


def test_a_copy_onto_itself_repeats_its_start() -> None:
    # next: mov edi, DATA + 8 ; mov esi, DATA ; mov ecx, 200 ; mov [rsi], ebp ; rep movsb ; dec ebp
    # jnz next ; hlt
    code = bytes.fromhex("bf08000100 be00000100 b9c8000000 892e f3a4 ffcd 75e9 f4")
    duo = Duo(64, code, {RBP: 10}, hot=1)
    for machine in duo:
        machine.put(DATA, b"12345678" + bytes(400))
    duo.run(1000)
    assert duo.fast.ram.bytes[DATA : DATA + 216] == b"\1\0\0\0005678" * 26 + bytes(8)


def test_large_fills_and_copies_are_translated() -> None:
    # next: mov rdi, r8 ; mov rsi, r9 ; mov ecx, 0x1000 ; rep movsb ; dec ebp ; jnz next ; hlt
    code = bytes.fromhex("4c89c7 4c89ce b900100000 f3a4 ffcd 75ef f4")
    duo = Duo(64, code, {RBP: 40, 8: DATA, 9: DATA + 0x2000})
    for machine in duo:
        machine.put(DATA + 0x2000, bytes(range(256)) * 16)
    duo.run(5000)
    assert duo.fast.ram.bytes[DATA : DATA + PAGE] == bytes(range(256)) * 16
    assert duo.translated > duo.fast.cpu.instructions * 3 // 4


def test_an_interrupt_amid_a_translated_fill_finds_rf() -> None:
    """rep stosb, over and over; RF is set wherever the repetition is not complete (SDM vol. 3, 18.3.1.1)."""
    # mov rdi, DATA ; mov ecx, 3000 ; rep stosb ; jmp back
    duo = Duo(64, bytes.fromhex("48c7c700000100 b9b80b0000 f3aa ebf0"))
    duo.run(100)
    seen = set()
    for _ in range(40):
        duo.run(1)
        cpu = duo.fast.cpu
        amid = cpu.rip == CODE + 12 and 0 < cpu.regs[RCX] < 3000
        assert bool(cpu.rflags & 0x10000) == amid
        seen.add(amid)
    assert seen == {True, False}
    before = duo.fast.cpu.translated
    duo.run(100)
    assert duo.fast.cpu.translated > before + 90  # RF keeps nothing from being translated


def test_a_copy_from_a_segment_that_is_not_readable() -> None:
    """cs rep movsb with CS made execute-only when the loop is hot."""
    # mov ecx, 1 ; cs rep movsb ; jmp back
    duo = Duo(32, bytes.fromhex("b901000000 2ef3a4 ebf6"), {RSI: DATA, RDI: DATA + 2 * PAGE})
    duo.run(200)
    for machine in duo:
        cpu = machine.cpu
        cpu.set_segment(CS, replace(cpu.segments[CS], type=9))
    exits = duo.run(200)
    assert isinstance(exits[-1], Halted)
    assert duo.plain.cpu.rip == HANDLERS + 16 * 13 + 1


class FullRing(Machine):
    """Handing out a page for writing makes an exit due, as a dirty ring does when it gets full."""

    def __init__(self, bits: int, *, translate: bool) -> None:
        super().__init__(bits, translate=translate)
        ram, cpu = self.ram, self.cpu
        self.handed_out = handed_out = set[int]()
        writable, write = ram.writable, ram.write

        def log(gfn: int) -> None:
            if gfn * PAGE < SIZE and gfn not in ram.watched and gfn not in handed_out:
                handed_out.add(gfn)
                cpu.exits.append(Shutdown())  # stands for DirtyRingFull

        def logged_writable(gfn: int) -> memoryview | None:
            log(gfn)
            return writable(gfn)

        def logged_write(gpa: int, data: bytes) -> list[MmioWrite]:
            log(gpa // PAGE)
            return write(gpa, data)

        ram.writable, ram.write = logged_writable, logged_write  # type: ignore[method-assign]

    def start(self) -> None:
        self.cpu.rip = CODE
        self.cpu.regs[RCX], self.cpu.regs[RDI], self.cpu.regs[RSI] = 2000, DATA, DATA + 0x18

    def advance(self, limit: int) -> Exit | None:
        """To the next exit, or ``limit`` instructions; repetitions end a run of the interpreter sooner."""
        end = self.cpu.instructions + limit
        exit = None
        while exit is None and self.cpu.instructions < end:
            exit = self.cpu.run(end - self.cpu.instructions)
        return exit

    def reset(self) -> None:
        """Log the next write to each page again."""
        self.handed_out.clear()
        self.ram.collect()


def both_rings(code: bytes) -> tuple[FullRing, FullRing]:
    plain, fast = FullRing(64, translate=False), FullRing(64, translate=True)
    for machine in (plain, fast):
        machine.put(CODE, code)
        machine.start()
    return plain, fast


def test_an_exit_for_a_full_ring_comes_behind_the_store() -> None:
    plain, fast = both_rings(STORES)
    for number in range(9):
        assert fast.cpu.run(9000) == plain.cpu.run(9000)
        assert fast.seen() == plain.seen()
        if number == 4:  # the pages are translated now, and their next writes are logged again
            for machine in (plain, fast):
                machine.reset()
                machine.start()
    assert fast.cpu.translated > 10_000


@pytest.mark.parametrize("count", [0x500, 0x1FE], ids=["onwards", "one-behind-the-page"])
def test_a_full_ring_stops_a_fill_within_a_page(count: int) -> None:
    # next: mov rdi, rsi ; mov ecx, count ; rep stosq ; jmp next
    plain, fast = both_rings(
        bytes.fromhex("4889f7 b9") + count.to_bytes(4, "little") + bytes.fromhex("f348ab ebf3")
    )
    for number in range(24):
        assert fast.advance(70) == plain.advance(70)
        assert fast.seen() == plain.seen()
        if number > 8 and number % 2:
            for machine in (plain, fast):
                machine.reset()
    assert fast.cpu.translated > 100
