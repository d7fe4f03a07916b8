"""Level L0: every page whose contents changed is reported, judged from traces alone.

A page counts when the guest changed it while it was shown by one writable slot only and that slot logged:
of several slots that show a page, KVM marks the one that was written through (hosts.md D.1).  What the host
itself gives up by a step (logging off, a slot deleted or moved, bits cleared unseen) is not lost by KVM.
"""

from __future__ import annotations

from typing import NamedTuple

from pykvm.crosscheck import steps as plan
from pykvm.crosscheck.steps import SlotPlan
from pykvm.crosscheck.trace import Page, StepTrace, Trace
from pykvm.machine import SlotFlags
from pykvm.memory import PAGE_SIZE

_GUEST_STEPS = (plan.Run, plan.SingleStep)


class Loss(NamedTuple):
    """A page (``gfn`` of ``slot``) that the guest changed in step ``changed`` and step ``missed`` did not
    report; both are positions in the trace."""

    slot: int
    gfn: int
    changed: int
    missed: int


def first_loss(trace: Trace, witness: Trace) -> Loss | None:
    """The first page that changed in ``witness`` and was not reported in ``trace``, or None.

    With the same trace as its own witness this needs nobody else's opinion.
    """
    pending: dict[tuple[int, int], int] = {}
    """(slot, page of the slot): the step that changed it."""
    slots = trace.start
    for number, (step, seen) in enumerate(zip(trace.steps, witness.steps, strict=False)):
        if step.impossible or seen.impossible:
            return None
        if isinstance(step.step, _GUEST_STEPS):
            for page in seen.changed:
                place = _logged_place(page, slots)
                if place is not None:
                    pending.setdefault(place, number)
        elif not step.refused:
            loss = _missed(trace, step, slots, pending, number)
            if loss is not None:
                return loss
            _settle(trace, step, pending)
        slots = step.slots
    return None


def lost_pages(trace: Trace) -> dict[int, tuple[tuple[int, int], ...]]:
    """By number of the step that collects: the pages, (slot, gfn) each, that were written and are in no log.

    Of a trace with counters, so that the entries of a ring count even where a harvest is refused because the
    ring overflowed.  What the host gives up by a step is not told apart from what KVM loses.
    """
    found: dict[int, tuple[tuple[int, int], ...]] = {}
    pending: set[tuple[int, int]] = set()
    slots = trace.start
    for step in trace.steps:
        if isinstance(step.step, (*_GUEST_STEPS, plan.Access)):
            pending |= {place for page in step.changed if (place := _logged_place(page, slots)) is not None}
        bases = {slot.slot: slot.gpa // PAGE_SIZE for slot in slots}
        pending -= {(slot, offset) for _, slot, offset in step.pushed}
        pending -= {(slot, gfn - bases[slot]) for slot, gfn in step.dirty or ()}
        if isinstance(step.step, plan.Collect | plan.Harvest):
            asked = {step.step.slot} if isinstance(step.step, plan.Collect) else set(bases)
            lost = {place for place in pending if place[0] in asked}
            found[step.number] = tuple(sorted((slot, bases[slot] + page) for slot, page in lost))
            pending -= lost
        slots = step.slots
    return found


def _logged_place(page: Page, slots: tuple[SlotPlan, ...]) -> tuple[int, int] | None:
    """The (slot, page of the slot) that must report a change of ``page``, or None."""
    memory, number = page
    at = number * PAGE_SIZE
    writable = [
        slot
        for slot in slots
        if slot.memory == memory
        and slot.offset <= at < slot.offset + slot.size
        and not slot.flags & SlotFlags.READONLY
    ]
    if len(writable) != 1 or not writable[0].flags & SlotFlags.LOG_DIRTY_PAGES:
        return None
    return writable[0].slot, (at - writable[0].offset) // PAGE_SIZE


def _missed(
    trace: Trace,
    step: StepTrace,
    slots: tuple[SlotPlan, ...],
    pending: dict[tuple[int, int], int],
    number: int,
) -> Loss | None:
    if step.dirty is None:
        return None
    bases = {slot.slot: slot.gpa // PAGE_SIZE for slot in slots}
    asked = step.step.slot if isinstance(step.step, plan.Collect) else None
    for (slot, page), changed in pending.items():
        if asked in {None, slot} and (slot, bases[slot] + page) not in step.dirty:
            return Loss(slot, bases[slot] + page, changed, number)
    return None


def _settle(trace: Trace, step: StepTrace, pending: dict[tuple[int, int], int]) -> None:
    """Drop what the step reported for good, or gave up."""
    match step.step:
        case plan.Collect(slot=slot):
            if not trace.scenario.tracker.startswith("manual"):
                _drop_slot(pending, slot)
        case plan.Clear(slot=slot, first_page=first, pages=pages, marks=marks):
            for page in range(first, first + pages):
                bit = page - first
                if marks is None or (bit // 8 < len(marks) and marks[bit // 8] >> bit % 8 & 1):
                    pending.pop((slot, page), None)
        case plan.DeleteSlot(slot=slot) | plan.MoveSlot(slot=slot):
            _drop_slot(pending, slot)
        case plan.Logging(slot=slot, on=False):
            _drop_slot(pending, slot)
        case plan.ReflagSlot(slot=slot, flags=flags) if not flags & SlotFlags.LOG_DIRTY_PAGES:
            _drop_slot(pending, slot)
        case plan.Harvest() | plan.SaveLoad(fresh=True):
            pending.clear()
        case _:
            pass


def _drop_slot(pending: dict[tuple[int, int], int], slot: int) -> None:
    for place in [place for place in pending if place[0] == slot]:
        del pending[place]
