"""From the kvm_run page to typed exits (api.rst section 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.abi import ffi, lib
from pykvm.machine.exits import (
    DebugStop,
    DirtyRingFull,
    Exit,
    FailEntry,
    Halted,
    InternalError,
    InterruptWindow,
    IoIn,
    IoOut,
    MemoryFault,
    MmioRead,
    MmioWrite,
    Shutdown,
    SystemEvent,
    UnknownExit,
)
from pykvm.x86.disassembly import disassemble_one

if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.abi.library import CData

MAX_INSTRUCTION = 15


def decode(run: CData, code_bits: Callable[[], int]) -> Exit:
    """The exit that ``run`` (a ``struct pykvm_run_page *``) holds.

    ``code_bits`` tells the guest's code size (16, 32, 64) and is asked only to disassemble.
    """
    reason = run.exit_reason
    payload = run.u
    if reason == lib.KVM_EXIT_IO:
        return _io(run)
    if reason == lib.KVM_EXIT_MMIO:
        mmio = payload.mmio
        if mmio.is_write:
            return MmioWrite(mmio.phys_addr, bytes(ffi.buffer(mmio.data))[: mmio.len])
        return MmioRead(mmio.phys_addr, mmio.len)
    if reason == lib.KVM_EXIT_INTERNAL_ERROR:
        return _internal_error(payload.internal, code_bits)
    if reason == lib.KVM_EXIT_DEBUG:
        debug = payload.debug
        return DebugStop(debug.exception, debug.pc, debug.dr6, debug.dr7)
    if reason == lib.KVM_EXIT_FAIL_ENTRY:
        fail = payload.fail_entry
        return FailEntry(fail.hardware_entry_failure_reason, fail.cpu)
    if reason == lib.KVM_EXIT_MEMORY_FAULT:
        fault = payload.memory_fault
        return MemoryFault(fault.flags, fault.gpa, fault.size)
    if reason == lib.KVM_EXIT_SYSTEM_EVENT:
        event = payload.system_event
        return SystemEvent(event.type, tuple(event.data[0 : min(event.ndata, 16)]))
    simple = _SIMPLE.get(reason)
    if simple is not None:
        return simple
    return UnknownExit(reason, bytes(ffi.buffer(payload.bytes)))


_SIMPLE: dict[int, Exit] = {
    lib.KVM_EXIT_HLT: Halted(),
    lib.KVM_EXIT_SHUTDOWN: Shutdown(),
    lib.KVM_EXIT_DIRTY_RING_FULL: DirtyRingFull(),
    lib.KVM_EXIT_IRQ_WINDOW_OPEN: InterruptWindow(),
}


def _io(run: CData) -> Exit:
    io = run.u.io
    if io.direction == lib.KVM_EXIT_IO_IN:
        return IoIn(io.port, io.size, io.count)
    # SAFETY: KVM puts size * count <= 4096 bytes at data_offset, within the vCPU mapping.
    data = ffi.buffer(ffi.cast("char *", run) + io.data_offset, io.size * io.count)
    return IoOut(io.port, io.size, bytes(data), io.count)


def _internal_error(internal: CData, code_bits: Callable[[], int]) -> InternalError:
    """The instruction bytes follow the flags word where flag 0 says so (kvm_run.emulation_failure)."""
    ndata = min(internal.ndata, 16)
    data = tuple(internal.data[0:ndata])
    instruction = b""
    if (
        internal.suberror == lib.KVM_INTERNAL_ERROR_EMULATION
        and ndata >= 3
        and data[0] & lib.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
    ):
        raw = bytes(ffi.buffer(internal.data))[8:24]
        instruction = raw[1 : 1 + min(raw[0], MAX_INSTRUCTION)]
    text = disassemble_one(instruction, code_bits()) if instruction else ""
    return InternalError(internal.suberror, data, instruction, text)
