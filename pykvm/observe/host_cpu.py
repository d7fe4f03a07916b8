"""One instruction on the host's processor, from a given state to the state after it."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

from pykvm.errors import ClosedError, HostError, UsageError
from pykvm.observe.arena import CODE, DATA, PAGE, Arena, Changes
from pykvm.observe.child import ChildDiedError, TracedChild
from pykvm.observe.refusals import is_repeated_string, refusal, split
from pykvm.x86.bits import Rflags
from pykvm.x86.exceptions import Vector
from pykvm.x86.fpu import FloatingPoint
from pykvm.x86.registers import GENERAL, Registers

STOP: Final = 0xEE
"""OUT DX, AL, which faults at CPL 3: what the code page is full of but for the instruction."""

FLAGS: Final = int(
    Rflags.CF | Rflags.PF | Rflags.AF | Rflags.ZF | Rflags.SF | Rflags.DF | Rflags.OF | Rflags.AC
)
"""The flags that a case may set and an outcome tells; the kernel owns the others."""

_OWN_FLAGS: Final = int(Rflags.FIXED | Rflags.IF)
_STICKY_FLAGS: Final = int(Rflags.ID | Rflags.NT)
"""What POPF and IRET can set and ptrace cannot clear."""
_CS: Final = {64: 0x33, 32: 0x23}
_DATA_SELECTOR: Final = 0x2B
_NO_SYSTEM_CALL: Final = 2**64 - 1
_SI_KERNEL, _TRAP_TRACE = 0x80, 2
_SEGV_MAPERR, _SEGV_ACCERR = 1, 2
_FPE_INTDIV: Final = 1
_ERROR_SUMMARY: Final = 1 << 7


@dataclass(frozen=True, slots=True)
class HostCase:
    """An instruction and the state before it.

    ``code`` is placed at ``registers.rip``, which lies in the code page (``arena.CODE``); a page end cuts it
    off.  ``memory`` are (address: bytes) inside the arena, which is zero elsewhere.  Of RFLAGS only FLAGS
    count.  In 64-bit code FS and GS have the bases given; in 32-bit code all segments are flat.
    ``floating`` None leaves x87 and SSE as they are, and out of the outcome.
    """

    code: bytes
    registers: Registers
    floating: FloatingPoint | None = None
    memory: Mapping[int, bytes] = field(default_factory=dict)
    fs_base: int = 0
    gs_base: int = 0


@dataclass(frozen=True, slots=True)
class HostOutcome:
    """The state after the instruction.

    ``vector`` is the exception that it raised, or None; after INT3 and INTO, which are traps, RIP is behind
    the instruction.  ``address`` is the linear address of a #PF.  The processor's error code does not
    come out of a traced child.
    """

    registers: Registers
    floating: FloatingPoint | None
    memory: Changes
    vector: int | None = None
    address: int | None = None


class HostCpu:
    """The host's processor at CPL 3, for 64-bit code or (``bits`` 32) compatibility mode.

    A context manager over a traced child, used by the thread that opened it.  A child that dies is replaced.
    Raises HostError where the kernel forbids ptrace or seccomp.
    """

    def __init__(self, bits: int = 64) -> None:
        if bits not in _CS:
            raise UsageError(f"The host's processor runs 64- and 32-bit code here, not {bits}-bit code.")
        self.bits = bits
        self._arena = Arena()
        try:
            self._child = TracedChild(self._arena)
        except BaseException:
            self._arena.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child and free the arena; twice does nothing."""
        self._child.close()
        self._arena.close()

    @property
    def pid(self) -> int:
        """Process id of the current child."""
        return self._child.pid

    def execute(self, case: HostCase) -> HostOutcome:
        """Execute the case's instruction once (with REP: all iterations) and tell what became of the state.

        Raises UsageError for instructions that are refused and values that no case may have, HostError when
        the child died twice.
        """
        self._check(case)
        if self._arena.fd < 0:
            raise ClosedError("This HostCpu was closed; open a new one.")
        try:
            return self._attempt(case)
        except ChildDiedError:
            self._child.close()
            self._child = TracedChild(self._arena)
        try:
            return self._attempt(case)
        except ChildDiedError as died:
            raise HostError(f"The traced child {died} at the bytes {case.code.hex(' ')}.") from None

    def _check(self, case: HostCase) -> None:
        why = refusal(case.code + bytes([STOP]) * 15, self.bits)
        if why is not None:
            raise UsageError(f"The host's processor must not execute {case.code.hex(' ')}: {why}.")
        if not CODE <= case.registers.rip < CODE + PAGE or not case.code:
            raise UsageError(f"A case's code is in the page at {CODE:#x}, not at {case.registers.rip:#x}.")

    def _attempt(self, case: HostCase) -> HostOutcome:
        child, arena = self._child, self._arena
        arena.set_code(case.registers.rip, case.code, STOP)
        arena.set_data(case.memory)
        self._set_registers(case)
        if case.floating is not None:
            _to_fxsave(case.floating, child.floating)
            child.write_floating()
        run_on = is_repeated_string(case.code, self.bits) or _reads_trap_flag(case.code, self.bits)
        stopped = child.resume() if run_on else child.step()
        code, address = child.signal_information()
        child.read_registers()
        vector, fault_address = self._ending(case, stopped, code, address, run_on)
        floating = None
        if case.floating is not None:
            child.read_floating()
            floating = _from_fxsave(child.floating)
            if vector == Vector.MF and not floating.fsw & _ERROR_SUMMARY:
                vector = Vector.XM
        outcome = HostOutcome(self._registers(), floating, arena.changes(), vector, fault_address)
        if child.registers.eflags & _STICKY_FLAGS:
            self._clear_flags()
        return outcome

    def _clear_flags(self) -> None:
        """Let the child execute POPF, so that the next case starts without them."""
        self._arena.set_code(CODE, b"\x9d", STOP)
        self._arena.set_data({DATA: _OWN_FLAGS.to_bytes(8, "little")})
        self._set_registers(HostCase(b"\x9d", Registers(rip=CODE, rsp=DATA)))
        self._child.step()

    def _set_registers(self, case: HostCase) -> None:
        values, target = case.registers, self._child.registers
        for name in GENERAL:
            setattr(target, name, getattr(values, name))
        target.rip = values.rip
        target.eflags = values.rflags & FLAGS | _OWN_FLAGS
        target.orig_rax = _NO_SYSTEM_CALL
        target.cs, target.ss = _CS[self.bits], _DATA_SELECTOR
        selector = 0 if self.bits == 64 else _DATA_SELECTOR
        target.ds = target.es = target.fs = target.gs = selector
        target.fs_base, target.gs_base = case.fs_base, case.gs_base
        self._child.write_registers()

    def _registers(self) -> Registers:
        source = self._child.registers
        values = Registers(*(getattr(source, name) for name in GENERAL))
        values.rip = source.rip
        values.rflags = source.eflags & FLAGS | _OWN_FLAGS
        return values

    def _ending(
        self, case: HostCase, stopped: int, code: int, address: int, run_on: bool
    ) -> tuple[int | None, int | None]:
        """Exception vector and fault address, from the signal that Linux made of them."""
        registers = self._child.registers
        body = split(case.code, self.bits)[1]
        if stopped == signal.SIGTRAP:
            if code == _SI_KERNEL:
                return Vector.BP, None
            return (None if code == _TRAP_TRACE else Vector.DB), None
        if stopped == signal.SIGSEGV and code in {_SEGV_MAPERR, _SEGV_ACCERR}:
            if run_on and registers.rip == address:
                return None, None  # the instruction ended with its page: there is no STOP behind it
            return Vector.PF, address
        if stopped == signal.SIGSEGV:
            if body[:1] == b"\xce":
                return Vector.OF, None
            if registers.rip != case.registers.rip:
                # At the STOP that follows: it was run to, or MOV SS and POP SS put off the step's trap.
                return None, None
            return (Vector.BR if body[:1] == b"\x62" else Vector.GP), None
        if stopped == signal.SIGBUS:
            return (Vector.AC if code == 1 else Vector.SS), None
        if stopped == signal.SIGFPE:
            return (Vector.DE if code == _FPE_INTDIV and not _is_floating(body) else Vector.MF), None
        if stopped == signal.SIGILL:
            return Vector.UD, None
        raise ChildDiedError(f"stopped with {signal.Signals(stopped).name}")


