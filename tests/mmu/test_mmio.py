"""MMIO and string I/O as far as they touch memory (docs/reference/hosts.md C.3)."""

from __future__ import annotations

import pytest

from pykvm.machine import Exit, IoIn, MmioRead, MmioWrite
from tests.mmu_rig import DATA, DATA_PT, PAGE, SHADOW, Host, Rig, hosts

pytestmark = hosts(*SHADOW)
VA = DATA << 12
HOLE = 0x9000 << 12
"""No slot is there; the last page of DATA's table leads to it."""
WINDOW = VA + (0x1FF << 12)


def rig_with_hole(shadow: Host) -> Rig:
    rig = Rig(shadow, entries={(DATA_PT, 0x1FF): HOLE | PAGE})
    rig.prime(DATA, DATA + 0x1FE)
    return rig


def all_of(rig: Rig, first: Exit) -> list[tuple[str, int, bytes]]:
    """The MMIO exits of one snippet, reads answered with 11h bytes."""
    found = []
    exit_ = first
    while isinstance(exit_, MmioRead | MmioWrite):
        if isinstance(exit_, MmioRead):
            found.append(("read", exit_.gpa, bytes(exit_.size)))
            rig.vcpu.reply(b"\x11" * exit_.size)
        else:
            found.append(("write", exit_.gpa, exit_.data))
        exit_ = rig.resume().exit
    return found


def test_a_store_and_a_load(shadow: Host) -> None:
    """C.3: the exit of a write has RIP behind the instruction, that of a read at it."""
    with rig_with_hole(shadow) as rig:
        seen = rig.store(WINDOW, 0x1122334455667788)
        at = rig.vcpu.get_registers().rip
        assert all_of(rig, seen.exit) == [("write", HOLE, 0x1122334455667788.to_bytes(8, "little"))]
        assert rig.vcpu.get_registers().rip in (at, at + 2)
        seen = rig.load(WINDOW)
        assert all_of(rig, seen.exit) == [("read", HOLE, bytes(8))]
        assert rig.vcpu.get_registers().rax == 0x1111111111111111
        assert rig.dirty() == []


def test_16_bytes_are_two_exits(shadow: Host) -> None:
    """C.3: 8 bytes at most for each."""
    with rig_with_hole(shadow) as rig:
        seen = rig.run(b"\x0f\x11\x07", rdi=WINDOW)  # movups [rdi], xmm0
        assert [(kind, at, len(data)) for kind, at, data in all_of(rig, seen.exit)] == [
            ("write", HOLE, 8),
            ("write", HOLE + 8, 8),
        ]


def test_a_store_from_memory_into_a_hole(shadow: Host) -> None:
    """C.3: the part in memory is written and dirty; the exit is for the rest."""
    with rig_with_hole(shadow) as rig:
        seen = rig.store(WINDOW - 3, 0x8877665544332211)
        assert all_of(rig, seen.exit) == [("write", HOLE, bytes.fromhex("4455667788"))]
        assert rig.memory.read(WINDOW - 3, 3) == bytes.fromhex("112233")
        assert rig.dirty() == [DATA + 0x1FE]


@pytest.mark.parametrize("lock", [b"", b"\xf0"], ids=["add", "lock add"])
def test_read_modify_write_is_two_exits(shadow: Host, lock: bytes) -> None:
    """C.3: a lock prefix is ignored."""
    with rig_with_hole(shadow) as rig:
        seen = rig.run(lock + b"\x48\x01\x07", rdi=WINDOW, rax=1)  # add [rdi], rax
        assert [kind for kind, _, _ in all_of(rig, seen.exit)] == ["read", "write"]


def test_strings_are_one_exit_for_each_element(shadow: Host) -> None:
    """C.3: rep movs and rep stos."""
    with rig_with_hole(shadow) as rig:
        seen = rig.run(b"\xf3\x48\xab", rdi=WINDOW, rcx=3, rax=7)  # rep stosq
        assert [at for _, at, _ in all_of(rig, seen.exit)] == [HOLE, HOLE + 8, HOLE + 16]
        seen = rig.run(b"\xf3\x48\xa5", rdi=VA, rsi=WINDOW, rcx=3)  # rep movsq
        assert [kind for kind, _, _ in all_of(rig, seen.exit)] == ["read"] * 3
        assert rig.memory.read(VA, 24) == b"\x11" * 24
        assert rig.dirty() == [DATA]


def test_faults_on_a_hole(shadow: Host) -> None:
    """kvm-mmu.md 7: each is taken and emulated; with MMIO caching the first leaves an MMIO SPTE, and later
    ones count nothing."""
    with rig_with_hole(shadow) as rig:
        first = rig.store(WINDOW)
        all_of(rig, first.exit)
        second = rig.store(WINDOW)
        all_of(rig, second.exit)
        assert first.other["mmio_exits"] == second.other["mmio_exits"] == 1
        assert first.moved["pf_taken"] == first.moved["pf_emulate"] == 1
        if shadow.profile.mmio_caching:
            assert first.moved["pf_mmio_spte_created"] == 1
            assert second.moved == {}
        else:
            assert "pf_mmio_spte_created" not in first.moved
            assert second.moved == {"pf_taken": 1, "pf_emulate": 1}


def test_string_input_marks_its_pages_when_the_data_comes(shadow: Host) -> None:
    """C.3: one exit for min(rest of the page, 1024) bytes."""
    with rig_with_hole(shadow) as rig:
        seen = rig.run(b"\xf3\x6c", rdi=VA + 0x1000 - 16, rcx=32, rdx=0x10)  # rep insb
        assert seen.exit == IoIn(0x10, 1, 16)
        assert rig.dirty() == []
        rig.vcpu.reply(b"\x33" * 16)
        second = rig.resume().exit
        assert isinstance(second, IoIn)
        assert rig.dirty() == [DATA]
        rig.vcpu.reply(b"\x44" * 16)
        rig.resume()
        assert rig.dirty() == [DATA + 1]
        assert rig.memory.read(VA + 0x1000 - 16, 32) == b"\x33" * 16 + b"\x44" * 16


def test_string_output_reads_memory_byte_by_byte(shadow: Host) -> None:
    """C.3: one exit for each byte, rcx decremented already; nothing is dirty."""
    with rig_with_hole(shadow) as rig:
        rig.memory.write(VA, b"abc")
        seen = rig.run(b"\xf3\x6e", rsi=VA, rcx=3, rdx=0x10)  # rep outsb
        found = []
        exit_ = seen.exit
        for left in (2, 1, 0):
            found.append(exit_.data)  # type: ignore[union-attr]
            assert rig.vcpu.get_registers().rcx == left
            exit_ = rig.resume().exit
        assert found == [b"a", b"b", b"c"]
        assert rig.dirty() == []
