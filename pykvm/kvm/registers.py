"""General and special registers (api.rst 4.11 to 4.14, 4.131, 4.132)."""

from __future__ import annotations

import errno
import struct
from operator import attrgetter
from typing import TYPE_CHECKING

from pykvm.abi import ffi, lib
from pykvm.abi.managed import Managed, Refusals
from pykvm.errors import KvmError, UsageError
from pykvm.kvm.emulators import task_segment_type
from pykvm.x86.registers import (
    GENERAL,
    SEGMENT_FIELDS,
    SEGMENTS,
    DescriptorTable,
    Registers,
    Segment,
    SpecialRegisters,
)

if TYPE_CHECKING:
    from pykvm.abi.library import CData

# struct kvm_regs is the sixteen registers in the order of Registers, then rip and rflags.
_REGS = struct.Struct("<18Q")
_NAMES = (*GENERAL, "rip", "rflags")
# struct kvm_segment is the fields of Segment in their order, then a byte of padding.
_SEGMENT = struct.Struct("<QIH9Bx")
_FIELDS = attrgetter(*SEGMENT_FIELDS)
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")

_SREGS_REFUSALS: Refusals = {
    errno.EINVAL: (
        KvmError,
        "the control registers contradict each other or name a feature that the guest's CPUID or the host "
        "lacks (CR0.PG without PE, EFER.LMA without PG and PAE, EFER.LME or CR4.LA57 without its CPUID bit, "
        "CR3 beyond MAXPHYADDR …).",
    )
}


def fill_special(sregs: CData, value: SpecialRegisters) -> None:
    """Write the fields that kvm_sregs and kvm_sregs2 share."""
    # SAFETY: both structures begin with the eight segments, in the order of SEGMENTS.
    room = ffi.buffer(ffi.addressof(sregs, "cs"), len(SEGMENTS) * _SEGMENT.size)
    try:
        room[:] = b"".join(_SEGMENT.pack(*_FIELDS(getattr(value, name))) for name in SEGMENTS)
    except struct.error as error:
        raise OverflowError(f"a segment: {error}") from None
    sregs.tr.type = task_segment_type(value.tr.type)
    for name in ("gdt", "idt"):
        table = getattr(value, name)
        getattr(sregs, name).base = table.base
        getattr(sregs, name).limit = table.limit
    for name in _CONTROL:
        setattr(sregs, name, getattr(value, name))


def read_special(sregs: CData) -> SpecialRegisters:
    """Read the fields that kvm_sregs and kvm_sregs2 share."""
    # SAFETY: both structures begin with the eight segments, in the order of SEGMENTS.
    data = ffi.buffer(ffi.addressof(sregs, "cs"), len(SEGMENTS) * _SEGMENT.size)
    value = SpecialRegisters()
    for name, fields in zip(SEGMENTS, _SEGMENT.iter_unpack(data), strict=True):
        setattr(value, name, Segment(*fields))
    value.gdt = DescriptorTable(sregs.gdt.base, sregs.gdt.limit)
    value.idt = DescriptorTable(sregs.idt.base, sregs.idt.limit)
    for name in _CONTROL:
        setattr(value, name, getattr(sregs, name))
    return value


def fill_general(regs: CData, value: Registers) -> None:
    """Write a kvm_regs.  Raises UsageError for a value that does not fit 64 bits."""
    values = [getattr(value, name) for name in _NAMES]
    try:
        ffi.buffer(regs)[:] = _REGS.pack(*values)
    except struct.error:
        bad = next(n for n, v in zip(_NAMES, values, strict=True) if not 0 <= v < 1 << 64)
        raise UsageError(f"Register {bad} must be an unsigned 64-bit number.") from None


def read_general(regs: CData) -> Registers:
    """Read a kvm_regs."""
    return Registers(*_REGS.unpack(ffi.buffer(regs)))


