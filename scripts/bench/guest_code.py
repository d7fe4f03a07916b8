"""The guests of the bench: a few bytes of machine code each, and the state to start them in."""

from __future__ import annotations

import struct

from pykvm.guest.boot import Arena, BootMode, SystemTables, boot_state
from pykvm.guest.pagetables import PageTables, PagingMode
from pykvm.machine import Vcpu
from pykvm.memory import PAGE_SIZE, GuestMemory

CODE = 0x1000
QUIET_PORT = 0x10
STOP_PORT = 0x11
WINDOW = 1 << 30
"""Linear address from which on the pages to be dirtied are mapped."""


def port_writes(values: bytes) -> bytes:
    """Each of ``values`` to QUIET_PORT, then one to STOP_PORT, from the start again; real-mode code."""
    block = b"".join(bytes((0xB0, value, 0xE6, QUIET_PORT)) for value in values)  # mov al, … ; out …, al
    block += bytes((0xE6, STOP_PORT))
    return block + b"\xe9" + struct.pack("<h", -(len(block) + 3))


# mov rdi, rsi ; mov rcx, rdx ; next: mov [rdi], rcx ; add rdi, 4096 ; dec rcx ; jnz next
# out STOP_PORT, al ; jmp to the start
STORE_EACH_PAGE = bytes.fromhex("4889f7 4889d1 48890f 4881c700100000 48ffc9 75f1") + bytes(
    (0xE6, STOP_PORT, 0xEB, 0xE7)
)


def start_page_stores(vcpu: Vcpu, memory: GuestMemory, targets: list[tuple[int, int]]) -> int:
    """Long mode at CPL 3 (native on every host): each STOP_PORT exit ends one pass that stores to every page.

    ``targets`` are ranges (gpa, pages), mapped one behind the other at WINDOW.  The tables have A and D set,
    so nothing but the pages themselves becomes dirty after the first pass.  Everything the guest itself needs
    lies below 0x10000 plus tables from there on; returns the first gpa behind them.
    """
    arena = Arena(0x10000, min(memory.size, 64 << 20))
    tables = SystemTables.build(memory, arena.take, wide=True, stacks=[0x8000])
    pages = PageTables(PagingMode.LONG4, memory, arena.take)
    pages.map(0, 0, arena.next)
    linear = WINDOW
    for gpa, count in targets:
        pages.map(linear, gpa, count * PAGE_SIZE)
        linear += count * PAGE_SIZE
    memory.write(CODE, STORE_EACH_PAGE)
    state = boot_state(BootMode.LONG, entry=CODE, stack=0x9000, cpl=3, cr3=pages.cr3, tables=tables)
    state.registers.rsi = WINDOW
    state.registers.rdx = sum(count for _, count in targets)
    state.apply(vcpu)
    return arena.next
