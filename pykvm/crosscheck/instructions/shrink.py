"""From a case that shows something to the smallest one that still does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from typing import Any

from pykvm.crosscheck.instructions.case import InstructionCase
from pykvm.observe.refusals import split
from pykvm.x86.fpu import FloatingPoint
from pykvm.x86.registers import GENERAL

_ZERO = bytes(16)


def shrink(case: InstructionCase, shows: Callable[[InstructionCase], bool]) -> InstructionCase:
    """Drop prefixes, clear registers, flags and memory, as long as ``shows`` holds."""
    smaller = True
    while smaller:
        smaller = False
        for candidate in _candidates(case):
            if shows(candidate):
                case, smaller = candidate, True
                break
    return case


def _candidates(case: InstructionCase) -> Iterator[InstructionCase]:
    """Cases that are simpler in one respect, the most telling respects first."""
    prefixes, body = split(case.code, case.mode)
    for at in range(len(prefixes)):
        yield replace(case, code=prefixes[:at] + prefixes[at + 1 :] + body)
    if case.floating is not None:
        # Never without: the state that the case before left would take part.
        if case.floating != FloatingPoint():
            yield replace(case, floating=FloatingPoint())
        yield from _floating(case, case.floating)
    for address in case.memory:
        yield replace(case, memory={at: data for at, data in case.memory.items() if at != address})
    for name in GENERAL:
        value = getattr(case.registers, name)
        for simpler in (0, 1, value & 0xFFFF, value & 0xFFFFFFFF):
            if simpler < value:
                yield replace(case, registers=replace(case.registers, **{name: simpler}))
    flags = case.registers.rflags
    for bit in range(22):
        if flags >> bit & 1 and bit not in {1, 9}:
            yield replace(case, registers=replace(case.registers, rflags=flags & ~(1 << bit)))
    if case.fs_base:
        yield replace(case, fs_base=0)
    if case.gs_base:
        yield replace(case, gs_base=0)
    for address, data in case.memory.items():
        for shorter in (data[: len(data) // 2], data[len(data) // 2 :]):
            at = address if shorter == data[: len(shorter)] else address + len(data) - len(shorter)
            if shorter and len(shorter) < len(data):
                rest = {key: each for key, each in case.memory.items() if key != address}
                yield replace(case, memory=rest | {at: shorter})
        if any(data) and len(data) <= 16:
            yield replace(case, memory=dict(case.memory) | {address: bytes(len(data))})


def _floating(case: InstructionCase, value: FloatingPoint) -> Iterator[InstructionCase]:
    default = FloatingPoint()
    for name in ("fpr", "xmm"):
        registers = getattr(value, name)
        for number, register in enumerate(registers):
            if register != _ZERO:
                fewer = (*registers[:number], _ZERO, *registers[number + 1 :])
                yield _with(case, value, name, fewer)
    for name in ("fsw", "ftwx", "mxcsr", "fcw"):
        if getattr(value, name) != getattr(default, name):
            yield _with(case, value, name, getattr(default, name))


def _with(case: InstructionCase, value: FloatingPoint, name: str, part: Any) -> InstructionCase:
    changed = copy(value)
    setattr(changed, name, part)
    return replace(case, floating=changed)
