"""The stacks that a TSS names for inner privilege levels and interrupts (SDM vol. 3, 5.8.5, 6.14.4, 7.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu.descriptors import (
    System,
    error_code,
    is_null,
    is_writable_data,
    mark_accessed,
    read_segment,
    with_ext,
)
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.flags import MASK
from pykvm.x86.exceptions import Vector
from pykvm.x86.registers import Segment

if TYPE_CHECKING:
    from pykvm.model.cpu.processor import Processor

TSS16_TYPES: Final = frozenset({System.TSS16, System.TSS16_BUSY})


def _tss_field(cpu: Processor, offset: int, size: int, ext: int) -> int:
    """A field of the current TSS; #TS(TSS) where its limit is too small."""
    if offset + size - 1 > cpu.tr.limit:
        raise Fault.ts(error_code(cpu.tr.selector) | ext)
    return cpu.load_system(cpu.tr.base + offset, size)


def inner_stack(cpu: Processor, cpl: int, ext: int) -> tuple[int, int]:
    """SSn and ESPn of a 16- or 32-bit TSS, read as a whole."""
    if cpu.tr.type in TSS16_TYPES:
        pair = _tss_field(cpu, cpl * 4 + 2, 4, ext)
        return pair >> 16, pair & 0xFFFF
    pair = _tss_field(cpu, cpl * 8 + 4, 6, ext)
    return pair >> 32, pair & 0xFFFFFFFF


def inner_stack64(cpu: Processor, cpl: int, ext: int) -> int:
    """RSPn of a 64-bit TSS."""
    return _canonical(cpu, _tss_field(cpu, cpl * 8 + 4, 8, ext), ext)


def interrupt_stack(cpu: Processor, ist: int, ext: int) -> int:
    """ISTn of a 64-bit TSS, 1 to 7."""
    return _canonical(cpu, _tss_field(cpu, ist * 8 + 28, 8, ext), ext)


def _canonical(cpu: Processor, rsp: int, ext: int) -> int:
    if not cpu.is_canonical(rsp):
        raise Fault.ss(ext)
    return rsp


def inner_stack_segment(cpu: Processor, selector: int, cpl: int, ext: int) -> Segment:
    """SS from a TSS for privilege level ``cpl``, checked."""
    if is_null(selector):
        raise Fault.ts(ext)
    error = error_code(selector) | ext
    stack = read_segment(cpu, selector, with_ext(Fault.ts, ext))
    if selector & 3 != cpl or stack.dpl != cpl or not is_writable_data(stack):
        raise Fault.ts(error)
    if not stack.present:
        raise Fault.ss(error)
    return mark_accessed(cpu, stack)


@contextmanager
def stack_error(error: int) -> Iterator[None]:
    """A push that the stack segment forbids faults with this error code."""
    try:
        yield
    except Fault as fault:
        if fault.vector == Vector.SS:
            raise Fault.ss(error) from None
        raise


def push_all(cpu: Processor, values: Iterable[int], size: int, error: int | None = None) -> None:
    """Push values in this order, then an error code if there is one."""
    for value in values:
        cpu.push(value & MASK[size], size)
    if error is not None:
        cpu.push(error & MASK[size], size)
