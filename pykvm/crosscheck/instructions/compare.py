"""Do two processors agree about a case?"""

from __future__ import annotations

from dataclasses import fields
from typing import Final, Protocol

from pykvm.crosscheck.instructions.case import InstructionCase, Outcome
from pykvm.observe.host_cpu import FLAGS
from pykvm.x86.bits import Rflags
from pykvm.x86.exceptions import Vector
from pykvm.x86.fpu import FloatingPoint
from pykvm.x86.registers import GENERAL, Registers

_ALL_FLAGS: Final = 0xFFFFFFFF & ~int(Rflags.RF | Rflags.TF)
_ENVIRONMENT: Final = frozenset({"last_opcode", "last_ip", "last_dp"})
"""AMD processors save the last x87 instruction only with a pending exception (APM vol. 2, 11.4.4.1)."""


class Oracle(Protocol):
    """What is known about instructions; the model's ``InstructionOracle`` is one."""

    def undefined_flags(self, bits: int, code: bytes, registers: Registers) -> int:
        """RFLAGS bits that the SDM leaves undefined after it."""

    def text(self, bits: int, code: bytes) -> str:
        """The instruction in assembler."""


def difference(one: Outcome, other: Outcome, *, undefined: int = 0, host: bool = False) -> str | None:
    """The first difference in words, or None.

    ``undefined`` flags do not count.  With ``host`` one of the two is the traced child's, which knows the
    FLAGS of user code only.  What one of them cannot tell (None) does not count either.
    """
    if one.failure or other.failure:
        return None if one.failure == other.failure else f"{ending(one)} against {ending(other)}"
    if one.vector != other.vector or _differ(one.error, other.error) or _differ(one.address, other.address):
        return f"{ending(one)} against {ending(other)}"
    for name in (*GENERAL, "rip"):
        left, right = getattr(one.registers, name), getattr(other.registers, name)
        if left != right:
            return f"{name} {left:#x} against {right:#x}"
    mask = (FLAGS if host else _ALL_FLAGS) & ~undefined
    left, right = one.registers.rflags & mask, other.registers.rflags & mask
    if left != right:
        return f"rflags {_flags(left, right)} against {_flags(right, left)}"
    if one.memory != other.memory:
        return f"memory {_memory(one)} against {_memory(other)}"
    return _floating(one.floating, other.floating)


def _differ(one: int | None, other: int | None) -> bool:
    return one is not None and other is not None and one != other


def ending(outcome: Outcome) -> str:
    """How the case ended, in a few words."""
    """How the case ended, in words."""
    if outcome.failure:
        return outcome.failure
    if outcome.vector is None:
        return f"completed at {outcome.registers.rip:#x}"
    known = outcome.vector in set(Vector)
    name = f"#{Vector(outcome.vector).name}" if known else f"interrupt {outcome.vector}"
    error = f"({outcome.error:#x})" if outcome.error is not None else ""
    address = f" at {outcome.address:#x}" if outcome.address is not None else ""
    return name + error + address


def _flags(value: int, other: int) -> str:
    """The flags that differ: by name, with a minus where they are clear."""
    different = value ^ other
    names = [f"{'' if value & flag else '-'}{flag.name}" for flag in Rflags if different & flag]
    return " ".join(names) or hex(value)


def _memory(outcome: Outcome) -> str:
    if not outcome.memory:
        return "unchanged"
    return ", ".join(f"[{address:#x}]={data.hex()}" for address, data in outcome.memory[:4])


def _floating(one: FloatingPoint | None, other: FloatingPoint | None) -> str | None:
    if one is None or other is None or one == other:
        return None
    for each in fields(FloatingPoint):
        left, right = getattr(one, each.name), getattr(other, each.name)
        if left == right or each.name in _ENVIRONMENT:
            continue
        if isinstance(left, tuple):
            for number, (a, b) in enumerate(zip(left, right, strict=True)):
                if a != b:
                    return f"{each.name}[{number}] {a[::-1].hex()} against {b[::-1].hex()}"
        return f"{each.name} {left:#x} against {right:#x}"
    return None


def describe(case: InstructionCase, oracle: Oracle) -> str:
    """The case in one line."""
    return f"{oracle.text(case.mode, case.code)} ({case.code.hex(' ')}), {case.mode}-bit, CPL {case.cpl}"
