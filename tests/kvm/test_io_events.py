"""ioeventfd and coalesced zones: the guest's writes arrive without an exit, and only those meant."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from pykvm.errors import ClosedError, KvmError, UsageError
from pykvm.kvm import KvmVm
from pykvm.kvm.ioevents import CoalescedWrite
from pykvm.machine import IoIn, IoOut, MmioRead, MmioWrite
from pykvm.memory import PAGE_SIZE
from tests.kernels import kernel

from .tiny import TABLES, Tiny, done

HOLE = 1010 * PAGE_SIZE
OUT_20 = bytes.fromhex("b02a e620 e610")
"""mov al, 0x2a; out 0x20, al; out 0x10, al"""
STORES = bytes.fromhex("488907 894708 66894710 e610")
"""mov [rdi], rax; mov [rdi+8], eax; mov [rdi+16], ax; out 0x10, al"""
COUNT_DOWN = bytes.fromhex("48890f 48ffc9 75f8 e610")
"""again: mov [rdi], rcx; dec rcx; jnz again; out 0x10, al"""


@pytest.fixture(params=[3, 0], ids=["cpl3", "cpl0"])
def guest(vm: KvmVm, request: pytest.FixtureRequest) -> Iterator[Tiny]:
    """A guest whose page 1010 is mapped to where no slot is."""
    with Tiny(vm, pages=1000, cpl=request.param) as made:
        entry = HOLE | 0x67
        made.memory.write((TABLES + 1) * PAGE_SIZE + 8 * (1010 - 512), entry.to_bytes(8, "little"))
        yield made


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def signals(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


# --- ioeventfd -----------------------------------------------------------------------------------


def test_a_port_signals_instead_of_exiting(guest: Tiny, event: int) -> None:
    guest.vm.assign_ioeventfd(event, 0x20, 1, port=True)
    assert done(guest.run(OUT_20))
    assert signals(event) == 1
    guest.vm.remove_ioeventfd(event, 0x20, 1, port=True)
    assert guest.run(OUT_20) == IoOut(0x20, 1, b"\x2a")
    assert signals(event) == 0


def test_only_the_value_to_match_signals(guest: Tiny, event: int) -> None:
    guest.vm.assign_ioeventfd(event, 0x20, 1, match=0x2B, port=True)
    assert guest.run(OUT_20) == IoOut(0x20, 1, b"\x2a")
    guest.vm.assign_ioeventfd(event, 0x20, 1, match=0x2A, port=True)
    assert done(guest.run(OUT_20))
    assert signals(event) == 1


def test_only_the_length_to_match_signals(guest: Tiny, event: int) -> None:
    guest.vm.assign_ioeventfd(event, HOLE, 8)
    guest.vm.assign_ioeventfd(event, HOLE + 16, 4)
    guest.run(STORES, rdi=HOLE, rax=7)
    exits = [MmioWrite(HOLE + 8, b"\7\0\0\0"), MmioWrite(HOLE + 16, b"\7\0")]
    assert [guest.run(STORES, rdi=HOLE, rax=7), guest.vcpu.run()] == exits
    assert done(guest.vcpu.run())
    assert signals(event) == 2, "the 8-byte store of each run"


def test_length_0_is_any_length(guest: Tiny, event: int) -> None:
    for offset in (0, 8, 16):
        guest.vm.assign_ioeventfd(event, HOLE + offset, 0)
    assert done(guest.run(STORES, rdi=HOLE))
    assert signals(event) == 3


def test_reads_still_exit(guest: Tiny, event: int) -> None:
    guest.vm.assign_ioeventfd(event, HOLE, 1)
    assert guest.run(bytes.fromhex("8a07 e610"), rdi=HOLE) == MmioRead(HOLE, 1)  # mov al, [rdi]


def test_refusals(guest: Tiny, event: int) -> None:
    guest.vm.assign_ioeventfd(event, 0x20, 1, port=True)
    with pytest.raises(KvmError, match="another ioeventfd") as caught:
        guest.vm.assign_ioeventfd(event, 0x20, 1, port=True)
    assert caught.value.errno == errno.EEXIST
    with pytest.raises(KvmError, match="exactly these") as caught:
        guest.vm.remove_ioeventfd(event, 0x21, 1, port=True)
    assert caught.value.errno == errno.ENOENT
    for wrong in ({"length": 3}, {"length": 0, "match": 1}, {"length": 8, "address": 2**64 - 4}):
        with pytest.raises(KvmError, match="length of 0, 1, 2, 4 or 8"):
            guest.vm.assign_ioeventfd(event, **{"address": HOLE, "length": 4} | wrong)
    with pytest.raises(UsageError, match="addr"):
        guest.vm.assign_ioeventfd(event, -1, 4)


# --- coalesced zones -----------------------------------------------------------------------------


def test_writes_in_a_zone_are_queued_in_order(guest: Tiny) -> None:
    guest.vm.register_coalesced(HOLE, 0x100)
    assert done(guest.run(STORES, rdi=HOLE, rax=0x1122334455667788))
    assert guest.vcpu.drain_coalesced() == [
        CoalescedWrite(HOLE, bytes.fromhex("8877665544332211"), False),
        CoalescedWrite(HOLE + 8, bytes.fromhex("88776655"), False),
        CoalescedWrite(HOLE + 16, bytes.fromhex("8877"), False),
    ]
    assert guest.vcpu.drain_coalesced() == []


def test_a_read_and_a_write_across_the_end_exit(guest: Tiny) -> None:
    guest.vm.register_coalesced(HOLE, 8)
    assert guest.run(bytes.fromhex("8a07 e610"), rdi=HOLE) == MmioRead(HOLE, 1)
    guest.vcpu.reply(b"\0")
    assert guest.vcpu.complete_io() is None
    assert guest.run(STORES, rdi=HOLE + 4) == MmioWrite(HOLE + 4, bytes(8))
    assert guest.vcpu.drain_coalesced() == []


def test_a_full_queue_exits_and_nothing_is_lost(guest: Tiny) -> None:
    """(4096 - 8) / 24 = 170 entries, of which one stays free to tell full from empty.

    Before Linux 6.12 the queue counts as full at 2^32 mod 170 = 86 entries less one, too: the distance of its
    two indices is taken modulo 170 after it wrapped modulo 2^32 (92f6d4130497 mends it).
    """
    guest.vm.register_coalesced(HOLE, 8)
    first = guest.run(COUNT_DOWN, rdi=HOLE, rcx=400)
    queued = guest.vcpu.drain_coalesced()
    assert len(queued) in ((169,) if kernel() >= (6, 12) else (85, 169))
    values = [400 - len(queued)]
    assert first == MmioWrite(HOLE, values[0].to_bytes(8, "little"))
    exit_ = guest.vcpu.run()
    while isinstance(exit_, MmioWrite):
        queued += guest.vcpu.drain_coalesced()
        values.append(int.from_bytes(exit_.data, "little"))
        exit_ = guest.vcpu.run()
    assert done(exit_)
    queued += guest.vcpu.drain_coalesced()
    values += [int.from_bytes(write.data, "little") for write in queued]
    assert sorted(values) == list(range(1, 401))


def test_ports_can_be_coalesced(guest: Tiny) -> None:
    guest.vm.register_coalesced(0x20, 1, port=True)
    assert done(guest.run(OUT_20))
    assert guest.vcpu.drain_coalesced() == [CoalescedWrite(0x20, b"\x2a", True)]
    assert guest.run(bytes.fromhex("e420 e610")) == IoIn(0x20, 1)  # in al, 0x20
    guest.vcpu.reply(b"\0")
    assert guest.vcpu.complete_io() is None
    guest.vm.unregister_coalesced(0x20, 1, port=True)
    assert guest.run(OUT_20) == IoOut(0x20, 1, b"\x2a")


def test_the_queue_is_that_of_the_vm(vm: KvmVm) -> None:
    with Tiny(vm, vcpus=2) as guest:
        vm.register_coalesced(0x20, 1, port=True)
        for vcpu in guest.vcpus:
            assert done(guest.run(OUT_20, vcpu))
        assert len(guest.vcpus[1].drain_coalesced()) == 2
        assert guest.vcpus[0].drain_coalesced() == []


def test_a_closed_vcpu_has_no_queue(vm: KvmVm) -> None:
    vcpu = vm.create_vcpu()
    vcpu.close()
    with pytest.raises(ClosedError):
        vcpu.drain_coalesced()
