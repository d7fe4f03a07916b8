"""Registers, CPUID and MSRs of a vCPU as KVM's interface has them, with its checks and refusals."""

from __future__ import annotations

import contextlib
import errno
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pykvm.errors import KvmError, MsrError, UsageError
from pykvm.model.cpu import cpuid
from pykvm.model.cpu.control import cr4_allowed
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.msrs import read_msr, write_msr
from pykvm.x86.bits import Cr0, Cr4, Efer
from pykvm.x86.registers import (
    GENERAL,
    SEGMENT_FIELDS,
    SEGMENTS,
    DescriptorTable,
    Registers,
    SpecialRegisters,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pykvm.model.cpu.processor import Processor
    from pykvm.model.machine import ModelMachine
    from pykvm.x86.cpuid import CpuidEntry

MAX_CPUID_ENTRIES: Final = 256
_WIDTHS: Final = dict.fromkeys(SEGMENT_FIELDS, 8) | {"base": 64, "limit": 32, "selector": 16}
_CONTROL: Final = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
_CR3_RESERVED_TOP: Final = 0x7FF << 52  # bit 63 is PCID's, and not stored
_SREGS_REFUSED: Final = (
    "the control registers contradict each other or name a feature that the guest's CPUID lacks (CR0.PG "
    "without PE, EFER.LMA without PG and PAE, CR4 bits without their CPUID bit, CR3 beyond MAXPHYADDR …)."
)
_UNKNOWN_MSR: Final = "the model does not know it, or not for this guest's CPUID."


class VcpuPart(ABC):
    """What the parts of a vCPU share."""

    vm: ModelMachine
    cpu: Processor
    entries: int

    @property
    @abstractmethod
    def name(self) -> str:
        """How messages call this vCPU."""

    @abstractmethod
    def use(self, operation: str) -> AbstractContextManager[Processor]:
        """The processor for this thread alone."""

    @abstractmethod
    def abandon_io(self) -> None:
        """The host moved the vCPU elsewhere: answers for the old place are void."""


class VcpuRegisters(VcpuPart):
    """General and special registers.  All methods raise ClosedError, BusyError, KvmError."""

    def get_registers(self) -> Registers:
        """KVM_GET_REGS (api.rst 4.11)."""
        with self.use("KVM_GET_REGS") as cpu:
            return cpu.get_registers()

    def set_registers(self, registers: Registers) -> None:
        """KVM_SET_REGS (api.rst 4.12).  Raises UsageError for a value that does not fit 64 bits."""
        for name in (*GENERAL, "rip", "rflags"):
            if not 0 <= getattr(registers, name) < 1 << 64:
                raise UsageError(f"Register {name} must be an unsigned 64-bit number.")
        with self.use("KVM_SET_REGS") as cpu:
            if registers.rip != cpu.rip:
                self.abandon_io()
            cpu.pending_debug = 0
            cpu.set_registers(registers)

    def get_special_registers(self) -> SpecialRegisters:
        """KVM_GET_SREGS (api.rst 4.13); ``pdptrs`` stays None."""
        value = self.get_special_registers2()
        value.pdptrs = None
        value.interrupt = self.cpu.injected_interrupt
        return value

    def get_special_registers2(self) -> SpecialRegisters:
        """KVM_GET_SREGS2 (api.rst 4.131): has ``pdptrs`` in PAE mode, no ``interrupt``."""
        with self.use("KVM_GET_SREGS2") as cpu:
            value = cpu.get_special_registers()
            for name in SEGMENTS:
                setattr(value, name, getattr(value, name).copy())  # the processor's are never changed
            return value

    def set_special_registers(self, registers: SpecialRegisters) -> None:
        """KVM_SET_SREGS (api.rst 4.14): PAE's page-directory pointers are read from memory.

        Raises UsageError for values out of range, KvmError (EINVAL) for contradictions.
        """
        _check_ranges(registers)
        vector = registers.interrupt
        if vector is not None and not 0 <= vector < 256:
            raise UsageError(f"Interrupt vector {vector} is not in 0 to 255.")
        with self.use("KVM_SET_SREGS") as cpu, self.vm.schedule.visit():
            self._set_special(cpu, registers, "KVM_SET_SREGS")
            cpu.injected_interrupt = vector
            if cpu.pae_paging:
                with contextlib.suppress(Fault):
                    cpu.pdptrs = cpu.load_pdptrs()
                cpu.host_changed_control()

    def set_special_registers2(self, registers: SpecialRegisters) -> None:
        """KVM_SET_SREGS2 (api.rst 4.132): with ``pdptrs``, which are then not read from memory.

        Raises UsageError for values out of range, KvmError (EINVAL) for contradictions.
        """
        _check_ranges(registers)
        if registers.pdptrs is None:
            vector = self.cpu.injected_interrupt
            self.set_special_registers(replace(registers, interrupt=vector))
            return
        if len(registers.pdptrs) != 4 or not all(0 <= each < 1 << 64 for each in registers.pdptrs):
            raise UsageError("pdptrs are four unsigned 64-bit numbers.")
        with self.use("KVM_SET_SREGS2") as cpu:
            if not _uses_pae_pointers(registers):
                raise KvmError(errno.EINVAL, "KVM_SET_SREGS2", _SREGS_REFUSED)
            self._set_special(cpu, registers, "KVM_SET_SREGS2")

    @staticmethod
    def _set_special(cpu: Processor, value: SpecialRegisters, operation: str) -> None:
        if not _consistent(cpu, value):
            raise KvmError(errno.EINVAL, operation, _SREGS_REFUSED)
        copy = replace(value, **{name: getattr(value, name).copy() for name in SEGMENTS})
        copy.gdt = DescriptorTable(value.gdt.base, value.gdt.limit)
        copy.idt = DescriptorTable(value.idt.base, value.idt.limit)
        cpu.set_special_registers(copy)
        cpu.host_changed_control()

    # --- CPUID -------------------------------------------------------------------------------------------

    def get_cpuid(self) -> tuple[CpuidEntry, ...]:
        """KVM_GET_CPUID2 (api.rst 4.46): the leaves as the guest sees them now."""
        with self.use("KVM_GET_CPUID2") as cpu:
            return tuple(cpuid.current(cpu, leaf) for leaf in cpu.cpuid)

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        """KVM_SET_CPUID2 (api.rst 4.20, 4.46); before the first run.

        Raises UsageError for more than 256 leaves or a field beyond 32 bits, KvmError where it is too late.
        """
        if len(entries) > MAX_CPUID_ENTRIES:
            raise UsageError(f"{len(entries)} CPUID leaves are too many; KVM takes at most 256.")
        for entry in entries:
            for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx"):
                check_width(name, getattr(entry, name), 32)
        with self.use("KVM_SET_CPUID2") as cpu:
            if self.entries and tuple(entries) != cpu.cpuid:
                raise KvmError(
                    errno.EINVAL,
                    "KVM_SET_CPUID2",
                    "the vCPU ran already, after which its CPUID is fixed; set CPUID before the first run.",
                )
            cpu.set_cpuid(entries)

    # --- MSRs --------------------------------------------------------------------------------------------

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS (api.rst 4.18) by index.  Raises MsrError naming the first that does not exist."""
        values, refused = self._read_msrs(indices)
        if refused:
            raise MsrError(refused[0], "KVM_GET_MSRS", _UNKNOWN_MSR)
        return values

    def get_readable_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """As ``get_msrs``, leaving out those that do not exist."""
        return self._read_msrs(indices)[0]

    def _read_msrs(self, indices: Iterable[int]) -> tuple[dict[int, int], list[int]]:
        values: dict[int, int] = {}
        refused: list[int] = []
        with self.use("KVM_GET_MSRS") as cpu:
            for index in dict.fromkeys(indices):
                try:
                    values[index] = read_msr(cpu, index, host=True)
                except Fault:
                    refused.append(index)
        return values, refused

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """KVM_SET_MSRS (api.rst 4.19) in the mapping's order.

        Raises MsrError naming the first that is refused (unknown, read-only, reserved bits); those before it
        are set then.
        """
        for index, value in values.items():
            if not (0 <= index < 1 << 32 and 0 <= value < 1 << 64):
                raise UsageError(
                    f"MSR {index:#x} with value {value:#x}: 32 and 64 bits, unsigned, are the limits."
                )
        with self.use("KVM_SET_MSRS") as cpu:
            for done, (index, value) in enumerate(values.items()):
                try:
                    write_msr(cpu, index, value, host=True)
                except Fault:
                    raise MsrError(
                        index,
                        "KVM_SET_MSRS",
                        f"the value {value:#x} has reserved bits, or the model or the guest lacks the "
                        f"register; {done} of {len(values)} were set before it.",
                    ) from None


def check_width(name: str, value: int, bits: int) -> None:
    """Raises UsageError, naming the field, for a value that it cannot hold."""
    if not isinstance(value, int) or not 0 <= value < 1 << bits:
        raise UsageError(f"{name} cannot be {value!r}: it does not fit the field's type and width.")


def _check_ranges(value: SpecialRegisters) -> None:
    """KVM's structures have these widths.  Raises UsageError."""
    numbers = [
        (f"{name}.{field}", getattr(getattr(value, name), field), _WIDTHS[field])
        for name in SEGMENTS
        for field in SEGMENT_FIELDS
    ]
    for name in ("gdt", "idt"):
        table = getattr(value, name)
        numbers += [(f"{name}.base", table.base, 64), (f"{name}.limit", table.limit, 16)]
    numbers += [(name, getattr(value, name), 64) for name in _CONTROL]
    for name, number, width in numbers:
        if not 0 <= number < 1 << width:
            raise UsageError(f"A special register is out of its range: {name} has {width} bits.")


def _uses_pae_pointers(value: SpecialRegisters) -> bool:
    return bool(value.cr0 & Cr0.PG and value.cr4 & Cr4.PAE and not value.efer & Efer.LMA)


def _consistent(cpu: Processor, value: SpecialRegisters) -> bool:
    """What KVM asks of CR0, CR3, CR4 and EFER together (arch/x86/kvm, KVM_SET_SREGS; SDM vol. 3, 2.5)."""
    cr0, cr4, efer = value.cr0, value.cr4, value.efer
    if cr0 >> 32 or (cr0 & Cr0.NW and not cr0 & Cr0.CD) or (cr0 & Cr0.PG and not cr0 & Cr0.PE):
        return False
    if cr4 & ~cr4_allowed(cpu) or (efer & Efer.LME and not cpu.features.lm):
        return False
    if efer & Efer.LME and cr0 & Cr0.PG:
        top = _CR3_RESERVED_TOP | (1 << 52) - (1 << cpu.features.physical_bits)
        return bool(cr4 & Cr4.PAE and efer & Efer.LMA and not value.cr3 & top)
    return not efer & Efer.LMA and not value.cs.l
