"""The memory image of FXSAVE and FXRSTOR (SDM vol. 1, table 10-2)."""

from __future__ import annotations

import struct
from typing import Final

from pykvm.x86.fpu import FloatingPoint

_HEAD: Final = struct.Struct("<HHBxHQQII")
_STACK, _XMM = 32, 160


def image(value: FloatingPoint) -> bytes:
    """512 bytes to restore from."""
    head = _HEAD.pack(
        value.fcw, value.fsw, value.ftwx, value.last_opcode, value.last_ip, value.last_dp, value.mxcsr, 0
    )
    return (head + b"".join(value.fpr) + b"".join(value.xmm)).ljust(512, b"\0")


def value(data: bytes, *, xmm: int) -> FloatingPoint:
    """The value of 512 saved bytes, of which the first ``xmm`` XMM registers count."""
    fcw, fsw, ftwx, opcode, ip, dp, mxcsr, _ = _HEAD.unpack_from(data)
    stack = tuple(data[_STACK + 16 * n : _STACK + 16 * n + 16] for n in range(8))
    registers = tuple(data[_XMM + 16 * n : _XMM + 16 * n + 16] for n in range(xmm))
    registers += (bytes(16),) * (16 - xmm)
    return FloatingPoint(stack, fcw, fsw, ftwx, opcode, ip, dp, registers, mxcsr)
