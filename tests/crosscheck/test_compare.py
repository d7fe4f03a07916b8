"""Comparing traces: equal ones agree, and a trace that is broken on purpose is found out at its level."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pykvm.crosscheck import steps as plan
from pykvm.crosscheck.compare import Agreement, Difference, Level, compare
from pykvm.crosscheck.loss import first_loss
from pykvm.crosscheck.rules import IGNORED, comparable
from pykvm.crosscheck.run import COUNTERS, run
from pykvm.crosscheck.scenario import Scenario, Surplus
from pykvm.crosscheck.steps import SlotPlan
from pykvm.crosscheck.trace import StepTrace, Trace, VcpuView
from pykvm.errors import UsageError
from pykvm.machine import DirtyPages, Halted, InternalError, IoOut, MmioRead, MmioWrite, Segment, SlotFlags
from pykvm.memory import PAGE_SIZE
from pykvm.model.system import ModelSystem
from pykvm.x86.bits import Rflags
from tests.crosscheck.samples import DATA, DATA_PAGES, LOG, PAGES, guest, scenario, writer

GFN = DATA // PAGE_SIZE
STEPS = (plan.Run(), plan.Collect(1), plan.Run(), plan.Collect(0), plan.Collect(1))


def made(*steps: plan.Step, tracker: str = "bitmap", surplus: tuple[Surplus, ...] = ()) -> Scenario:
    """Stores to data pages 1, 2, 2, 3 at CPL 3, with an exit after each."""
    code = writer("long", 1, 2, 2, 3)
    return scenario("compare", guest("long", 3, code), *steps, tracker=tracker, surplus=surplus)


@pytest.fixture
def trace(model: ModelSystem) -> Trace:
    return run(made(*STEPS), model)


def broken(trace: Trace, number: int, **changes: object) -> Trace:
    """The trace of "kvm" with members of one step replaced."""
    steps = list(trace.steps)
    steps[number] = replace(steps[number], **changes)  # type: ignore[arg-type]
    return replace(trace, backend="kvm", steps=tuple(steps))


def difference(first: Trace, second: Trace, level: Level) -> Difference:
    result = compare(first, second, level)
    assert isinstance(result, Difference)
    assert result.level is level
    return result


def without(pages: DirtyPages | None, slot: int, gfn: int) -> DirtyPages:
    assert pages is not None
    assert (slot, gfn) in pages
    return pages - DirtyPages.of([(slot, gfn)])


def with_register(step: StepTrace, name: str, value: int) -> tuple[VcpuView, ...]:
    view = step.vcpus[0]
    return (replace(view, registers=replace(view.registers, **{name: value})),)


@pytest.mark.parametrize("level", [Level.L0, Level.L1, Level.L4])
def test_a_trace_agrees_with_itself(trace: Trace, level: Level) -> None:
    result = compare(trace, replace(trace, backend="kvm"), level)
    assert result == Agreement(5)
    assert str(result) == "Both machines agree about 5 steps."


@pytest.mark.parametrize("level", [Level.L2, Level.L3])
def test_the_levels_of_the_mmu_need_traces_with_counters(trace: Trace, level: Level) -> None:
    with pytest.raises(UsageError, match=f"Level {level.value} needs traces with counters"):
        compare(trace, trace, level)


def test_traces_of_different_scenarios_are_refused(trace: Trace, model: ModelSystem) -> None:
    with pytest.raises(UsageError, match="different scenarios"):
        compare(trace, run(made(plan.Run()), model), Level.L4)


# --- L0 ------------------------------------------------------------------------------------------


def test_a_page_that_is_lost_is_found_by_the_trace_itself(trace: Trace) -> None:
    lossy = broken(trace, 1, dirty=without(trace.steps[1].dirty, 1, GFN + 1))
    assert first_loss(lossy, lossy) == (1, GFN + 1, 0, 1)
    found = difference(lossy, lossy, Level.L0)
    assert found.step == 1
    assert f"gfn {GFN + 1:#x} of slot 1: kvm has a change of its contents in step 0 (run" in str(found)
    assert "the log of kvm has no mark for it" in str(found)


def test_a_page_table_that_is_lost_is_found(trace: Trace) -> None:
    tables = [gfn for slot, gfn in trace.steps[3].dirty or () if slot == 0]
    assert tables  # D of the data's entries was clear
    lossy = broken(trace, 3, dirty=DirtyPages())
    assert difference(lossy, trace, Level.L0).what == f"gfn {min(tables):#x} of slot 0"


def test_a_change_that_only_the_other_machine_saw_must_be_reported(trace: Trace) -> None:
    # A machine that neither reports a page nor shows that it changed.
    changed = {page: data for page, data in trace.steps[0].changed.items() if page != (1, 1)}
    blind = broken(trace, 0, changed=changed)
    blind = broken(blind, 1, dirty=without(trace.steps[1].dirty, 1, GFN + 1))
    assert first_loss(blind, blind) is None
    found = difference(blind, trace, Level.L0)
    assert found.machines == ("model", "the log of kvm")


def losses(
    model: ModelSystem, *steps: plan.Step, tracker: str = "bitmap", slots: tuple[SlotPlan, ...] | None = None
) -> Trace:
    """A trace whose collections report nothing at all."""
    code = writer("long", 1, 2, 2, 3)
    trace = run(scenario("lossy", guest("long", 3, code, slots=slots), *steps, tracker=tracker), model)
    silent = [replace(s, dirty=None if s.dirty is None else DirtyPages()) for s in trace.steps]
    return replace(trace, steps=tuple(silent))


@pytest.mark.parametrize(
    ("tracker", "steps", "missed"),
    [
        ("bitmap", [plan.Run(), plan.Collect(1)], 1),
        ("bitmap", [plan.Run(), plan.HostWrite(1, 0, b"x"), plan.ReadStatistics(), plan.Collect(1)], 3),
        ("bitmap", [plan.SingleStep(0, 3), plan.Collect(1)], 1),
        ("manual", [plan.Run(), plan.Clear(1, 0, DATA_PAGES, b"\xfd\xff"), plan.Collect(1)], 2),
        ("ring", [plan.Run(), plan.Harvest()], 1),
        ("bitmap", [plan.Run(), plan.SaveLoad(False), plan.Collect(1)], 2),
        ("bitmap", [plan.Run(), plan.Logging(0, False), plan.Collect(1)], 2),
    ],
)
def test_silence_is_loss(model: ModelSystem, tracker: str, steps: list[plan.Step], missed: int) -> None:
    trace = losses(model, *steps, tracker=tracker)
    loss = first_loss(trace, trace)
    assert loss is not None
    assert loss.missed == missed


@pytest.mark.parametrize(
    ("tracker", "steps"),
    [
        ("bitmap", [plan.HostWrite(1, 0, b"x"), plan.Collect(1)]),
        ("bitmap", [plan.Logging(1, False), plan.Run(), plan.Logging(1, True), plan.Collect(1)]),
        ("bitmap", [plan.Run(), plan.Logging(1, False), plan.Logging(1, True), plan.Collect(1)]),
        (
            "bitmap",
            [plan.Run(), plan.ReflagSlot(1, SlotFlags.NONE), plan.ReflagSlot(1, LOG), plan.Collect(1)],
        ),
        ("bitmap", [plan.Run(), plan.MoveSlot(1, 1 << 30), plan.Collect(1)]),
        ("bitmap", [plan.Run(), plan.SaveLoad(True), plan.Collect(1)]),
        ("manual", [plan.Run(), plan.Clear(1, 0, DATA_PAGES, b"\x02"), plan.Collect(1)]),
        ("manual", [plan.Run(), plan.Clear(1, 0, DATA_PAGES), plan.Collect(1)]),
        ("none", [plan.Run(), plan.Collect(5)]),
    ],
)
def test_what_the_host_gives_up_is_no_loss(model: ModelSystem, tracker: str, steps: list[plan.Step]) -> None:
    slots = (
        SlotPlan(0, 0, 0, 0, PAGES * PAGE_SIZE),
        SlotPlan(1, DATA, 1, 0, DATA_PAGES * PAGE_SIZE, LOG),
        SlotPlan(5, 1 << 31, 0, 0, PAGE_SIZE, LOG),
    )
    trace = losses(model, *steps, tracker=tracker, slots=slots)
    assert first_loss(trace, trace) is None


def test_a_page_behind_two_slots_is_not_judged(model: ModelSystem) -> None:
    slots = (
        SlotPlan(0, 0, 0, 0, PAGES * PAGE_SIZE),
        SlotPlan(1, DATA, 1, 0, DATA_PAGES * PAGE_SIZE, LOG),
        SlotPlan(5, 1 << 31, 1, 0, DATA_PAGES * PAGE_SIZE, LOG),
    )
    trace = losses(model, plan.Run(), plan.Collect(5), slots=slots)
    assert first_loss(trace, trace) is None


# --- L1 ------------------------------------------------------------------------------------------


def test_a_page_too_many_is_found(trace: Trace) -> None:
    more = (trace.steps[1].dirty or DirtyPages()) | DirtyPages.of([(1, GFN + 9)])
    found = difference(broken(trace, 1, dirty=more), trace, Level.L1)
    assert (found.step, found.what) == (1, f"gfn {GFN + 9:#x} of slot 1")
    assert found.values == ("reported", "not reported")


def test_a_page_too_few_is_found(trace: Trace) -> None:
    fewer = without(trace.steps[1].dirty, 1, GFN + 1)
    assert difference(trace, broken(trace, 1, dirty=fewer), Level.L1).values == ("reported", "not reported")


@pytest.mark.parametrize(
    ("backend", "surplus", "agrees"),
    [
        ("kvm", Surplus(1, 9, 1, 0, "why"), True),
        ("kvm", Surplus(1, 0, DATA_PAGES, 1, "why"), True),
        ("kvm", Surplus(1, 9, 1, 2, "why"), False),  # not yet
        ("kvm", Surplus(0, 9, 1, 0, "why"), False),  # another slot
        ("kvm", Surplus(1, 10, 1, 0, "why"), False),  # another page
        ("model", Surplus(1, 9, 1, 0, "why"), False),  # the model reports what was written and nothing else
    ],
)
def test_a_rule_excuses_kvm_and_only_what_it_names(
    model: ModelSystem, backend: str, surplus: Surplus, agrees: bool
) -> None:
    trace = run(made(*STEPS, surplus=(surplus,)), model)
    more = (trace.steps[1].dirty or DirtyPages()) | DirtyPages.of([(1, GFN + 9)])
    other = replace(broken(trace, 1, dirty=more), backend=backend)
    assert isinstance(compare(other, trace, Level.L1), Agreement) == agrees
    assert isinstance(compare(trace, other, Level.L1), Agreement) == agrees


def test_a_host_that_marks_reads_may_report_more_and_not_less(trace: Trace) -> None:
    more = (trace.steps[1].dirty or DirtyPages()) | DirtyPages.of([(0, 1)])
    assert isinstance(compare(broken(trace, 1, dirty=more), trace, Level.L1), Difference)
    marking = replace(broken(trace, 1, dirty=more), marks_reads=True)
    assert isinstance(compare(marking, trace, Level.L1), Agreement)
    fewer = replace(broken(trace, 1, dirty=DirtyPages()), marks_reads=True)
    assert isinstance(compare(fewer, trace, Level.L1), Difference)


def test_a_rule_excuses_no_missing_page(model: ModelSystem) -> None:
    trace = run(made(*STEPS, surplus=(Surplus(1, 0, DATA_PAGES, 0, "why"),)), model)
    fewer = without(trace.steps[1].dirty, 1, GFN + 1)
    assert isinstance(compare(broken(trace, 1, dirty=fewer), trace, Level.L1), Difference)


# --- L4 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rax", "rsp", "r15", "rip", "rflags"])
def test_a_changed_register_is_found(trace: Trace, name: str) -> None:
    value = getattr(trace.steps[2].vcpus[0].registers, name) ^ 0x40
    found = difference(trace, broken(trace, 2, vcpus=with_register(trace.steps[2], name, value)), Level.L4)
    assert (found.step, found.what) == (2, f"{name} of vCPU 0")
    shown = [int(each, 16) for each in found.values]
    assert shown[0] ^ shown[1] == 0x40
    assert shown[1] & 0xFF == value & 0xFF


@pytest.mark.parametrize(
    "change", [{"cr2": 5}, {"cr3": 0x9000}, {"efer": 0}, {"cs": Segment()}, {"tr": Segment(base=5, s=0)}]
)
def test_a_changed_special_register_is_found(trace: Trace, change: dict[str, object]) -> None:
    view = trace.steps[0].vcpus[0]
    other = (replace(view, special=replace(view.special, **change)),)  # type: ignore[arg-type]
    assert next(iter(change)) in difference(trace, broken(trace, 0, vcpus=other), Level.L4).what


def test_a_changed_byte_of_memory_is_found(trace: Trace) -> None:
    changed = dict(trace.steps[0].changed)
    data = bytearray(changed[1, 1])
    data[0x123] ^= 1
    found = difference(trace, broken(trace, 0, changed=changed | {(1, 1): bytes(data)}), Level.L4)
    assert found.what == "memory 1 at 0x1120"
    assert found.values[0] != found.values[1]


def test_a_page_that_changed_on_one_side_only_is_found(trace: Trace) -> None:
    changed = {page: data for page, data in trace.steps[0].changed.items() if page != (1, 1)}
    found = difference(trace, broken(trace, 0, changed=changed), Level.L4)
    assert found.what == "page 0x1 of memory 1"
    assert found.values == ("a change, with 5a 00 00 00 00 00 00 00 at its byte 0x0", "no change")


@pytest.mark.parametrize(
    "exits", [(), (Halted(),), (IoOut(0x10, 1, b"B"),), (IoOut(0x10, 1, b"A"), Halted())]
)
def test_other_exits_are_found(trace: Trace, exits: tuple[object, ...]) -> None:
    assert "exit" in difference(trace, broken(trace, 0, exits=exits), Level.L4).what


def test_another_refusal_is_found(trace: Trace) -> None:
    refused = broken(trace, 1, refused="SlotOverlapError", message="because.")
    found = difference(trace, refused, Level.L4)
    assert found.values == ("no error", "SlotOverlapError (because.)")
    assert difference(refused, trace, Level.L1).what == "outcome"


def test_time_that_ran_out_on_one_machine_is_a_difference(trace: Trace) -> None:
    assert difference(trace, broken(trace, 2, overdue=True), Level.L4).values == ("in time", "out of time")


def test_time_that_ran_out_on_both_ends_the_comparison(trace: Trace) -> None:
    late = broken(trace, 2, overdue=True)
    assert compare(late, late, Level.L4) == Agreement(2, "step 2 was out of time on both machines")


def test_what_one_machine_cannot_do_ends_the_comparison(trace: Trace) -> None:
    unable = broken(trace, 2, impossible="no such thing")
    result = compare(trace, unable, Level.L4)
    assert result == Agreement(2, "step 2 is not possible on kvm: no such thing")
    assert str(result).endswith("agree about 2 steps; step 2 is not possible on kvm: no such thing.")


def test_an_emulation_failure_ends_the_comparison_and_other_internal_errors_do_not(trace: Trace) -> None:
    failed = broken(trace, 0, exits=(InternalError(1, ()),))
    assert isinstance(compare(trace, failed, Level.L4), Agreement)
    assert isinstance(compare(trace, broken(trace, 0, exits=(InternalError(3, ()),)), Level.L4), Difference)


# --- what is not compared --------------------------------------------------------------------------


def test_flags_of_the_interrupt_system_do_not_count_at_cpl_3(trace: Trace) -> None:
    flags = trace.steps[0].vcpus[0].registers.rflags
    other = broken(trace, 0, vcpus=with_register(trace.steps[0], "rflags", flags ^ 0x3200))
    assert isinstance(compare(trace, other, Level.L4), Agreement)


def test_the_same_flags_count_at_cpl_0(model: ModelSystem) -> None:
    trace = run(scenario("cpl 0", guest("long", 0, writer("long", 1)), plan.Run()), model)
    flags = trace.steps[0].vcpus[0].registers.rflags
    other = broken(trace, 0, vcpus=with_register(trace.steps[0], "rflags", flags ^ 0x200))
    assert difference(trace, other, Level.L4).what == "rflags of vCPU 0"


def test_rip_may_stand_at_a_finished_rep_whose_last_element_went_to_the_host(trace: Trace) -> None:
    registers = replace(trace.steps[0].vcpus[0].registers, rcx=0)
    views = [
        (replace(trace.steps[0].vcpus[0], registers=replace(registers, rip=registers.rip + n)),)
        for n in (0, 2, 16)
    ]
    one, two, far = (broken(trace, 0, vcpus=v, exits=(MmioWrite(5, b"x"),)) for v in views)
    assert isinstance(compare(one, two, Level.L4), Agreement)
    assert isinstance(compare(one, far, Level.L4), Difference)
    elsewhere = [broken(each, 0, exits=(Halted(),)) for each in (one, two)]
    assert isinstance(compare(*elsewhere, Level.L4), Difference)


def test_rip_may_stand_at_an_out_or_behind_it(trace: Trace) -> None:
    view = trace.steps[0].vcpus[0]
    registers = replace(view.registers, rcx=5)
    places = [
        broken(trace, 0, vcpus=(replace(view, registers=replace(registers, rip=registers.rip - distance)),))
        for distance in (0, 2, 4)
    ]
    assert isinstance(compare(places[0], places[1], Level.L4), Agreement)
    assert isinstance(compare(places[0], places[2], Level.L4), Difference)


def test_the_hidden_part_of_a_null_selector_does_not_count(trace: Trace) -> None:
    view = trace.steps[0].vcpus[0]
    null, other = Segment(selector=0, unusable=1, present=0), Segment(selector=0, base=5, dpl=1)
    values = [
        comparable(replace(view, special=replace(view.special, ss=ss, ds=ds)))
        for ss, ds in ((null, view.special.ds), (other, view.special.ds), (null, null))
    ]
    assert values[0] == values[1] != values[2]


def test_every_exception_has_a_reason() -> None:
    assert all(rule.what and len(rule.why) > 20 for rule in IGNORED)


# --- a lab whose processor is QEMU's TCG -----------------------------------------------------------


def page_of(words: dict[int, int]) -> bytes:
    """A page of zeros but for these quadwords, by number."""
    data = bytearray(PAGE_SIZE)
    for number, value in words.items():
        data[8 * number : 8 * number + 8] = value.to_bytes(8, "little")
    return bytes(data)


def both(trace: Trace, model: dict[str, object], kvm: dict[str, object]) -> tuple[Trace, Trace]:
    """The trace of the model and that of "kvm", each with members of step 2 replaced."""
    return replace(broken(trace, 2, **model), backend="model"), broken(trace, 2, **kvm)


def with_ss(step: StepTrace, selector: int) -> tuple[VcpuView, ...]:
    special = step.vcpus[0].special
    kernel = replace(special, cs=replace(special.cs, dpl=0), ss=Segment(selector=selector))
    return (replace(step.vcpus[0], special=kernel),)


READ = MmioRead(0x87C28, 8)
HANDLED = IoOut(0x4E, 1, b"B")
"""By the handler of page faults."""
AT = (0, 7)
TCG_STEPS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "error code": ({"changed": {AT: page_of({5: 7})}}, {"changed": {AT: page_of({5: 5})}}),
    "D of an entry": (
        {"changed": {AT: page_of({3: 0x8067})}, "exits": (READ,)},
        {"changed": {AT: page_of({3: 0x8027})}, "exits": (READ,)},
    ),
    "A of an entry": (
        {"changed": {AT: page_of({3: 0x8005})}, "exits": (HANDLED,)},
        {"changed": {AT: page_of({3: 0x8025})}, "exits": (HANDLED,)},
    ),
    "read that should be a fault": ({"exits": (HANDLED,)}, {"exits": (READ,)}),
    "D of a page of entries": (
        {"changed": {AT: page_of({3: 0x8067})}, "exits": (READ,)},
        {"changed": {}, "exits": (READ,)},
    ),
}
OTHER_STEPS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "another error code": ({"changed": {AT: page_of({5: 7})}}, {"changed": {AT: page_of({5: 6})}}),
    "W too many": ({"changed": {AT: page_of({5: 5})}}, {"changed": {AT: page_of({5: 7})}}),
    "no error code": ({"changed": {AT: page_of({5: 0x1007})}}, {"changed": {AT: page_of({5: 0x1005})}}),
    "A without a fault": ({"changed": {AT: page_of({3: 0x8005})}}, {"changed": {AT: page_of({3: 0x8025})}}),
    "A that is not set": (
        {"changed": {AT: page_of({3: 0x8025})}, "exits": (HANDLED,)},
        {"changed": {AT: page_of({3: 0x8005})}, "exits": (HANDLED,)},
    ),
    "fault that should be a read": ({"exits": (READ,)}, {"exits": (HANDLED,)}),
    "D without a read": ({"changed": {AT: page_of({3: 0x8067})}}, {"changed": {AT: page_of({3: 0x8027})}}),
    "a lost store": ({"changed": {AT: page_of({3: 0x5A})}, "exits": (READ,)}, {"exits": (READ,)}),
}


@pytest.mark.parametrize("name", TCG_STEPS)
def test_a_comparison_ends_before_a_step_that_shows_a_bug_of_tcg(
    trace: Trace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = both(trace, *TCG_STEPS[name])
    assert isinstance(compare(first, second, Level.L4), Difference)
    monkeypatch.setenv("PYKVM_LAB_EMULATOR", "qemu-tcg")
    for traces in ((first, second), (second, first)):
        for level in (Level.L4, Level.L0, Level.L1):
            result = compare(*traces, level)
            assert isinstance(result, Agreement)
            assert result.steps == 2
            assert result.note.startswith("in step 2 emulator: QEMU's TCG makes a read-modify-write")


@pytest.mark.parametrize("name", OTHER_STEPS)
def test_other_differences_are_found_in_its_lab_too(
    trace: Trace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYKVM_LAB_EMULATOR", "qemu-tcg")
    first, second = both(trace, *OTHER_STEPS[name])
    assert isinstance(compare(first, second, Level.L4), Difference)


def test_a_null_ss_in_a_handler_of_cpl_0_is_tcgs(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    step = trace.steps[2]
    first, second = both(trace, {"vcpus": with_ss(step, 0x10)}, {"vcpus": with_ss(step, 0)})
    assert "ss." in difference(first, second, Level.L4).what
    monkeypatch.setenv("PYKVM_LAB_EMULATOR", "qemu-tcg")
    assert "a null SS" in str(compare(first, second, Level.L4))
    first, second = both(trace, {"vcpus": with_ss(step, 0x10)}, {"vcpus": with_ss(step, 0x18)})
    assert "ss.selector" in difference(first, second, Level.L4).what


def test_undefined_af_counts_on_processors_only(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = trace.steps[1].vcpus[0].registers.rflags
    other = broken(trace, 1, vcpus=with_register(trace.steps[1], "rflags", flags ^ Rflags.AF))
    assert "rflags" in difference(trace, other, Level.L4).what
    monkeypatch.setenv("PYKVM_LAB_EMULATOR", "qemu-tcg")
    assert isinstance(compare(trace, other, Level.L4), Agreement)
    other = broken(trace, 1, vcpus=with_register(trace.steps[1], "rflags", flags ^ Rflags.ZF))
    assert "rflags" in difference(trace, other, Level.L4).what


def test_a_ring_that_overflowed_on_both_ends_the_comparison(trace: Trace) -> None:
    """How far a host gets that emulates in batches is up to its interrupts (hosts.md D.7)."""
    over = broken(trace, 1, refused="RingOverflowError")
    other = broken(over, 1, exits=())
    assert compare(over, other, Level.L4) == Agreement(
        1, "in step 1 the ring overflowed on both machines, when is up to interrupts"
    )
    assert isinstance(compare(over, broken(trace, 1, exits=()), Level.L4), Difference)


def test_one_spurious_fault_for_a_copied_root_ends_the_comparison() -> None:
    """Only on the model of a host that copies roots, with several vCPUs, and for that counter pair."""
    made = scenario("copied", guest("long", 3, *[writer("long", 1)] * 2), plan.Run(0), plan.Run(1))
    with ModelSystem(gathers=False) as model:
        one = run(made, model, watch=COUNTERS)
    counters = {"vcpu0.pf_taken": 3, "vcpu0.pf_spurious": 1}
    step = replace(one.steps[1], counters=counters)
    more = replace(step, counters={"vcpu0.pf_taken": 4, "vcpu0.pf_spurious": 2})
    other = replace(step, counters={"vcpu0.pf_taken": 5, "vcpu0.pf_spurious": 3})
    copying = replace(one, steps=(one.steps[0], step), copies_roots=True)
    start = {"vcpu0.pf_taken": 0, "vcpu0.pf_spurious": 0}
    copying = replace(copying, counters=start, steps=(replace(one.steps[0], counters=start), step))

    def result(with_step: StepTrace, trace: Trace = copying) -> object:
        return compare(trace, replace(trace, steps=(trace.steps[0], with_step), copies_roots=False), Level.L3)

    assert isinstance(result(more), Agreement)
    assert isinstance(result(other), Difference), "two are more than one"
    assert isinstance(result(more, replace(copying, copies_roots=False)), Difference)
