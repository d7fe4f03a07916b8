"""The x87 and SSE registers as a plain value."""

from __future__ import annotations

from dataclasses import dataclass

_ZERO = bytes(16)


@dataclass(slots=True)
class FloatingPoint:
    """x87 and XMM state (SDM vol. 1, 8.1 and 10.2); the defaults are those after FNINIT with a reset MXCSR.

    ``fpr`` are the eight stack registers ST0 to ST7, 80 bits in 16 bytes; ``ftwx`` the abridged tag word of
    FXSAVE (SDM vol. 1, 10.5.1.1): a set bit means valid.
    """

    fpr: tuple[bytes, ...] = (_ZERO,) * 8
    fcw: int = 0x37F
    fsw: int = 0
    ftwx: int = 0
    last_opcode: int = 0
    last_ip: int = 0
    last_dp: int = 0
    xmm: tuple[bytes, ...] = (_ZERO,) * 16
    mxcsr: int = 0x1F80