def fill_sregs(sregs: CData, value: SpecialRegisters) -> None:
    """Write a kvm_sregs, which has no ``pdptrs``.  Raises UsageError for values out of range."""
    _fill_checked(sregs, value)
    sregs.interrupt_bitmap = (0, 0, 0, 0)
    vector = value.interrupt
    if vector is not None:
        if not 0 <= vector < 256:
            raise UsageError(f"Interrupt vector {vector} is not in 0 to 255.")
        sregs.interrupt_bitmap[vector // 64] = 1 << vector % 64


def read_sregs(sregs: CData) -> SpecialRegisters:
    """Read a kvm_sregs."""
    value = read_special(sregs)
    for i, word in enumerate(sregs.interrupt_bitmap):
        if word:
            value.interrupt = i * 64 + word.bit_length() - 1
    return value


def _fill_checked(sregs: CData, value: SpecialRegisters) -> None:
    try:
        fill_special(sregs, value)
    except OverflowError as error:
        raise UsageError(f"A special register is out of its range: {error}.") from None


class VcpuRegisters(Managed):
    """General and special registers of a vCPU.  All methods raise ClosedError, BusyError, KvmError."""

    def get_registers(self) -> Registers:
        """KVM_GET_REGS (api.rst 4.11)."""
        regs = ffi.new("struct kvm_regs *")
        self.ioctl(lib.KVM_GET_REGS, regs, "KVM_GET_REGS")
        return read_general(regs)

    def set_registers(self, registers: Registers) -> None:
        """KVM_SET_REGS (api.rst 4.12).  Raises UsageError for a value that does not fit 64 bits."""
        regs = ffi.new("struct kvm_regs *")
        fill_general(regs, registers)
        self.ioctl(lib.KVM_SET_REGS, regs, "KVM_SET_REGS")

    def get_special_registers(self) -> SpecialRegisters:
        """KVM_GET_SREGS (api.rst 4.13); ``pdptrs`` stays None, it needs KVM_GET_SREGS2."""
        sregs = ffi.new("struct kvm_sregs *")
        self.ioctl(lib.KVM_GET_SREGS, sregs, "KVM_GET_SREGS")
        return read_sregs(sregs)

    def set_special_registers(self, registers: SpecialRegisters) -> None:
        """KVM_SET_SREGS (api.rst 4.14); ``pdptrs`` is ignored.  Raises UsageError for values out of range."""
        sregs = ffi.new("struct kvm_sregs *")
        fill_sregs(sregs, registers)
        self.ioctl(lib.KVM_SET_SREGS, sregs, "KVM_SET_SREGS", _SREGS_REFUSALS)

    def get_special_registers2(self) -> SpecialRegisters:
        """KVM_GET_SREGS2 (api.rst 4.131, KVM_CAP_SREGS2): has ``pdptrs`` in PAE mode, no ``interrupt``."""
        sregs = ffi.new("struct kvm_sregs2 *")
        self.ioctl(lib.KVM_GET_SREGS2, sregs, "KVM_GET_SREGS2")
        value = read_special(sregs)
        if sregs.flags & lib.KVM_SREGS2_FLAGS_PDPTRS_VALID:
            first, second, third, fourth = sregs.pdptrs
            value.pdptrs = (first, second, third, fourth)
        return value

    def set_special_registers2(self, registers: SpecialRegisters) -> None:
        """KVM_SET_SREGS2 (api.rst 4.132, KVM_CAP_SREGS2): PAE's page-directory pointers are set from
        ``pdptrs`` instead of being read from guest memory; ``interrupt`` is ignored.

        Raises UsageError for values out of range, KvmError (EINVAL) for pdptrs outside PAE mode.
        """
        sregs = ffi.new("struct kvm_sregs2 *")
        _fill_checked(sregs, registers)
        if registers.pdptrs is not None:
            sregs.flags = lib.KVM_SREGS2_FLAGS_PDPTRS_VALID
            try:
                sregs.pdptrs = registers.pdptrs
            except (OverflowError, IndexError):
                raise UsageError("pdptrs are four unsigned 64-bit numbers.") from None
        self.ioctl(lib.KVM_SET_SREGS2, sregs, "KVM_SET_SREGS2", _SREGS_REFUSALS)
