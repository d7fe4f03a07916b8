"""From an image file to a machine that is ready to run: memory, slots, vCPUs, boot state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Final, Self

from pykvm.errors import ImageError, UsageError
from pykvm.guest.boot import Arena, BootMode, BootState, SystemTables, boot_state
from pykvm.guest.devices import DeviceBus
from pykvm.guest.images import REAL_LIMIT, Image
from pykvm.guest.multiboot import prepare_multiboot
from pykvm.guest.pagetables import USER, PageTables, PagingMode
from pykvm.guest.runner import GuestRunner
from pykvm.machine import Machine, SlotFlags, System
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.x86.bits import Pte
from pykvm.x86.cpuid import CpuidEntry

_LARGE: Final = 2 << 20
_HUGE32: Final = 4 << 20
_HOLE: Final = 3 << 30
_APIC_BASE: Final = 0xFEE00000
_X2APIC: Final = 1 << 21  # CPUID leaf 1, ECX

PAGING: Final = {
    BootMode.PAGED32: PagingMode.LEGACY32,
    BootMode.PAE: PagingMode.PAE,
    BootMode.LONG: PagingMode.LONG4,
    BootMode.LA57: PagingMode.LONG5,
}


@dataclass(frozen=True, slots=True)
class BootExtras:
    """What an image gets beside its memory.

    ``cmdline`` and ``modules`` (contents, name) are for multiboot.  ``mappings`` are further (linear,
    physical, size) in paged modes, mapped with 4 KiB pages.
    """

    cmdline: str = ""
    modules: Sequence[tuple[bytes, str]] = ()
    mappings: Sequence[tuple[int, int, int]] = ()


class LaunchedGuest:
    """A machine with an image in it; a context manager that stops and closes everything."""

    def __init__(self, machine: Machine, memories: Sequence[GuestMemory], bus: DeviceBus) -> None:
        self.machine = machine
        self.memory = memories[0]
        self.bus = bus
        self.runner = GuestRunner(machine, bus)
        self._memories = memories

    def close(self) -> None:
        """Idempotent."""
        try:
            self.runner.stop()
        finally:
            self.machine.close()
            for memory in self._memories:
                memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def launch(
    system: System,
    image: Image,
    bus: DeviceBus,
    *,
    memory: int = 32 << 20,
    vcpus: int = 1,
    cpl: int = 0,
    irqchip: bool = False,
    extras: BootExtras | None = None,
    prepare: Callable[[Machine], None] | None = None,
) -> LaunchedGuest:
    """Make a machine for ``image``; it runs with ``runner.start()``.

    ``memory`` bytes (a multiple of 4096, up to 3 GiB) lie at gpa 0.  Flat and ELF images start at CPL
    ``cpl`` with flat segments, in paged modes with memory identity-mapped, the tables at its end, RDI = the
    vCPU's number, and no interrupt handlers; multiboot kernels and ROMs start as their loaders promise, and
    of several vCPUs only the first runs until the guest starts the others, which needs ``irqchip``.
    ``prepare`` gets the machine before it has slots and vCPUs, to create the irqchip that ``irqchip`` tells
    of or to enable a dirty ring; without irqchip a zeroed page stands in for the local APIC of a multiboot
    kernel, and x2APIC is hidden.  Raises UsageError, ImageError, HostError, KvmError.
    """
    if memory % PAGE_SIZE or not REAL_LIMIT <= memory <= _HOLE:
        raise UsageError("The memory of a guest is a multiple of 4096 bytes, from 1 MiB to 3 GiB.")
    as_on_pc = image.format in {"multiboot", "rom"}
    if as_on_pc and vcpus > 1 and not irqchip:
        raise UsageError("Without an interrupt controller a kernel cannot start further vCPUs; use one.")
    extras = extras or BootExtras()
    memories: list[GuestMemory] = []
    machine = system.create_machine()
    try:
        if prepare is not None:
            prepare(machine)
        memories.append(GuestMemory(memory))
        machine.create_slot(memories[0], 0)
        states = _states(machine, memories, image, vcpus, cpl, extras)
        if image.format == "multiboot" and not irqchip:
            memories.append(GuestMemory(PAGE_SIZE))
            machine.create_slot(memories[-1], _APIC_BASE)
        cpuid = machine.supported_cpuid if irqchip else _without_x2apic(machine.supported_cpuid)
        for number in range(vcpus):
            vcpu = machine.create_vcpu()
            vcpu.set_cpuid(cpuid)
            if number < len(states):
                states[number].apply(vcpu)
        return LaunchedGuest(machine, memories, bus)
    except BaseException:
        machine.close()
        for each in memories:
            each.close()
        raise


def _states(
    machine: Machine, memories: list[GuestMemory], image: Image, vcpus: int, cpl: int, extras: BootExtras
) -> list[BootState]:
    """Put the image where it belongs; the first states of the vCPUs that are not left as after reset."""
    memory = memories[0]
    if image.format == "rom":
        (chunk,) = image.chunks
        rom = GuestMemory(chunk.size)
        memories.append(rom)
        rom.write(0, chunk.data)
        machine.create_slot(rom, chunk.gpa, flags=SlotFlags.READONLY)
        shadow = chunk.data[-(128 << 10) :]  # a PC shows the ROM's end below 1 MiB, too
        memory.write(REAL_LIMIT - len(shadow), shadow)
        return []
    if image.format == "multiboot":
        return [prepare_multiboot(memory, image, cmdline=extras.cmdline, modules=extras.modules)]
    image.place(memory)
    return _plain_states(memory, image, vcpus, cpl, extras)


def _plain_states(
    memory: GuestMemory, image: Image, vcpus: int, cpl: int, extras: BootExtras
) -> list[BootState]:
    mode = image.mode
    if mode is BootMode.REAL:
        states = [
            boot_state(mode, entry=image.entry, stack=0x7C00 - 0x200 * n, cpl=cpl) for n in range(vcpus)
        ]
    else:
        arena = _arena(memory, image, mode, vcpus)
        stacks = [arena.take() + PAGE_SIZE for _ in range(2 * vcpus)]
        wide = mode in {BootMode.LONG, BootMode.LA57}
        tables = SystemTables.build(memory, arena.take, wide=wide, stacks=stacks[:vcpus])
        cr3 = _map(memory, arena, PAGING[mode], extras) if mode in PAGING else 0
        states = [
            boot_state(
                mode, entry=image.entry, stack=stacks[vcpus + n], cpl=cpl, cr3=cr3, tables=tables, vcpu=n
            )
            for n in range(vcpus)
        ]
    for number, state in enumerate(states):
        state.registers.rdi = number
    return states


def _arena(memory: GuestMemory, image: Image, mode: BootMode, vcpus: int) -> Arena:
    """The last pages of memory, for tables and stacks."""
    pages = 1 + 5 * vcpus
    if mode in PAGING:
        pages += 32 + memory.size // _LARGE // 512
        pages += 1 + memory.size % _HUGE32 // PAGE_SIZE // 512
    start = memory.size - pages * PAGE_SIZE
    if any(chunk.gpa + chunk.size > start for chunk in image.chunks):
        raise ImageError("The guest's memory is too small for the image and its tables; give it more.")
    return Arena(start, memory.size)


def _map(memory: GuestMemory, arena: Arena, mode: PagingMode, extras: BootExtras) -> int:
    tables = PageTables(mode, memory, arena.take)
    large = _HUGE32 if mode is PagingMode.LEGACY32 else _LARGE
    whole = memory.size // large * large
    flags = Pte(USER)
    if whole:
        tables.map(0, 0, whole, page_size=large, flags=flags)
    if memory.size > whole:
        tables.map(whole, whole, memory.size - whole, flags=flags)
    for linear, physical, size in extras.mappings:
        tables.map(linear, physical, size, flags=flags)
    return tables.cr3


def _without_x2apic(entries: Sequence[CpuidEntry]) -> list[CpuidEntry]:
    return [replace(entry, ecx=entry.ecx & ~_X2APIC) if entry.function == 1 else entry for entry in entries]
