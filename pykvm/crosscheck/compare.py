"""Do two machines agree about a scenario?  The first difference, in words.

Levels: L0 safe (every page that changed is reported), L1 set (the reported sets are equal), L2 order (ring
entries are equal, in order and with repeats), L3 counters (KVM's deterministic counters are equal after each
step), L4 state (exits, registers, memory and refusals are identical).

L0, L1 and L4 hold the architecture against a KVM.  L2 and L3 hold a model of KVM's own MMU, of a profile,
against that KVM: each includes the levels before it, without excuses, and L3 also what L4 compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import zip_longest
from operator import attrgetter
from typing import Final

from pykvm.crosscheck.counters import differing, rule_of
from pykvm.crosscheck.emulated_steps import tcg_bug
from pykvm.crosscheck.loss import first_loss
from pykvm.crosscheck.rules import comparable, excusing, may_stand, same_exit
from pykvm.crosscheck.steps import describe
from pykvm.crosscheck.trace import StepTrace, Trace, VcpuView
from pykvm.errors import RingOverflowError, UsageError
from pykvm.machine import Exit, InternalError
from pykvm.machine.emulation import QEMU_TCG, emulator
from pykvm.memory import PAGE_SIZE
from pykvm.x86.bits import Rflags
from pykvm.x86.registers import GENERAL, SEGMENTS

_EMULATION: Final = 1
"""The suberror of KVM_EXIT_INTERNAL_ERROR for an instruction that KVM's emulator lacks."""


_NEVER_COMPARED: Final = int(Rflags.RF | Rflags.IF | Rflags.IOPL3)
_MOST_ENTRIES: Final = 12
"""Ring entries that a difference shows."""


class Level(Enum):
    """What agreeing means."""

    L0 = "L0"
    L1 = "L1"
    L2 = "L2"
    L3 = "L3"
    L4 = "L4"


@dataclass(frozen=True, slots=True)
class Agreement:
    """The traces agree about ``steps`` steps; ``note`` says why not about more, if there are more."""

    steps: int
    note: str = ""

    def __str__(self) -> str:
        text = f"Both machines agree about {self.steps} steps"
        return f"{text}; {self.note}." if self.note else f"{text}."


@dataclass(frozen=True, slots=True)
class Difference:
    """The first difference: at ``step`` the machines named in ``machines`` showed ``values`` of ``what``."""

    level: Level
    step: int
    action: str
    what: str
    machines: tuple[str, str]
    values: tuple[str, str]
    rule: str
    file: str = "FILE"

    @property
    def command(self) -> str:
        """The command that shows it again."""
        return f"pykvm replay {self.file}"

    def __str__(self) -> str:
        return (
            f"{self.level.value}, step {self.step} ({self.action}): {self.what}: "
            f"{self.machines[0]} has {self.values[0]}, {self.machines[1]} has {self.values[1]}. "
            f"Rule: {self.rule}. Replay: {self.command}"
        )


Result = Agreement | Difference


def compare(first: Trace, second: Trace, level: Level) -> Result:
    """Whether two traces of one scenario agree at ``level``, or the first difference.

    Raises UsageError for traces of different scenarios, and for L2 and L3 of traces without counters.
    """
    if first.scenario != second.scenario:
        raise UsageError("The traces are of different scenarios; run one scenario on both machines.")
    if level in {Level.L2, Level.L3} and not (first.counters and second.counters):
        raise UsageError(f"Level {level.value} needs traces with counters: run with Watch(counters=True).")
    common, note = _comparable_steps(first, second)
    compared = {
        Level.L0: _compare_losses,
        Level.L1: _compare_sets,
        Level.L2: _compare_orders,
        Level.L3: _compare_counters,
        Level.L4: _compare_states,
    }[level]
    for difference in compared(first, second, common):
        return difference
    return Agreement(common, note)


def _difference(
    level: Level, traces: tuple[Trace, Trace], number: int, what: str, values: tuple[str, str], rule: str
) -> Difference:
    first, second = traces
    step = first.steps[number]
    return Difference(
        level, step.number, describe(step.step), what, (first.backend, second.backend), values, rule
    )


