"""Hardware task switches (SDM vol. 3, 7.3; vol. 2, TASK-RETURN and SWITCH-TASKS)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from pykvm.model.cpu import control
from pykvm.model.cpu.descriptors import (
    CODE,
    READABLE,
    Reject,
    System,
    error_code,
    is_code,
    is_conforming,
    is_null,
    is_writable_data,
    mark_accessed,
    null_segment,
    read_segment,
    set_type,
    with_ext,
)
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.instruction import CS, DS, ES, FS, GS, SS
from pykvm.model.cpu.stacks import TSS16_TYPES, push_all, stack_error
from pykvm.x86.bits import Cr0, Rflags
from pykvm.x86.registers import Segment

if TYPE_CHECKING:
    from pykvm.model.cpu.processor import Processor

_BUSY: Final = 2
_NT, _VM, _TF = int(Rflags.NT), int(Rflags.VM), int(Rflags.TF)
_FLAGS: Final = 0x3F7FD5
"""All bits of EFLAGS that are not reserved (SDM vol. 1, figure 3-8)."""
_TASK_SWITCHED: Final = 1 << 15  # DR6.BT
_LOCAL_BREAKPOINTS: Final = 0x155  # DR7: L0-L3 and LE
_AVAILABLE: Final = frozenset({System.TSS16, System.TSS32})
_RUNNING: Final = frozenset({System.TSS16_BUSY, System.TSS32_BUSY})


class _Layout(NamedTuple):
    """A TSS: instruction pointer, flags, general registers, segments and LDT, ``size`` bytes each from
    ``first`` on; ``limit`` is the least one (SDM vol. 3, figures 7-2 and 7-10)."""

    size: int
    first: int
    segments: tuple[int, ...]
    limit: int


_TSS16: Final = _Layout(2, 0x0E, (ES, CS, SS, DS), 0x2B)
_TSS32: Final = _Layout(4, 0x20, (ES, CS, SS, DS, FS, GS), 0x67)
_CR3, _T = 0x1C, 0x64


def _layout(tss: Segment) -> _Layout:
    return _TSS16 if tss.type in TSS16_TYPES else _TSS32


# --- the four ways -------------------------------------------------------------------------------------


def switch_by_transfer(cpu: Processor, selector: int, *, call: bool) -> None:
    """JMP or CALL to a TSS, directly or by a task gate, whose privilege has been checked."""
    tss = _available_task(cpu, selector, 0)
    rflags = cpu.rflags
    if not call:
        _set_busy(cpu, cpu.tr, busy=False)
    _switch(cpu, tss, cpu.next_rip, rflags, nested=call, ext=0)


def switch_by_interrupt(
    cpu: Processor, selector: int, rip: int, rflags: int, error: int | None, ext: int
) -> None:
    """A task gate in the IDT; the error code goes to the new task's stack."""
    tss = _available_task(cpu, selector, ext)
    _switch(cpu, tss, rip, rflags, nested=True, ext=ext)
    if error is not None:
        with stack_error(ext):
            push_all(cpu, (error,), 2 if tss.type in TSS16_TYPES else 4)


def return_from_task(cpu: Processor) -> None:
    """IRET with NT set: back to the task that the link field names."""
    selector = cpu.load_system(cpu.tr.base, 2)
    tss = _read_tss(cpu, selector, Fault.ts)
    if tss.type not in _RUNNING:
        raise Fault.ts(error_code(selector))
    _check_tss(tss, 0)
    _set_busy(cpu, cpu.tr, busy=False)
    _switch(cpu, tss, cpu.next_rip, cpu.rflags & ~_NT, nested=False, ext=0)


def _available_task(cpu: Processor, selector: int, ext: int) -> Segment:
    tss = _read_tss(cpu, selector, with_ext(Fault.gp, ext))
    if tss.type not in _AVAILABLE:
        raise Fault.gp(error_code(selector) | ext)
    _check_tss(tss, ext)
    return tss


def _read_tss(cpu: Processor, selector: int, reject: Reject) -> Segment:
    """A TSS descriptor, which must lie in the GDT."""
    if selector & 4 or is_null(selector):
        raise reject(error_code(selector))
    tss = read_segment(cpu, selector, reject)
    if tss.s:
        raise reject(error_code(selector))
    return tss


def _check_tss(tss: Segment, ext: int) -> None:
    if not tss.present:
        raise Fault.np(error_code(tss.selector) | ext)
    if tss.limit < _layout(tss).limit:
        raise Fault.ts(error_code(tss.selector) | ext)


# --- the switch ----------------------------------------------------------------------------------------


def _set_busy(cpu: Processor, tss: Segment, *, busy: bool) -> Segment:
    """Change the busy bit in the GDT; returns the segment as it reads then."""
    current = read_segment(cpu, tss.selector)
    return set_type(cpu, current, current.type | _BUSY if busy else current.type & ~_BUSY)


