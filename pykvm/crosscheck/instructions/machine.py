"""Cases on a machine, whichever it is: the model, or a real KVM."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from pykvm.crosscheck.instructions import fxsave, guest
from pykvm.crosscheck.instructions.case import REAL, InstructionCase, Outcome, layout_of
from pykvm.errors import PykvmError, UnsupportedInstruction
from pykvm.machine import Exit, InternalError, IoOut, Kicked, Machine, Shutdown, System, Vcpu
from pykvm.memory import GuestMemory
from pykvm.observe.arena import changes
from pykvm.observe.refusals import split
from pykvm.x86.bits import PageFault, Rflags
from pykvm.x86.cpuid import CpuidEntry
from pykvm.x86.exceptions import Vector
from pykvm.x86.fpu import FloatingPoint
from pykvm.x86.registers import Registers

_LIMIT: Final = 5.0
"""Seconds after which a case is unfinished: code that jumps to itself."""
_FETCH: Final = int(PageFault.ID)
_FX_BYTES: Final = 512
_CHANGING: Final = frozenset(
    (
        0x07,
        0x0E,
        0x17,
        0x1F,
        0x8C,
        0x8E,
        0x9A,
        0xC4,
        0xC5,
        0xCA,
        0xCB,
        0xCC,
        0xCD,
        0xCE,
        0xCF,
        0xEA,
        0xF1,
        0xFF,
    )
)
"""One-byte opcodes that load segments or enter handlers."""
_NOT_CHANGING: Final = frozenset(
    set(range(0x0D, 0x100))
    - {*range(0x20, 0x28), *range(0x30, 0x38), *range(0xA0, 0xA3), *range(0xA6, 0xAB), 0xB2, 0xB4, 0xB5}
)
"""Opcodes of the 0F map that do not."""


def changes_special_registers(case: InstructionCase) -> bool:
    """Whether the instruction may leave segments, control registers or tables changed."""
    _, body = split(case.code, case.mode)
    if body[:1] == b"\x0f":
        return len(body) < 2 or body[1] not in _NOT_CHANGING
    return not body or body[0] in _CHANGING


class _Watchdog:
    """Kicks a vCPU out of a case that takes longer than _LIMIT: one thread for all cases."""

    def __init__(self) -> None:
        self._vcpu: Vcpu | None = None
        self._since = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="crosscheck watchdog", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(_LIMIT / 4):
            vcpu = self._vcpu
            if vcpu is not None and time.monotonic() - self._since > _LIMIT:
                self._vcpu = None
                vcpu.kick()

    def run(self, vcpu: Vcpu) -> Exit:
        self._since = time.monotonic()
        self._vcpu = vcpu
        try:
            return vcpu.run()
        finally:
            self._vcpu = None

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


class MachineExecutor:
    """One vCPU of a machine of ``system`` that executes cases of one mode and CPL."""

    def __init__(
        self, system: System, mode: int, cpl: int, cpuid: Sequence[CpuidEntry] | None = None
    ) -> None:
        """``cpuid``: the processor that the guest sees; by default the best that the machine offers."""
        self.name = system.backend
        self.mode = mode
        self.cpl = cpl
        self._system = system
        self._cpuid = cpuid
        self._layout = layout_of(mode)
        self._watchdog = _Watchdog()
        self._machine: Machine | None = None
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the machine; twice does nothing."""
        self._watchdog.close()
        self._tear_down()

    def accepts(self, case: InstructionCase) -> bool:
        """Whether mode and CPL are this executor's."""
        return case.mode == self.mode and case.cpl == self.cpl

    # --- the machine -------------------------------------------------------------------------------------

    def _build(self) -> None:
        self._guest_memory = GuestMemory(guest.MEMORY)
        self._memory = memoryview(self._guest_memory.view().data)
        self._machine = self._system.create_machine()
        self._machine.create_slot(self._guest_memory, 0)
        if self.mode == 16:
            guest.build_real(self._memory)
            self._code, self._data = self._layout.code, self._layout.data
        else:
            guest.build_flat(self._memory, self.mode)
            self._code, self._data = guest.CODE, guest.DATA
        self._vcpu = self._machine.create_vcpu()
        self._vcpu.set_cpuid(self._cpuid if self._cpuid is not None else self._machine.supported_cpuid)
        self._start = self._vcpu.get_special_registers()
        self._bases: tuple[int, int] | None = None

    def _tear_down(self) -> None:
        if self._machine is not None:
            self._machine.close()
            self._machine = None
            self._memory.release()
            self._guest_memory.close()

    # --- a case ------------------------------------------------------------------------------------------

    def execute(self, case: InstructionCase) -> Outcome:
        """Run the case.  Raises KvmError and whatever else the machine raises."""
        before = self._place(case)
        vcpu = self._vcpu
        self._prepare(case)
        registers = replace(case.registers)
        if case.floating is not None:
            registers = self._enter_by_prologue(case, registers)
        vcpu.set_registers(registers)
        try:
            exit = self._watchdog.run(vcpu)
        except UnsupportedInstruction:
            return Outcome(Registers(), failure="unsupported")
        except PykvmError:
            raise
        except Exception as error:  # a bug of a machine in Python: an outcome, for the campaign goes on
            return self._crashed(error)
        if not isinstance(exit, IoOut):
            return self._failed(exit)
        if not self._complete():
            return Outcome(registers, failure="unfinished")
        outcome = self._outcome(case, before)
        if outcome.vector is None and not outcome.failure and not self._in_handler:
            self._bases = None if changes_special_registers(case) else (case.fs_base, case.gs_base)
        return outcome

    def _prepare(self, case: InstructionCase) -> None:
        """Set the special registers, unless they are as the case before it left them: that takes long."""
        if self._bases != (case.fs_base, case.gs_base) or case.mode == 16:
            self._vcpu.set_special_registers(guest.special_registers(case, self._start))
        self._bases = None

    def _place(self, case: InstructionCase) -> bytes:
        """Code and data into memory; the data as they are before the case."""
        layout, memory = self._layout, self._memory
        page = bytearray([guest.STOP]) * (layout.code_end - layout.code)
        at = case.linear - layout.code
        code = case.code[: len(page) - at]
        page[at : at + len(code)] = code
        memory[self._code : self._code + len(page)] = page
        image = bytearray(layout.end - layout.data)
        for address, data in case.memory.items():
            image[address - layout.data : address - layout.data + len(data)] = data
        memory[self._data : self._data + len(image)] = image
        return bytes(image)

    def _enter_by_prologue(self, case: InstructionCase, registers: Registers) -> Registers:
        assert case.floating is not None
        memory = self._memory
        area = guest.REAL_FXAREA if case.mode == 16 else guest.FXAREA
        memory[area : area + _FX_BYTES] = fxsave.image(case.floating)
        code = guest.prologue(case)
        at = guest.REAL_PROLOGUE if case.mode == 16 else guest.STUBS
        memory[at : at + len(code)] = code
        if case.mode == 16:
            self._set_code_segment_zero()
        return replace(registers, rip=at if case.mode == 16 else guest.PROLOGUE)

    def _set_code_segment_zero(self) -> None:
        special = self._vcpu.get_special_registers()
        special.cs = replace(special.cs, base=0, selector=0)
        self._vcpu.set_special_registers(special)

    def _complete(self) -> bool:
        """Let KVM finish the OUT, so that RIP is behind it on every host (docs/reference/hosts.md C.3)."""
        if self.name == "model":
            return True
        self._vcpu.kick()
        return isinstance(self._vcpu.run(), Kicked)

    def _crashed(self, error: Exception) -> Outcome:
        """A machine in Python may have a bug: that is an outcome, and the machine is made anew."""
        self._tear_down()
        self._build()
        return Outcome(Registers(), failure=f"crashed ({type(error).__name__}: {error})")

    def _failed(self, exit: Exit) -> Outcome:
        failure = {
            InternalError: "unsupported",
            Shutdown: "shutdown",
            Kicked: "unfinished",
        }.get(type(exit), type(exit).__name__)
        registers = self._vcpu.get_registers()
        if failure == "unsupported" and self.name == "model":
            failure = "no code there"  # what it has no semantics for raises UnsupportedInstruction
        if failure != "unsupported":
            self._tear_down()
            self._build()
        return Outcome(registers, failure=failure)

    def _outcome(self, case: InstructionCase, before: bytes) -> Outcome:
        registers = self._vcpu.get_registers()
        base = self._vcpu.get_special_registers().cs.base if case.mode == 16 else 0
        after = bytearray(self._memory[self._data : self._data + len(before)])
        vector = guest.handler_vector(case, registers.rip, base)
        self._in_handler = vector is not None
        if vector is None:
            linear = registers.rip - 1 + base
            at = linear - case.linear
            own = 0 <= at < len(case.code) and (at == 0 or case.code[at] != guest.STOP)
            if own or not self._layout.code <= linear < self._layout.code_end:
                return self._failed(IoOut(0, 1, b""))
            done = replace(registers, rip=registers.rip - 1)
            outcome = Outcome(done, changes(before, bytes(after), self._layout.data))
        elif case.mode == 16:
            outcome = self._real_exception(vector, registers, before, after)
        else:
            outcome = self._exception(
                case, vector, registers, changes(before, bytes(after), self._layout.data)
            )
        if case.floating is not None:
            outcome = replace(outcome, floating=self._save_floating(case, vector is not None))
        return outcome

    def _exception(
        self, case: InstructionCase, vector: int, registers: Registers, changed: tuple[tuple[int, bytes], ...]
    ) -> Outcome:
        """Read the frame on the IST stack; a fault of fetching elsewhere is the end of a branch."""
        has_error = vector < 32 and vector in set(Vector) and Vector(vector).has_error_code
        size = 48 if has_error else 40
        words = struct.unpack(f"<{size // 8}Q", self._memory[guest.FRAME_TOP - size : guest.FRAME_TOP])
        error, (rip, _, rflags, rsp, _) = (words[0], words[1:]) if has_error else (None, words)
        done = replace(registers, rip=rip, rflags=rflags, rsp=rsp)
        address = None
        if vector == Vector.PF:
            address = self._vcpu.get_special_registers().cr2
            if error is not None and error & _FETCH and rip == address and rip != case.registers.rip:
                return Outcome(done, changed)
        return Outcome(done, changed, None, vector, error, address)

    def _real_exception(self, vector: int, registers: Registers, before: bytes, after: bytearray) -> Outcome:
        """Read the frame on the case's stack, and put back what was under it."""
        sp = registers.rsp & 0xFFFF
        words = []
        for _ in range(3):
            at = REAL.stack - self._layout.data + sp
            words.append(int.from_bytes(after[at : at + 2], "little"))
            after[at : at + 2] = before[at : at + 2]
            sp = sp + 2 & 0xFFFF
        ip, _, flags = words
        done = replace(
            registers,
            rip=ip,
            rflags=registers.rflags & ~0xFFFF | flags,
            rsp=registers.rsp & ~0xFFFF | sp,
        )
        return Outcome(done, changes(before, bytes(after), self._layout.data), None, vector)

    def _save_floating(self, case: InstructionCase, in_handler: bool) -> FloatingPoint | None:
        if case.mode == 16:
            self._set_code_segment_zero()
        registers = self._vcpu.get_registers()
        long_epilogue = guest.HANDLER_EPILOGUE if in_handler else guest.EPILOGUE
        registers.rip = guest.REAL_EPILOGUE if case.mode == 16 else long_epilogue
        registers.rflags &= ~int(Rflags.AC)
        self._vcpu.set_registers(registers)
        exit = self._watchdog.run(self._vcpu)
        if not isinstance(exit, IoOut) or not self._complete():
            self._failed(exit)
            return None
        area = guest.REAL_FXAREA if case.mode == 16 else guest.FXAREA
        return fxsave.value(bytes(self._memory[area : area + _FX_BYTES]), xmm=16 if case.mode == 64 else 8)
