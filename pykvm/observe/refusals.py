"""Instructions that never run in the traced child, because they would leave it: system calls and their kin.

The child has a seccomp filter that ends it at any system call, so this is the first of two fences.
"""

from __future__ import annotations

from typing import Final

_LEGACY: Final = frozenset({0xF0, 0xF2, 0xF3, 0x66, 0x67, 0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65})
_STRINGS: Final = frozenset({0x6C, 0x6D, 0x6E, 0x6F, 0xA4, 0xA5, 0xA6, 0xA7, *range(0xAA, 0xB0)})

_GROUP7_ALLOWED: Final = frozenset({0xCA, 0xCB, 0xD0, 0xF8, 0xF9, *range(0xE0, 0xE8), *range(0xF0, 0xF8)})
"""0F 01 with a register operand: CLAC, STAC, XGETBV, SWAPGS, RDTSCP, SMSW, LMSW.  The others are calls to
hypervisors and enclaves, waits, and changes of state that outlive the instruction (WRPKRU, CLZERO)."""


def split(code: bytes, bits: int) -> tuple[bytes, bytes]:
    """The prefixes, REX included, and what follows them."""
    at = 0
    while at < len(code) and (code[at] in _LEGACY or (bits == 64 and code[at] & 0xF0 == 0x40)):
        at += 1
    return code[:at], code[at:]


def is_repeated_string(code: bytes, bits: int) -> bool:
    """Whether this is a string instruction with REP or REPNE."""
    prefixes, body = split(code, bits)
    return bool(body) and body[0] in _STRINGS and (0xF2 in prefixes or 0xF3 in prefixes)


def refusal(code: bytes, bits: int) -> str | None:
    """Why the host's processor must not execute these bytes, or None where it may."""
    prefixes, body = split(code, bits)
    if body[:1] == b"\xcd":
        return "INT n may be a system call"
    if body[:2] in {b"\x0f\x05", b"\x0f\x34"}:
        return "SYSCALL and SYSENTER enter the host's kernel"
    if len(body) < 3 or body[0] != 0x0F:
        return None
    register, extension = body[2] >> 6 == 3, body[2] >> 3 & 7
    if body[1] == 0x01 and register and body[2] not in _GROUP7_ALLOWED:
        return "it may leave the process or change state that outlives it"
    if body[1] == 0xAE and register and extension == 6 and prefixes.strip(b"\x40\x48"):
        return "UMONITOR, UMWAIT and TPAUSE wait"
    if body[1] == 0xAE and not register and extension == 5:
        return "XRSTOR changes state that outlives it"
    if body[1] == 0xC7 and register and extension == 6 and 0xF3 in prefixes:
        return "SENDUIPI reaches other processes"
    return None