def _comparable_steps(first: Trace, second: Trace) -> tuple[int, str]:
    """How many steps can be compared, and what ends it, if anything does."""
    for number, pair in enumerate(zip(first.steps, second.steps, strict=False)):
        for trace, step in zip((first, second), pair, strict=True):
            if step.impossible:
                return number, f"step {number} is not possible on {trace.backend}: {step.impossible}"
            for reason in step.exits:
                if isinstance(reason, InternalError) and reason.suberror == _EMULATION:
                    return number, f"in step {number} {trace.backend} gave up: {reason}"
        if pair[0].overdue and pair[1].overdue:
            return number, f"step {number} was out of time on both machines"
        if pair[0].refused == pair[1].refused == RingOverflowError.__name__:
            # KVM looks at the ring between batches of emulated instructions; a host interrupt ends a batch.
            return number, f"in step {number} the ring overflowed on both machines, when is up to interrupts"
        if (first.copies_roots or second.copies_roots) and _copied_root(first, second, number):
            return number, f"in step {number} one vCPU's copy of a root was in step, on one machine only"
        if emulator() == QEMU_TCG and (bug := _emulator_bug((first.backend, second.backend), pair)):
            return number, f"in step {number} {bug}"
    return min(len(first.steps), len(second.steps)), ""


def _copied_root(first: Trace, second: Trace, number: int) -> bool:
    """Whether the machines differ in one spurious fault, with several vCPUs on a host that copies roots.

    When such a host brings a copy in step with what other vCPUs did is known in part only.
    """
    one, other = first.steps[number], second.steps[number]
    if len(one.vcpus) < 2:
        return False
    names = differing(one.counters, other.counters)
    apart = {name.partition(".")[2]: one.counters[name] - other.counters[name] for name in names}
    return (
        len({name.partition(".")[0] for name in names}) == 1
        and apart.keys() == {"pf_taken", "pf_spurious"}
        and abs(apart["pf_taken"]) == 1
        and apart["pf_taken"] == apart["pf_spurious"]
    )


def _emulator_bug(backends: tuple[str, str], steps: tuple[StepTrace, StepTrace]) -> str:
    """What TCG did wrong in a step of KVM's guest, if one of the two machines is the model."""
    if backends.count("model") != 1:
        return ""
    model, kvm = steps if backends[0] == "model" else steps[::-1]
    return tcg_bug(model, kvm)


# --- L0 ------------------------------------------------------------------------------------------


def _compare_losses(first: Trace, second: Trace, common: int) -> Iterator[Difference]:
    for trace, witness in ((first, first), (second, second), (first, second), (second, first)):
        loss = first_loss(trace, witness)
        if loss is None or loss.missed >= common:
            continue
        changed = describe(witness.steps[loss.changed].step)
        step = trace.steps[loss.missed]
        yield Difference(
            Level.L0,
            step.number,
            describe(step.step),
            f"gfn {loss.gfn:#x} of slot {loss.slot}",
            (witness.backend, f"the log of {trace.backend}"),
            (f"a change of its contents in step {loss.changed} ({changed})", "no mark for it"),
            "api.rst 4.8: a page written since the last call is in the log",
        )


# --- L1 ------------------------------------------------------------------------------------------


