"""Translated code does exactly what the interpreter does: both run the same program in step."""

from __future__ import annotations

import contextlib
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.errors import UnsupportedInstruction
from pykvm.machine.exits import Halted, IoOut, MmioRead, MmioWrite, Shutdown
from tests.model.duo import ABSENT_PAGE, CODE, DATA, PAGE, PT, READ_ONLY_PAGE, SIZE, STACK, STORES, Duo
from tests.model.programs import Program

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
BITS = (64, 32, 16)
TF, IF = 0x100, 0x200

# mov rax, [rsi] ; add rsi, 8 ; add rdx, rax ; dec rcx ; jnz ; hlt
LOADS = bytes.fromhex("488b06 4883c608 4801c2 48ffc9 75f1 f4")


def names(exits: list[object]) -> list[str]:
    return [type(exit).__name__ for exit in exits]


# --- random programs --------------------------------------------------------------------------------------


def check_random_program(bits: int, seed: int) -> Duo:
    """A random program three times over, with the host in between: collecting, rewriting code, interrupts."""
    random = Random(seed)
    program = Program(random, bits)
    duo = Duo(bits, program.code, program.registers)
    for _ in range(3):
        for _ in range(12):
            exits = duo.run(random.choice([1, 2, 3, 5, 17, 100, 400]))
            if any(isinstance(exit, Halted | Shutdown) for exit in exits):
                break
            disturb(duo, random, len(program.code))
        if duo.plain.cpu.shut_down:
            break
        for machine in duo:
            machine.cpu.pending_debug = 0
            machine.cpu.rip, machine.cpu.rflags = CODE, 2
            for number, value in program.registers.items():
                machine.cpu.regs[number] = value
    return duo


def disturb(duo: Duo, random: Random, length: int) -> None:
    """Sometimes, what hosts do between two runs."""
    what = random.random()
    if what < 0.15:
        assert duo.plain.ram.collect() == duo.fast.ram.collect()
    elif what < 0.2:
        at, byte = CODE + random.randrange(length), bytes([random.choice([0x90, random.randrange(256)])])
        for machine in duo:
            machine.put(at, byte)
    elif what < 0.23:
        for machine in duo:
            machine.cpu.rflags |= IF
            machine.cpu.pending_interrupt = 0x20
    elif what < 0.26:
        for machine in duo:
            machine.cpu.rflags ^= TF
    elif what < 0.28:
        for machine in duo:
            machine.cpu.shadow = 1


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 32))
def test_random_programs_agree(bits: int, seed: int) -> None:
    with contextlib.suppress(UnsupportedInstruction):  # of bytes that the disturbance made
        check_random_program(bits, seed)


def test_random_programs_are_translated() -> None:
    translated = executed = 0
    for bits in BITS:
        for seed in range(10):
            duo = check_random_program(bits, seed)
            translated += duo.translated
            executed += duo.fast.cpu.instructions
    assert translated > executed // 3


# --- flags ----------------------------------------------------------------------------------

