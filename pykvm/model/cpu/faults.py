"""How an instruction ends before its time: a fault, or a question to the host."""

from __future__ import annotations

from typing import Self

from pykvm.machine.exits import Exit
from pykvm.x86.exceptions import Vector


class Fault(Exception):
    """An exception of the guest (SDM vol. 3, ch. 6): the instruction is undone and the handler entered.

    ``error`` is the error code or None; ``address`` the linear address of a #PF (CR2); ``dr6`` the bits that
    a #DB adds to DR6 (SDM vol. 3, 18.2.3).
    """

    def __init__(self, vector: int, error: int | None = None, *, address: int = 0, dr6: int = 0) -> None:
        super().__init__(vector, error)
        self.vector = vector
        self.error = error
        self.address = address
        self.dr6 = dr6

    @classmethod
    def gp(cls, error: int = 0) -> Self:
        """General protection; ``error`` is a selector's error code (SDM vol. 3, 6.13) or 0."""
        return cls(Vector.GP, error)

    @classmethod
    def ss(cls, error: int = 0) -> Self:
        """Stack-segment fault."""
        return cls(Vector.SS, error)

    @classmethod
    def np(cls, error: int) -> Self:
        """Segment not present."""
        return cls(Vector.NP, error)

    @classmethod
    def ts(cls, error: int) -> Self:
        """Invalid TSS."""
        return cls(Vector.TS, error)

    @classmethod
    def ud(cls) -> Self:
        """Undefined opcode."""
        return cls(Vector.UD)

    @classmethod
    def nm(cls) -> Self:
        """Device not available."""
        return cls(Vector.NM)

    @classmethod
    def de(cls) -> Self:
        """Divide error."""
        return cls(Vector.DE)

    def __str__(self) -> str:
        name = f"#{Vector(self.vector).name}" if self.vector in set(Vector) else f"vector {self.vector}"
        text = name if self.error is None else f"{name}({self.error:#x})"
        return f"{text} at {self.address:#x}" if self.vector == Vector.PF else text


class NeedInput(Exception):
    """The instruction needs the host: it is undone, ``exit`` asks, and after the reply it starts again."""

    def __init__(self, exit: Exit) -> None:
        super().__init__(exit)
        self.exit = exit


class TripleFault(Exception):
    """The processor cannot deliver an exception: shutdown (SDM vol. 3, 6.15, interrupt 8)."""
