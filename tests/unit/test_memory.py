"""Guest memory: sparse, bounds-checked, alive as long as anybody uses it."""

from __future__ import annotations

import gc
import hashlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.errors import ClosedError, UsageError
from pykvm.memory import PAGE_SIZE, GuestMemory

MIB = 1 << 20


@pytest.mark.parametrize("size", [0, -4096, 1, 4095, 4097, (1 << 47) + 4096])
def test_a_bad_size_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match="multiple of 4096"):
        GuestMemory(size)


def test_huge_pages_are_checked() -> None:
    with pytest.raises(UsageError, match="'2M' or '1G'"):
        GuestMemory(MIB, huge="4M")
    with pytest.raises(UsageError, match="not a multiple"):
        GuestMemory(MIB, huge="2M")


def test_a_tebibyte_costs_only_what_is_touched() -> None:
    with GuestMemory(1 << 40) as memory:
        memory.write((1 << 40) - 3, b"end")
        memory.write(5 * PAGE_SIZE + 1, b"x")
        assert memory.read((1 << 40) - 4, 4) == b"\0end"
        assert list(memory.extents()) == [(5 * PAGE_SIZE, PAGE_SIZE), ((1 << 40) - PAGE_SIZE, PAGE_SIZE)]
        assert memory.allocated == 2 * PAGE_SIZE


def test_reading_does_not_allocate() -> None:
    with GuestMemory(64 * MIB) as memory:
        assert not any(memory.read(0, 64 * MIB))
        assert memory.allocated == 0


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1), (0, -1), (MIB, 1), (MIB - 1, 2), (1 << 63, 1), (0, MIB + 1)]
)
def test_nothing_outside_can_be_reached(offset: int, length: int) -> None:
    with GuestMemory(MIB) as memory:
        with pytest.raises(UsageError, match="outside"):
            memory.read(offset, length)
        with pytest.raises(UsageError, match="outside"):
            memory.view(offset, length)
        with pytest.raises(UsageError, match="outside"):
            memory.discard(offset, length)
        with pytest.raises(UsageError, match="outside"):
            list(memory.extents(offset, length))
        if length > 0:
            with pytest.raises(UsageError, match="outside"):
                memory.write(offset, bytes(min(length, MIB + 1)))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 64 * PAGE_SIZE - 1), st.binary(min_size=1, max_size=9000)), max_size=8)
)
def test_reads_and_views_see_the_writes(writes: list[tuple[int, bytes]]) -> None:
    size = 64 * PAGE_SIZE
    expected = bytearray(size)
    with GuestMemory(size) as memory:
        for offset, data in writes:
            data = data[: size - offset]
            memory.write(offset, data)
            expected[offset : offset + len(data)] = data
        assert memory.read(0, size) == expected
        assert memory.view().tobytes() == expected
        pages = {n: bytes(expected[n * PAGE_SIZE : (n + 1) * PAGE_SIZE]) for n in range(64)}
        numbers, digests = memory.page_digests()
        assert numbers.tolist() == [n for n, page in pages.items() if any(page)]
        assert [d.tobytes() for d in digests] == [
            hashlib.blake2b(pages[n], digest_size=16).digest() for n in numbers.tolist()
        ]


@pytest.mark.parametrize(("offset", "length"), [(1, PAGE_SIZE), (0, PAGE_SIZE + 20), (100, None)])
def test_digests_of_broken_pages_are_refused(offset: int, length: int | None) -> None:
    with GuestMemory(4 * PAGE_SIZE) as memory:
        memory.write(PAGE_SIZE, b"x")
        with pytest.raises(UsageError, match="whole pages"):
            memory.page_digests(offset, length)


def test_discarded_pages_are_zero_and_free() -> None:
    with GuestMemory(MIB) as memory:
        memory.write(0, b"\1" * MIB)
        memory.discard(PAGE_SIZE, 2 * PAGE_SIZE)
        assert memory.read(PAGE_SIZE - 1, 2 * PAGE_SIZE + 2) == b"\1" + bytes(2 * PAGE_SIZE) + b"\1"
        assert memory.allocated == MIB - 2 * PAGE_SIZE
        with pytest.raises(UsageError, match="whole pages"):
            memory.discard(1, PAGE_SIZE)


def test_a_closed_memory_raises_everywhere() -> None:
    memory = GuestMemory(MIB)
    memory.close()
    memory.close()
    for use in (
        lambda: memory.read(0, 1),
        lambda: memory.write(0, b"x"),
        lambda: memory.view(),
        lambda: memory.pointer(),
        lambda: memory.discard(0, 0),
        lambda: list(memory.extents()),
        lambda: memory.allocated,
        lambda: memory.page_digests(),
        lambda: memory.pin(),
    ):
        with pytest.raises(ClosedError, match="closed"):
            use()


def test_a_view_outlives_the_memory() -> None:
    memory = GuestMemory(MIB)
    view = memory.view(0, 8)
    memory.write(0, b"survivor")
    memory.close()
    del memory
    gc.collect()
    assert view.tobytes() == b"survivor"
    view[0] = ord("S")
    assert view.tobytes() == b"Survivor"


def test_a_pin_keeps_the_pages_and_the_last_unpin_frees_them() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    memory = GuestMemory(MIB)
    memory.pin()
    memory.close()
    assert descriptors() > before
    memory.unpin()
    gc.collect()
    assert descriptors() == before


def test_views_share_one_memory() -> None:
    with GuestMemory(MIB) as memory:
        a, b = memory.view(), memory.view(PAGE_SIZE, PAGE_SIZE)
        a[PAGE_SIZE] = 9
        assert b[0] == 9
        assert np.shares_memory(a, b)