def _reads_trap_flag(code: bytes, bits: int) -> bool:
    """PUSHF would show the TF of the single step."""
    return split(code, bits)[1][:1] == b"\x9c"


def _is_floating(body: bytes) -> bool:
    """x87, SSE and AVX: their divide-by-zero is not #DE."""
    return body[:1] in {b"\x9b", b"\x0f", b"\xc4", b"\xc5", b"\x62"} or 0xD8 <= body[0] <= 0xDF


def _to_fxsave(values: FloatingPoint, image: Any) -> None:
    """Fill python-ptrace's FXSAVE image (SDM vol. 1, table 10-2)."""
    image.cwd, image.swd, image.ftw = values.fcw, values.fsw, values.ftwx
    image.fop, image.rip, image.rdp = values.last_opcode, values.last_ip, values.last_dp
    image.mxcsr = values.mxcsr
    memoryview(image.st_space).cast("B")[:] = b"".join(values.fpr)
    memoryview(image.xmm_space).cast("B")[:] = b"".join(values.xmm)


def _from_fxsave(image: Any) -> FloatingPoint:
    return FloatingPoint(
        fpr=_parts(bytes(image.st_space)),
        fcw=image.cwd,
        fsw=image.swd,
        ftwx=image.ftw,
        last_opcode=image.fop,
        last_ip=image.rip,
        last_dp=image.rdp,
        xmm=_parts(bytes(image.xmm_space)),
        mxcsr=image.mxcsr,
    )


def _parts(data: bytes) -> tuple[bytes, ...]:
    return tuple(data[at : at + 16] for at in range(0, len(data), 16))