def _compare_sets(first: Trace, second: Trace, common: int) -> Iterator[Difference]:
    slots = first.start
    for number, (one, other) in enumerate(zip(first.steps[:common], second.steps[:common], strict=True)):
        yield from _compare_refusals(Level.L1, first, second, number)
        if one.dirty is not None and other.dirty is not None:
            bases = {slot.slot: slot.gpa // PAGE_SIZE for slot in slots}
            for here, more, less in ((0, one.dirty, other.dirty), (1, other.dirty, one.dirty)):
                reporter = (first, second)[here]
                for slot, gfn in more - less:
                    page = gfn - bases[slot]
                    excuse = excusing(first.scenario.surplus, slot, page, number)
                    if reporter.marks_reads or (excuse is not None and reporter.backend != "model"):
                        continue
                    values = ("reported", "not reported")
                    yield _difference(
                        Level.L1,
                        (first, second),
                        number,
                        f"gfn {gfn:#x} of slot {slot}",
                        (values[here], values[1 - here]),
                        "hosts.md B.0 and E: what marks a page; no rule of the scenario excuses this one",
                    )
        slots = one.slots


# --- L2 and L3 -----------------------------------------------------------------------------------


def _compare_orders(first: Trace, second: Trace, common: int) -> Iterator[Difference]:
    for number in range(common):
        yield from _compare_refusals(Level.L2, first, second, number)
        yield from _compare_marks(first, second, number)


def _compare_counters(first: Trace, second: Trace, common: int) -> Iterator[Difference]:
    before = first.counters, second.counters
    for name in differing(*before):
        values = str(before[0][name]), str(before[1][name])
        step = "before the first step"
        machines = first.backend, second.backend
        yield Difference(Level.L3, 0, step, _counter_name(name), machines, values, rule_of(name))
    last: dict[int, Exit] = {}
    for number in range(common):
        yield from _compare_refusals(Level.L3, first, second, number)
        one, other = first.steps[number], second.steps[number]
        if one.exits:
            last[getattr(one.step, "vcpu", 0)] = one.exits[-1]
        for what, values, rule in _state_differences(one, other, last):
            yield _difference(Level.L4, (first, second), number, what, values, rule)
        yield from _compare_marks(first, second, number)
        for name in differing(one.counters, other.counters):
            words = [
                f"{step.counters[name]} ({step.counters[name] - old[name]:+d} in this step)"
                for step, old in zip((one, other), before, strict=True)
            ]
            what, values = _counter_name(name), (words[0], words[1])
            yield _difference(Level.L3, (first, second), number, what, values, rule_of(name))
        before = one.counters, other.counters
    if common and common == len(first.steps) == len(second.steps) and first.final != second.final:
        for what, values in _final_differences(first, second):
            rule = "SDM vol. 2; the step that wrote it shows with pykvm replay --steps"
            yield _difference(Level.L4, (first, second), common - 1, what, values, rule)


def _counter_name(name: str) -> str:
    source, _, counter = name.partition(".")
    return f"{counter} of {'the machine' if source == 'machine' else source.replace('vcpu', 'vCPU ')}"


def _compare_marks(first: Trace, second: Trace, number: int) -> Iterator[Difference]:
    """What the logs say, exactly: there are no excuses for a model of KVM's own MMU."""
    traces, one, other = (first, second), first.steps[number], second.steps[number]
    for what, both in (("pushed", (one.pushed, other.pushed)), ("harvested", (one.ring, other.ring))):
        # Each vCPU's are in order; in which order the rings are emptied is the harvester's affair.
        entries = tuple(sorted(both[0], key=_of_vcpu)), tuple(sorted(both[1], key=_of_vcpu))
        if entries[0] != entries[1]:
            values = _entries_apart(*entries)
            yield _difference(
                Level.L2, traces, number, f"ring entries {what}", values, "kvm-mmu.md 5.2 and hosts.md B.0"
            )
    if one.dirty is None or other.dirty is None:
        return
    for here, more, less in ((0, one.dirty, other.dirty), (1, other.dirty, one.dirty)):
        for slot, gfn in more - less:
            words = ("reported", "not reported")
            values = words[here], words[1 - here]
            what = f"gfn {gfn:#x} of slot {slot}"
            yield _difference(Level.L1, traces, number, what, values, "kvm-mmu.md 5: what marks a page")


def _of_vcpu(entry: tuple[int, int, int]) -> int:
    return entry[0]


def _entries_apart(
    one: tuple[tuple[int, int, int], ...], other: tuple[tuple[int, int, int], ...]
) -> tuple[str, str]:
    """Both lists in words, from where they differ on."""
    at = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    texts = []
    for entries in (one, other):
        shown = " ".join(f"{slot}:{offset:#x}" for _, slot, offset in entries[at : at + _MOST_ENTRIES])
        more = len(entries) - at - _MOST_ENTRIES
        texts.append(
            f"{len(entries)}, from number {at} on [{shown}{f' and {more} more' if more > 0 else ''}]"
        )
    return texts[0], texts[1]


def _final_differences(first: Trace, second: Trace) -> Iterator[tuple[str, tuple[str, str]]]:
    for memory, (one, other) in enumerate(zip(first.final, second.final, strict=True)):
        if one == other:
            continue
        for at in range(0, len(one), PAGE_SIZE):
            pages = one[at : at + PAGE_SIZE], other[at : at + PAGE_SIZE]
            if pages[0] != pages[1]:
                yield _memory_difference((memory, at // PAGE_SIZE), *pages)


# --- L4 ------------------------------------------------------------------------------------------


def _compare_states(first: Trace, second: Trace, common: int) -> Iterator[Difference]:
    last: dict[int, Exit] = {}
    """Of each vCPU, its last exit."""
    for number in range(common):
        yield from _compare_refusals(Level.L4, first, second, number)
        one, other = first.steps[number], second.steps[number]
        if one.exits:
            last[getattr(one.step, "vcpu", 0)] = one.exits[-1]
        for what, values, rule in _state_differences(one, other, last):
            yield _difference(Level.L4, (first, second), number, what, values, rule)


def _compare_refusals(level: Level, first: Trace, second: Trace, number: int) -> Iterator[Difference]:
    one, other = first.steps[number], second.steps[number]
    if one.refused != other.refused:
        values = [f"{step.refused} ({step.message})" if step.refused else "no error" for step in (one, other)]
        rule = "api.rst: what an ioctl refuses"
        yield _difference(level, (first, second), number, "outcome", (values[0], values[1]), rule)
    if one.overdue != other.overdue:
        values = ["out of time" if step.overdue else "in time" for step in (one, other)]
        rule = "a step ends within the time limit"
        yield _difference(level, (first, second), number, "end", (values[0], values[1]), rule)


def _state_differences(
    one: StepTrace, other: StepTrace, last: Mapping[int, Exit]
) -> Iterator[tuple[str, tuple[str, str], str]]:
    for index, (a, b) in enumerate(zip_longest(one.exits, other.exits)):
        if not same_exit(a, b):
            yield f"exit {index}", (str(a or "none"), str(b or "none")), "hosts.md C.3: exits of a guest"
    if one.vcpus == other.vcpus and one.changed == other.changed and one.translated == other.translated:
        return
    for number, views in enumerate(zip(one.vcpus, other.vcpus, strict=True)):
        if _obviously_equal(*views):
            continue
        left, right = (comparable(view) for view in views)
        if may_stand(last.get(number), views[0].registers, views[1].registers):
            left["rip"] = right["rip"]
        for name in (*left, *right):
            if left.get(name) != right.get(name):
                yield f"{name} of vCPU {number}", (_hex(left.get(name)), _hex(right.get(name))), "SDM vol. 2"
    if one.translated != other.translated:
        values = tuple(
            "nothing" if each is None else f"{each:#x}" for each in (one.translated, other.translated)
        )
        yield "translation", (values[0], values[1]), "api.rst 4.15"
    for page in sorted({*one.changed, *other.changed}):
        contents = one.changed.get(page), other.changed.get(page)
        if contents[0] != contents[1]:
            what, values = _memory_difference(page, *contents)
            yield what, values, "SDM vol. 2, and vol. 3, 4.8 for accessed and dirty bits"


_GENERAL: Final = attrgetter(*GENERAL, "rip")
_SPECIAL: Final = attrgetter(*SEGMENTS, "gdt", "idt", "cr0", "cr2", "cr3", "cr4", "efer")


def _obviously_equal(one: VcpuView, other: VcpuView) -> bool:
    """Whether all that ``comparable`` looks at is equal, found out without taking it apart."""
    return (
        not (one.registers.rflags ^ other.registers.rflags) & ~_NEVER_COMPARED
        and _GENERAL(one.registers) == _GENERAL(other.registers)
        and _SPECIAL(one.special) == _SPECIAL(other.special)
        and (one.special.ss.dpl == 3 or one.registers.rflags == other.registers.rflags)
    )


def _hex(value: int | None) -> str:
    return "an unusable segment" if value is None else f"{value:#x}"


def _memory_difference(
    page: tuple[int, int], one: bytes | None, other: bytes | None
) -> tuple[str, tuple[str, str]]:
    memory, number = page
    if one is None or other is None:
        values = [f"{_first_bytes(data)}" if data else "no change" for data in (one, other)]
        return f"page {number:#x} of memory {memory}", (values[0], values[1])
    at = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b) & ~7
    return (
        f"memory {memory} at {number * PAGE_SIZE + at:#x}",
        (one[at : at + 8].hex(" "), other[at : at + 8].hex(" ")),
    )


def _first_bytes(data: bytes) -> str:
    at = next((i for i, byte in enumerate(data) if byte), 0) & ~7
    return f"a change, with {data[at : at + 8].hex(' ')} at its byte {at:#x}"
