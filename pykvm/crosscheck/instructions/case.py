"""An instruction with the state before it, and what a processor made of it: plain values, JSON in and out.

The linear addresses are those of the host's traced child (pykvm.observe.arena), so that one case runs
everywhere; 16-bit cases have a layout of their own below 1 MiB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Protocol, Self

from pykvm.errors import UsageError
from pykvm.observe.arena import CODE, DATA, DATA_END, PAGE, READ_ONLY, Changes
from pykvm.x86.fpu import FloatingPoint
from pykvm.x86.registers import Registers

KIND: Final = "instruction"
"""``kind`` in the JSON of a case."""

MODES: Final = (64, 32, 16)
"""64-bit code, 32-bit code of compatibility mode, 16-bit code of real mode."""


LONGEST: Final = 64
"""Bytes of a case's code; instructions have 15 at most, and cases may have too many."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a case's memory is: linear addresses, ends exclusive.

    Code can be executed and read, data from ``data`` on written, from ``read_only`` on only read.  In real
    mode CS, SS and the other segments start at ``code``, ``stack`` and ``data``.
    """

    code: int
    code_end: int
    data: int
    read_only: int
    end: int
    stack: int = 0


FLAT: Final = Layout(CODE, CODE + PAGE, DATA, READ_ONLY, DATA_END)
REAL: Final = Layout(0x10000, 0x20000, 0x20000, 0x40000, 0x40000, stack=0x30000)


def layout_of(mode: int) -> Layout:
    """The layout of cases of that mode."""
    return REAL if mode == 16 else FLAT


@dataclass(frozen=True, slots=True)
class InstructionCase:
    """``mode`` is 64, 32 or 16, ``cpl`` 3 or 0 (0 in real mode).

    ``registers.rip`` is where ``code`` stands: linear in 64 and 32, relative to CS in 16.  ``memory`` maps
    linear addresses to bytes; the rest is zero.  ``floating`` None: x87 and SSE take no part.
    """

    mode: int
    cpl: int
    code: bytes
    registers: Registers
    memory: Mapping[int, bytes] = field(default_factory=dict)
    floating: FloatingPoint | None = None
    fs_base: int = 0
    gs_base: int = 0

    @property
    def layout(self) -> Layout:
        return layout_of(self.mode)

    @property
    def linear(self) -> int:
        """Linear address of the instruction."""
        return self.registers.rip + (REAL.code if self.mode == 16 else 0)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; registers and memory that are zero are left out."""
        document: dict[str, Any] = {
            "kind": KIND,
            "mode": self.mode,
            "cpl": self.cpl,
            "code": self.code.hex(),
            "registers": _numbers(self.registers),
            "memory": {hex(address): data.hex() for address, data in sorted(self.memory.items())},
            "fs_base": hex(self.fs_base),
            "gs_base": hex(self.gs_base),
        }
        if self.floating is not None:
            document["floating"] = floating_to_json(self.floating)
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Raises UsageError where the document is no instruction case."""
        try:
            if document["kind"] != KIND:
                raise ValueError(f"its kind is {document['kind']!r}")
            floating = document.get("floating")
            case = cls(
                mode=int(document["mode"]),
                cpl=int(document["cpl"]),
                code=bytes.fromhex(document["code"]),
                registers=Registers(**{n: int(v, 16) for n, v in document["registers"].items()}),
                memory={int(a, 16): bytes.fromhex(d) for a, d in document.get("memory", {}).items()},
                floating=None if floating is None else floating_from_json(floating),
                fs_base=int(document.get("fs_base", "0"), 16),
                gs_base=int(document.get("gs_base", "0"), 16),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"This is not an instruction case of pykvm crosscheck: {error}.") from error
        case.check()
        return case

    def check(self) -> None:
        """Raises UsageError for a case that no executor can run."""
        layout = self.layout if self.mode in MODES else FLAT
        if self.mode not in MODES or self.cpl not in {0, 3} or (self.mode == 16 and self.cpl):
            raise UsageError(f"There is no mode {self.mode} with CPL {self.cpl}.")
        if not self.code or not layout.code <= self.linear < layout.code_end:
            raise UsageError(f"The instruction is not in the code page at {layout.code:#x}.")
        if len(self.code) > LONGEST:
            raise UsageError(f"The instruction has {len(self.code)} bytes; give at most {LONGEST}.")
        numbers = {each.name: getattr(self.registers, each.name) for each in fields(Registers)}
        numbers |= {"fs_base": self.fs_base, "gs_base": self.gs_base}
        for name, value in numbers.items():
            if not 0 <= value < 1 << 64:
                raise UsageError(f"{name} has 64 bits, and {value:#x} does not fit.")
        if self.floating is not None:
            _check_floating(self.floating)
        for address, data in self.memory.items():
            if not layout.data <= address <= layout.end - len(data):
                raise UsageError(f"{len(data)} bytes at {address:#x} are outside the case's memory.")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The state after a case.

    ``vector`` is the exception it raised or None; ``error`` its error code and ``address`` that of a #PF,
    None where the executor cannot tell.  ``failure`` is set where the processor did not come to an end:
    ``unsupported`` (KVM's emulator lacks it), ``shutdown``, ``unfinished``; the rest then means nothing.
    """

    registers: Registers
    memory: Changes = ()
    floating: FloatingPoint | None = None
    vector: int | None = None
    error: int | None = None
    address: int | None = None
    failure: str = ""