OPERATIONS = {
    "add": "4801d8", "sub": "4829d8", "cmp": "4839d8", "adc": "4839c3 4811d8", "sbb": "4839c3 4819d8",
    "and": "4821d8", "test": "4885d8", "neg": "48f7d8", "inc": "48ffc0", "dec": "48ffc8", "xor": "4831d8",
    "add dword": "01d8", "sub dword": "29d8", "inc dword": "ffc0", "cmp word": "6639d8", "sub byte": "28d8",
    "dec byte": "fec8", "add ah": "00dc", "shl": "48c1e003", "shl 1": "d1e0", "shr": "c1e807",
    "shr 1": "48d1e8", "sar": "48c1f805", "rol": "48c1c009", "ror 1": "66d1c8", "imul": "480fafc3",
    "imul dword": "6bc07b",
}  # fmt: skip
EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x80000000, 0x7FFFFFFF, 1 << 63, (1 << 63) - 1, (1 << 64) - 1)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_every_condition_after_every_kind_of_operation(operation: str) -> None:
    """Each pair of edge values goes through the operation, and the conditions are stored: SETcc and Jcc."""
    code = bytes.fromhex("488b06 488b5e08" + operation)  # mov rax, [rsi] ; mov rbx, [rsi + 8]
    for number in range(16):
        code += bytes([0x0F, 0x90 | number, 0x47, number])  # setcc [rdi + number]
    for number in range(16):
        code += bytes([0x70 | number, 4, 0x80, 0x77, number, 2])  # jcc over ; xor byte [rdi + number], 2
        code += bytes.fromhex("488b06 488b5e08" + operation)
    code += bytes.fromhex("9c 8f4710")  # pushf ; pop [rdi + 16]
    code += bytes.fromhex("4883c610 4883c718 48ffc9 0f85") + (-(len(code) + 17)).to_bytes(
        4, "little", signed=True
    )
    pairs = [value.to_bytes(8, "little") + other.to_bytes(8, "little") for value in EDGES for other in EDGES]
    duo = Duo(64, code + b"\xf4", {RCX: len(pairs), RSI: DATA, RDI: DATA + PAGE})
    for machine in duo:
        machine.put(DATA, b"".join(pairs))
    assert names(duo.run(100_000)) == ["Halted"]
    assert duo.fast.cpu.regs[RCX] == 0
    assert duo.translated > duo.fast.cpu.instructions // 2