def _switch(cpu: Processor, tss: Segment, rip: int, rflags: int, *, nested: bool, ext: int) -> None:
    """Save the old task, load the new one; from the checkpoint on, faults are the new task's."""
    _save(cpu, rip, rflags)
    if nested:
        cpu.store_system(tss.base, 2, cpu.tr.selector)
    layout = _layout(tss)
    values = _load(cpu, tss, layout)
    cr3 = cpu.load_system(tss.base + _CR3, 4) if layout is _TSS32 else 0
    trap = cpu.load_system(tss.base + _T, 2) & 1 if layout is _TSS32 else 0
    cpu.tr = _set_busy(cpu, tss, busy=True)
    if layout is _TSS32 and cpu.cr0 & Cr0.PG:
        control.set_cr3(cpu, cr3)
    cpu.cr0 |= int(Cr0.TS)
    cpu.dr7 &= ~_LOCAL_BREAKPOINTS
    selectors = _load_registers(cpu, layout, values, nested)
    cpu.checkpoint()
    cpu.rip = cpu.next_rip
    cpu.single_step = False
    if trap:
        cpu.pending_debug |= _TASK_SWITCHED
    _load_segments(cpu, selectors, values[-1] & 0xFFFF, ext)
    if cpu.next_rip > cpu.segments[CS].limit:
        raise Fault.gp(ext)


def _save(cpu: Processor, rip: int, rflags: int) -> None:
    layout = _layout(cpu.tr)
    mask = (1 << 8 * layout.size) - 1
    values = [rip, rflags, *cpu.regs[:8], *(cpu.segments[number].selector for number in layout.segments)]
    for number, value in enumerate(values):
        cpu.store_system(cpu.tr.base + layout.first + number * layout.size, layout.size, value & mask)


def _load(cpu: Processor, tss: Segment, layout: _Layout) -> list[int]:
    count = 2 + 8 + len(layout.segments) + 1
    data = cpu.load_system(tss.base + layout.first, count * layout.size)
    bits = 8 * layout.size
    return [data >> number * bits & (1 << bits) - 1 for number in range(count)]


def _load_registers(cpu: Processor, layout: _Layout, values: list[int], nested: bool) -> dict[int, int]:
    """General registers, flags and instruction pointer; the selectors are returned, FS and GS null where
    the TSS has none.  Segment registers hold their selectors, unusable yet."""
    rip, rflags = values[0], values[1]
    selectors = {number: value & 0xFFFF for number, value in zip(layout.segments, values[10:-1], strict=True)}
    selectors = {FS: 0, GS: 0} | selectors
    cpu.regs[:8] = values[2:10] if layout is _TSS32 else [0xFFFF0000 | value for value in values[2:10]]
    cpl = 3 if rflags & _VM and layout is _TSS32 else selectors[CS] & 3
    for number, selector in selectors.items():
        cpu.segments[number] = null_segment(selector, cpl)
    cpu.ldt = null_segment(values[-1] & 0xFFFF)
    cpu.rflags = rflags & _FLAGS | int(Rflags.FIXED) | (_NT if nested else 0)
    cpu.update_mode()
    cpu.next_rip = rip
    return selectors


# --- the new task's segments ---------------------------------------------------------------------------


def _load_segments(cpu: Processor, selectors: dict[int, int], ldt: int, ext: int) -> None:
    """Load and check what the TSS names (SDM vol. 3, table 7-1, steps 7 to 13).

    Those before the one that faults stay: the handler runs on the new task's stack.
    """
    _load_ldt(cpu, ldt, ext)
    if cpu.vm86:
        for number, selector in selectors.items():
            cpu.set_segment(number, Segment(base=selector << 4, selector=selector, type=3, dpl=3))
        return
    cpl = selectors[CS] & 3
    cpu.set_segment(SS, _stack(cpu, selectors[SS], cpl, ext))
    cpu.set_segment(CS, _code(cpu, selectors[CS], cpl, ext))
    for number in (DS, ES, FS, GS):
        cpu.checkpoint()
        cpu.set_segment(number, _data(cpu, selectors[number], cpl, ext))


def _load_ldt(cpu: Processor, selector: int, ext: int) -> None:
    if is_null(selector):
        return
    error = error_code(selector) | ext
    if selector & 4:
        raise Fault.ts(error)
    segment = read_segment(cpu, selector, with_ext(Fault.ts, ext))
    if segment.s or segment.type != System.LDT or not segment.present:
        raise Fault.ts(error)
    cpu.ldt = segment


def _code(cpu: Processor, selector: int, cpl: int, ext: int) -> Segment:
    error = error_code(selector) | ext
    if is_null(selector):
        raise Fault.ts(error)
    segment = read_segment(cpu, selector, with_ext(Fault.ts, ext))
    privileged = segment.dpl > cpl if is_conforming(segment) else segment.dpl != cpl
    if not is_code(segment) or privileged:
        raise Fault.ts(error)
    if not segment.present:
        raise Fault.np(error)
    return mark_accessed(cpu, segment)


def _stack(cpu: Processor, selector: int, cpl: int, ext: int) -> Segment:
    error = error_code(selector) | ext
    if is_null(selector):
        raise Fault.ts(error)
    segment = read_segment(cpu, selector, with_ext(Fault.ts, ext))
    if not is_writable_data(segment) or segment.dpl != cpl or selector & 3 != cpl:
        raise Fault.ts(error)
    if not segment.present:
        raise Fault.ss(error)
    return mark_accessed(cpu, segment)


def _data(cpu: Processor, selector: int, cpl: int, ext: int) -> Segment:
    if is_null(selector):
        return null_segment(selector)
    error = error_code(selector) | ext
    segment = read_segment(cpu, selector, with_ext(Fault.ts, ext))
    unreadable = segment.type & CODE and not segment.type & READABLE
    privileged = not is_conforming(segment) and segment.dpl < max(cpl, selector & 3)
    if not segment.s or unreadable or privileged:
        raise Fault.ts(error)
    if not segment.present:
        raise Fault.np(error)
    return mark_accessed(cpu, segment)