class Executor(Protocol):
    """A processor that executes cases; a context manager is not needed, ``close`` is."""

    @property
    def name(self) -> str:
        """``model``, ``host``, ``kvm``: whose processor it is."""

    def accepts(self, case: InstructionCase) -> bool:
        """Whether it can execute the case."""

    def execute(self, case: InstructionCase) -> Outcome: ...
    def close(self) -> None: ...


def floating_to_json(value: FloatingPoint) -> dict[str, Any]:
    """Numbers in hexadecimal, registers as lists of bytes in hexadecimal; defaults are left out."""
    default = FloatingPoint()
    document: dict[str, Any] = {}
    for each in fields(FloatingPoint):
        found = getattr(value, each.name)
        if found != getattr(default, each.name):
            document[each.name] = [part.hex() for part in found] if isinstance(found, tuple) else hex(found)
    return document


def floating_from_json(document: Mapping[str, Any]) -> FloatingPoint:
    """Raises ValueError, TypeError, AttributeError."""
    parts: dict[str, Any] = {
        name: tuple(bytes.fromhex(part) for part in value) if isinstance(value, list) else int(value, 16)
        for name, value in document.items()
    }
    return FloatingPoint(**parts)


_VECTORS: Final = {"fpr": 8, "xmm": 16}
_WIDTHS: Final = {
    "fcw": 16,
    "fsw": 16,
    "ftwx": 8,
    "last_opcode": 16,
    "last_ip": 64,
    "last_dp": 64,
    "mxcsr": 16,
}


def _check_floating(floating: FloatingPoint) -> None:
    """Raises UsageError for values that do not fit their registers."""
    for name, count in _VECTORS.items():
        values = getattr(floating, name)
        if not isinstance(values, tuple) or [len(value) for value in values] != [16] * count:
            raise UsageError(f"{name} has {count} registers of 16 bytes.")
    for name, bits in _WIDTHS.items():
        value = getattr(floating, name)
        if not isinstance(value, int) or not 0 <= value < 1 << bits:  # the rest of MXCSR is reserved
            raise UsageError(f"{name} is a number of {bits} bits.")


def _numbers(registers: Registers) -> dict[str, str]:
    values = {each.name: getattr(registers, each.name) for each in fields(Registers)}
    return {name: hex(value) for name, value in values.items() if value}