# --- budgets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", range(1, 12))
def test_every_budget_ends_exactly(limit: int) -> None:
    duo = Duo(64, STORES, {RCX: 200, RDI: DATA})
    for _ in range(900 // limit):
        duo.run(limit)
    assert duo.translated > 0


def test_a_budget_of_one_instruction_counts_the_same() -> None:
    duo = Duo(64, STORES, {RCX: 200, RDI: DATA})
    duo.run(400)
    duo.run(*[1] * 50)
    assert duo.fast.cpu.instructions == 450


# --- faults -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [STORES, LOADS], ids=["stores", "loads"])
@pytest.mark.parametrize("page", [READ_ONLY_PAGE, ABSENT_PAGE])
@pytest.mark.parametrize("before", range(8 * 30, 8 * 34, 3))
def test_a_fault_in_the_loop_finds_the_interpreters_state(code: bytes, page: int, before: int) -> None:
    start = page - before
    duo = Duo(64, code, {RCX: 500, RDI: start, RSI: start})
    exits = duo.run(10_000)
    assert Halted in map(type, exits)
    assert duo.translated > 50
    read_only_is_readable = code == LOADS and page == READ_ONLY_PAGE
    assert (duo.fast.cpu.cr2 & -PAGE == page) == (not read_only_is_readable)


def test_flags_at_a_fault_are_those_of_the_instruction_before() -> None:
    # next: add eax, 0x11 ; mov [rdi], al ; inc rdi ; jmp next: faults with the flags of INC, CF of ADD
    duo = Duo(64, bytes.fromhex("83c011 8807 48ffc7 ebf6"), {RDI: READ_ONLY_PAGE - 1, RAX: 0})
    for start in range(READ_ONLY_PAGE - 41, READ_ONLY_PAGE - 20):
        for machine in duo:
            machine.cpu.regs[RDI], machine.cpu.rip = start, CODE
        duo.run(400)
    assert duo.translated > 500


def test_a_pop_that_faults_leaves_the_stack_pointer() -> None:
    # next: pop rax ; add rbx, rax ; jmp next
    duo = Duo(64, bytes.fromhex("58 4801c3 ebfa"), {RSP: ABSENT_PAGE - 0x100})
    duo.run(1000)
    assert duo.fast.cpu.cr2 == ABSENT_PAGE
    assert duo.translated > 20


def test_a_wild_jump_faults_at_the_jump() -> None:
    # next: dec rcx ; cmovz rax, rbx ; jmp rax
    code = bytes.fromhex("48ffc9 480f44c3 ffe0")
    duo = Duo(64, code, {RCX: 100, RAX: CODE, RBX: 1 << 60})
    assert names(duo.run(1000)) == ["Halted"]
    assert duo.translated > 100


# --- exits ------------------------------------------------------------------------------------------------


def test_mmio_in_the_loop() -> None:
    # next: add [rdi], eax ; mov [rsi], rdx ; inc edx ; dec rcx ; jnz ; hlt: RDI is memory, RSI a hole
    code = bytes.fromhex("0107 488916 ffc2 48ffc9 75f4 f4")
    duo = Duo(64, code, {RCX: 60, RAX: 3, RDI: DATA, RSI: 0xFF000})
    for machine in duo:
        machine.put(PT + 8 * 0xFF, (SIZE + 0x5000 | 7).to_bytes(8, "little"))
    exits = duo.run(1000)
    assert exits[:-1] == [MmioWrite(SIZE + 0x5000, n.to_bytes(8, "little")) for n in range(60)]
    assert duo.translated > 100


def test_reads_of_a_hole_are_asked_for() -> None:
    # next: mov eax, [rsi] ; add edx, eax ; dec rcx ; jnz ; hlt
    duo = Duo(64, bytes.fromhex("8b06 01c2 48ffc9 75f7 f4"), {RCX: 60, RSI: SIZE})
    assert names(duo.run(1000)) == ["MmioRead"] * 60 + ["Halted"]
    assert duo.fast.cpu.regs[RDX] == 60 * 0xA4A3A2A1 & 0xFFFFFFFF
    assert MmioRead(SIZE, 4) not in duo.run(1)


def test_port_writes_between_translated_code() -> None:
    # next: add eax, ecx ; xor edx, eax ; out 0x10, al ; dec rcx ; jnz ; hlt
    duo = Duo(64, bytes.fromhex("01c8 31c2 e610 48ffc9 75f5 f4"), {RCX: 60})
    exits = duo.run(1000)
    assert sum(isinstance(exit, IoOut) for exit in exits) == 60
    assert duo.translated > 100


# --- dirty pages ------------------------------------------------------------------------------------------


def test_each_collection_finds_the_pages_written_since() -> None:
    duo = Duo(64, bytes.fromhex("48890f 48ffc9 75f8 f4"), {RCX: 10_000, RDI: DATA})  # the same page for ever
    duo.run(300)
    for number in range(20):
        for machine in duo:
            machine.cpu.regs[RDI] = DATA + PAGE * (number % 3)
        duo.plain.ram.collect(), duo.fast.ram.collect()
        duo.run(50)
        assert duo.fast.ram.dirty >= {(DATA + PAGE * (number % 3)) // PAGE}
        assert duo.fast.ram.dirty == duo.plain.ram.dirty
    assert duo.fast.ram.views > 10


def test_an_untouched_page_is_not_dirty() -> None:
    # next: cmp [rdi], rax ; jne over ; mov [rdi], rdx ; over: dec rcx ; jnz ; hlt: never stores
    duo = Duo(64, bytes.fromhex("483907 7503 488917 48ffc9 75f3 f4"), {RCX: 200, RAX: 1, RDI: DATA})
    duo.run(100)
    duo.plain.ram.collect(), duo.fast.ram.collect()
    duo.run(400)
    assert duo.translated > 300
    assert duo.fast.ram.dirty == set()


# --- code that changes ------------------------------------------------------------------------------------


def test_a_loop_that_rewrites_itself() -> None:
    # next: add eax, 1 ; mov [rdi], cl (the immediate of ADD) ; dec ecx ; jnz ; hlt
    duo = Duo(64, bytes.fromhex("83c001 880f ffc9 75f7 f4"), {RCX: 120, RDI: CODE + 2})
    duo.run(1000)
    assert duo.fast.cpu.regs[RAX] == 1 + sum(n if n < 0x80 else n - 0x100 for n in range(2, 121))


def test_a_store_right_before_the_instruction_it_changes() -> None:
    # next: mov [rdi], dl ; add eax, 1 (changed by the store before) ; xor dl, 0x55 ; dec ecx ; jnz ; hlt
    code = bytes.fromhex("8817 83c001 80f255 ffc9 75f4 f4")
    duo = Duo(64, code, {RCX: 100, RDX: 0x11, RDI: CODE + 4})
    duo.run(1000)
    assert duo.fast.cpu.regs[RAX] == 50 * (0x11 + 0x44)


def test_translated_code_is_rewritten_by_other_code() -> None:
    # twice: the loop at CODE + 0x20 is run hot, its immediate changed, and run again
    outer = bytes.fromhex("b93c000000 e816000000 fe05 12000000 ffca 75ec f4").ljust(0x20, b"\x90")
    duo = Duo(64, outer + bytes.fromhex("83c001 ffc9 75f9 c3"), {RDX: 6})
    duo.run(4000)
    assert duo.fast.cpu.regs[RAX] == 60 * (1 + 2 + 3 + 4 + 5 + 6)
    assert duo.translated > 300


def test_the_host_rewrites_translated_code() -> None:
    duo = Duo(64, bytes.fromhex("83c001 ebfb"))
    duo.run(100)
    for machine in duo:
        machine.put(CODE + 2, b"\x05")
    duo.run(100, 100)
    assert duo.fast.cpu.regs[RAX] == 50 + 100 * 5
    assert duo.translated > 200


def test_a_page_of_code_becomes_data_and_back() -> None:
    duo = Duo(64, STORES, {RCX: 100, RDI: DATA})
    duo.run(1000)
    for machine in duo:
        machine.put(CODE + 0x800, STORES)
        machine.cpu.rip = CODE + 0x800
        machine.cpu.regs[RCX], machine.cpu.regs[RDI] = 200, CODE  # over the first loop, and on to itself
    exits = duo.run(5000)
    assert exits
    assert duo.fast.ram.bytes[CODE : CODE + 8] == (200).to_bytes(8, "little")


def test_code_is_watched_again_when_the_bus_forgot() -> None:
    """Slots changed: all the host's knowledge of frames is gone."""
    # next: add eax, 1 ; dec ecx ; jnz next ; mov byte [rdi], 2 ; mov ecx, 60 ; jmp next
    code = bytes.fromhex("83c001 ffc9 75f9 c60702 b93c000000 ebef")
    duo = Duo(64, code, {RCX: 60, RDI: DATA})
    duo.run(500)
    for machine in duo:
        machine.ram.watched.clear()
        machine.cpu.flush_tlb()
        machine.cpu.regs[RDI] = CODE + 2
    duo.run(1000)
    assert duo.translated > 1000


def test_registers_wider_than_the_mode_keep_their_upper_halves() -> None:
    # next: add ax, 3 ; mov edx, eax ; add bx, cx ; dec cx ; jnz next ; hlt
    duo = Duo(32, bytes.fromhex("6683c003 89c2 6601cb 6649 75f3 f4"), {RCX: 100, RAX: 0x5555555500000000})
    duo.run(1000)
    assert duo.fast.cpu.regs[RAX] == 0x5555555500000000 + 300
    assert duo.fast.cpu.regs[RDX] == 300


# --- page tables ------------------------------------------------------------------------------------------


def test_the_loop_moves_its_own_page() -> None:
    # next: mov [rdi], rcx ; mov [rsi], rdx ; xor rdx, 0x3000 ; dec rcx ; jnz ; hlt: RSI is the entry of RDI
    code = bytes.fromhex("48890f 488916 4881f200300000 48ffc9 75ee f4")
    entry = DATA + PAGE | 0x67
    duo = Duo(64, code, {RCX: 101, RDI: DATA, RSI: PT + DATA // PAGE * 8, RDX: entry})
    duo.run(1000)
    moved = entry ^ 0x3000 & -PAGE
    first, second = entry & -PAGE, moved & -PAGE
    written = {duo.fast.ram.bytes[at] for at in (first, second)}
    assert written == {1, 2}


def test_accessed_and_dirty_bits_are_set_by_translated_loops() -> None:
    duo = Duo(64, STORES, {RCX: 1500, RDI: DATA})
    for machine in duo:
        machine.put(
            PT + DATA // PAGE * 8, b"".join((DATA + n * PAGE | 7).to_bytes(8, "little") for n in range(4))
        )
    duo.run(10_000)
    flags = [duo.fast.ram.bytes[PT + (DATA // PAGE + n) * 8] for n in range(4)]
    assert flags == [0x67, 0x67, 0x67, 0x07]


def test_a_page_that_is_flushed_is_translated_anew() -> None:
    """The host changes an entry, which nobody notices until the page is flushed."""
    duo = Duo(64, bytes.fromhex("48890f 48ffc9 75f8 f4"), {RCX: 10_000, RDI: DATA})
    duo.run(300)
    for machine in duo:
        machine.put(PT + DATA // PAGE * 8, (DATA + PAGE | 0x67).to_bytes(8, "little"))
        machine.cpu.flush_page(DATA)
    duo.run(300)
    assert any(duo.fast.ram.bytes[DATA + PAGE : DATA + PAGE + 8])
    assert duo.translated > 400


def test_code_that_is_a_page_table_changes_by_being_walked() -> None:
    """The first instruction is the entry for 1.5 MiB: its A bit makes another instruction of it."""
    at = PT + 8 * 0x180
    # next: add eax, 1 ; add [rax], al (three times) ; cmp ecx, 20 ; jne over ; mov dl, [rsi]
    # over: dec ecx ; jnz next ; hlt
    code = bytes.fromhex("83c001 0000 0000 0000 83f914 7502 8a16 ffc9 75ec f4")
    duo = Duo(64, b"", {RCX: 60, RAX: DATA, RSI: 0x180000})
    for machine in duo:
        machine.put(at, code)
        machine.cpu.rip = at
    duo.run(10_000)
    assert duo.fast.ram.bytes[at] == 0xA3  # mov [0x1c0], eax


# --- events -----------------------------------------------------------------------------------------------


def test_an_interrupt_ends_the_loop_where_it_ends_the_interpreters() -> None:
    duo = Duo(64, STORES, {RCX: 1000, RDI: DATA})
    duo.run(203)
    for machine in duo:
        machine.cpu.rflags |= IF
        machine.cpu.pending_interrupt = 0x1F
    assert names(duo.run(10)) == ["Halted"]


def test_single_step_traps_after_each_instruction() -> None:
    duo = Duo(64, STORES, {RCX: 1000, RDI: DATA})
    duo.run(200)
    before = duo.translated
    for machine in duo:
        machine.cpu.rflags |= TF
    assert names(duo.run(10)) == ["Halted"]
    assert duo.translated == before


def test_a_data_breakpoint_stops_translated_code() -> None:
    duo = Duo(64, STORES, {RCX: 1000, RDI: DATA})
    duo.run(200)
    for machine in duo:
        machine.cpu.dr[0] = DATA + 8 * 100
        machine.cpu.dr7 = 0x400 | 1 | 0b1001 << 16  # enabled, 8 bytes, on writes
    exits = duo.run(5000)
    assert names(exits) == ["Halted"]
    assert duo.fast.cpu.regs[RDI] in {DATA + 8 * 100, DATA + 8 * 101}


def test_calls_and_returns_within_a_page() -> None:
    # next: call f ; dec rcx ; jnz ; hlt ; f: push rcx ; pop rdx ; add rax, rdx ; ret
    duo = Duo(64, bytes.fromhex("e806000000 48ffc9 75f6 f4 51 5a 4801d0 c3"), {RCX: 300})
    duo.run(*[13] * 20, 5000)
    assert duo.fast.cpu.regs[RAX] == 300 * 301 // 2
    assert duo.fast.cpu.regs[RSP] == STACK
    assert duo.translated > 1500
