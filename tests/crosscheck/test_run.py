"""Running fixed scenarios: on the model alone, and on real KVM and the model alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from pykvm.crosscheck import steps as plan
from pykvm.crosscheck.compare import Agreement
from pykvm.crosscheck.mass import check, judge, traces
from pykvm.crosscheck.rig import HANDLER_PORT
from pykvm.crosscheck.rules import CROSSING_STORE, NEW_MAPPINGS, READ_OF_DIRTY_ENTRY, WORKLOAD_ENTRIES
from pykvm.crosscheck.run import run
from pykvm.crosscheck.scenario import (
    TRACKERS,
    CodeGuest,
    Contents,
    Mapping,
    Scenario,
    Surplus,
    TablePlan,
    VcpuPlan,
    WorkloadPlan,
)
from pykvm.crosscheck.steps import SlotPlan
from pykvm.guest import catalog
from pykvm.guest.modes import PATTERN, stores_at, why_mode_fails
from pykvm.kvm import KvmSystem
from pykvm.machine import (
    DebugStop,
    Halted,
    InternalError,
    IoIn,
    IoOut,
    MmioRead,
    MmioWrite,
    Registers,
    SlotFlags,
)
from pykvm.memory import PAGE_SIZE
from pykvm.model.system import ModelSystem
from pykvm.x86.exceptions import Vector
from tests.crosscheck.samples import (
    CODE,
    DATA,
    DATA_PAGES,
    HALT,
    LOG,
    MODES,
    OUT,
    PAGES,
    PORT,
    STACK,
    TABLES,
    data_slot,
    every_step,
    guest,
    load,
    page,
    scenario,
    store,
    writer,
)
from tests.rings import LEAST_RING

SYSTEM_SLOT = SlotPlan(0, 0, 0, 0, PAGES * PAGE_SIZE, LOG)
ALL = (Surplus(0, 0, PAGES, 0, NEW_MAPPINGS), Surplus(1, 0, DATA_PAGES, 0, NEW_MAPPINGS))


def _collect(tracker: str) -> list[plan.Step]:
    return [plan.Harvest()] if tracker == "ring" else [plan.Collect(0), plan.Collect(1)]


def modes() -> Iterator[tuple[str, Scenario]]:
    """Every mode under every tracker: write, collect, write again, collect."""
    for mode, cpl in MODES:
        for tracker in TRACKERS:
            steps = [*_collect(tracker), plan.Run(0, 2), *_collect(tracker)]
            if tracker.startswith("manual"):
                steps += [plan.Clear(1, 0, DATA_PAGES, b"\x06\x00"), plan.Collect(1)]
            steps += [plan.Run(0, 3), *_collect(tracker), *_collect(tracker)]
            name = f"{mode} at CPL {cpl}, {tracker}"
            code = writer(mode, 1, 5, 1, 2)
            yield name, scenario(name, guest(mode, cpl, code), *steps, tracker=tracker)


def host_steps() -> Iterator[tuple[str, Scenario]]:
    """What the host does in between."""
    for mode, cpl in (("long", 3), ("long", 0), ("real", 0)):
        code = writer(mode, 1, 2, 3, 4)

        def made(name: str, *steps: plan.Step, tracker: str = "bitmap") -> tuple[str, Scenario]:
            name = f"{name} in {mode} at CPL {cpl}"  # noqa: B023 - called at once
            made_guest = guest(mode, cpl, code)  # noqa: B023
            return name, scenario(name, made_guest, *steps, tracker=tracker, surplus=ALL)

        yield made("logging off and on", plan.Run(), plan.Logging(1, False), plan.Collect(1), plan.Run(),
                   plan.Logging(1, True), plan.Collect(1), plan.Run(), plan.Collect(1))  # fmt: skip
        yield made("a slot deleted", plan.Run(), plan.DeleteSlot(1), plan.Collect(1), plan.Run(0, 2),
                   plan.AddSlot(data_slot(1)), plan.Run(), plan.Collect(1))  # fmt: skip
        yield made("a slot moved", plan.Run(), plan.MoveSlot(1, 0x400000), plan.Run(), plan.Collect(1),
                   plan.MoveSlot(1, DATA), plan.Run(), plan.Collect(1))  # fmt: skip
        yield made("a slot moved onto another", plan.MoveSlot(1, 0), plan.MoveSlot(1, 0x12345), plan.Run())
        yield made("a slot that is refused", plan.AddSlot(SlotPlan(7, DATA, 1, 0, PAGE_SIZE)),
                   plan.Collect(7), plan.MoveSlot(7, 1 << 30), plan.DeleteSlot(7), plan.Run())  # fmt: skip
        yield made("flags changed", plan.ReflagSlot(1, SlotFlags.NONE), plan.Run(),
                   plan.ReflagSlot(1, SlotFlags.READONLY), plan.ReflagSlot(1, LOG), plan.Run(),
                   plan.Collect(1))  # fmt: skip
        yield made("a second view of the data", plan.AddSlot(SlotPlan(7, 0x200000, 1, 0, PAGE_SIZE * 4, LOG)),
                   plan.Run(), plan.Collect(7), plan.Collect(1))  # fmt: skip
        yield made("the host writes", plan.HostWrite(1, 0, b"x" * 100), plan.Collect(1), plan.Run(),
                   plan.HostWrite(1, PAGE_SIZE, b"y"), plan.Collect(1))  # fmt: skip
        yield made("saved and loaded", plan.Run(), plan.SaveLoad(False), plan.Collect(1), plan.Run(),
                   plan.SaveLoad(True), plan.Run(), plan.Collect(1))  # fmt: skip
        yield made("ranges to clear", plan.Run(), plan.Clear(1, 0, DATA_PAGES), plan.Clear(1, 1, 1),
                   plan.Clear(1, 0, 15), plan.Clear(1, 64, 0), plan.Clear(1, 0, 100), plan.Clear(0, 0, 64),
                   plan.Collect(1), tracker="manual")  # fmt: skip
        yield made("the wrong collector", plan.Run(), plan.Harvest())
        yield made("the wrong collector of a ring", plan.Run(), plan.Collect(1), plan.Clear(1, 0, DATA_PAGES),
                   plan.Harvest(), tracker="ring")  # fmt: skip
        again = plan.SetRegisters(0, Registers(rip=CODE, rsp=STACK, rflags=2))
        yield made("new registers", plan.Run(), again, plan.Run(), plan.Collect(1))


def exits() -> Iterator[tuple[str, Scenario]]:
    """Exits and their answers."""
    for mode, cpl in MODES:
        slots = (SYSTEM_SLOT, SlotPlan(1, DATA, 1, 0, 4 * PAGE_SIZE, LOG),
                 SlotPlan(2, page(4), 1, 4 * PAGE_SIZE, 4 * PAGE_SIZE, SlotFlags.READONLY))  # fmt: skip
        code = store(page(4), mode) + load(page(5), mode) + store(page(9), mode) + load(page(9), mode) + OUT
        steps: list[plan.Step] = [
            plan.Run(),
            plan.Run(),
            plan.Answer(0, b"\x77"),
            plan.Run(),
            plan.Collect(1),
        ]
        name = f"read-only and missing memory in {mode} at CPL {cpl}"
        yield name, scenario(name, guest(mode, cpl, code, slots=slots), *steps)
        name = f"IN in {mode} at CPL {cpl}"
        code = b"\xe4\x11" + OUT + b"\xe5\x11" + OUT
        steps = [plan.Run(), plan.Answer(0, b"\x01\x02"), plan.Answer(0, b"\x99"), plan.Answer(0, b"\x99"),
                 plan.Run(), plan.Run(fill=3), plan.Answer(0, b"")]  # fmt: skip
        yield name, scenario(name, guest(mode, cpl, code), *steps)
    for mode, cpl in MODES[1:]:
        name = f"an exception in {mode} at CPL {cpl}"
        code = store(page(0), mode) + b"\x0f\x0b"
        yield name, scenario(name, guest(mode, cpl, code), plan.Run(), plan.Run(), plan.Collect(0))
    for mode, cpl in (("long", 0), ("protected32", 0), ("protected32", 3), ("real", 0)):
        name = f"single steps in {mode} at CPL {cpl}"
        steps = [plan.SingleStep(0, 3), plan.SingleStep(0, 40), plan.Run(), plan.Collect(1)]
        yield name, scenario(name, guest(mode, cpl, writer(mode, 1, 2)), *steps)
        name = f"single steps over questions in {mode} at CPL {cpl}"
        slots = (SYSTEM_SLOT, SlotPlan(1, DATA, 1, 0, PAGE_SIZE, LOG))
        code = b"\xe4\x11\x90" + load(page(1), mode) + store(page(1), mode) + b"\x90" + OUT + b"\x90" * 3
        steps = [plan.SingleStep(0, 1, fill=7)] * 9
        yield name, scenario(name, guest(mode, cpl, code, slots=slots), *steps)


def paging() -> Iterator[tuple[str, Scenario]]:
    """Accessed and dirty bits, and pages that fault, at both levels."""
    for cpl in (0, 3):
        for name, flags, access in (
            ("A and D clear, a load", 0x07, load),
            ("A and D clear, a store", 0x07, store),
            ("D clear, a store", 0x27, store),
            ("D set, a load", 0x67, load),
            ("read-only, a load", 0x05, load),
            ("read-only, a store", 0x05, store),
            ("not present", 0x06, load),
            ("supervisor, a store", 0x03, store),
        ):
            full = f"{name}, at CPL {cpl}"
            surplus = (Surplus(1, 2, 1, 0, READ_OF_DIRTY_ENTRY),) if flags & 0x40 else ()
            code = access(page(2), "long") + OUT + HALT
            steps: list[plan.Step] = [plan.Run(), plan.Collect(0), plan.Collect(1)]
            made = guest("long", cpl, code, data_flags=flags)
            yield full, scenario(full, made, *steps, surplus=surplus)
    mappings = (
        Mapping(0, 0, PAGES * PAGE_SIZE, flags=0x27),
        Mapping(DATA, page(3), PAGE_SIZE, flags=0x27),
        Mapping(page(1), page(3), PAGE_SIZE, flags=0x27),
        Mapping(page(2), page(4), PAGE_SIZE, flags=0x05),
    )
    code = store(page(0), "long") + OUT + store(page(1), "long") + OUT
    name = "two linear pages on one physical one"
    made = guest("long", 3, code, mappings=mappings)
    yield name, scenario(name, made, plan.Run(), plan.Collect(1), plan.Run(), plan.Collect(1))
    # mov [rdi], rax with three bytes in the next page, which is read-only
    code = b"\xbf" + (page(2) - 5).to_bytes(4, "little") + b"\x48\x89\x07" + OUT
    name = "a store that crosses into a read-only page"
    surplus = (Surplus(1, 3, 1, 0, CROSSING_STORE),)
    made = guest("long", 3, code, mappings=mappings)
    yield name, scenario(name, made, plan.Run(), plan.Collect(0), plan.Collect(1), surplus=surplus)


def several() -> Iterator[tuple[str, Scenario]]:
    """Several vCPUs, a full ring, guests of the catalogue."""
    for mode, cpl in MODES:
        made = guest(mode, cpl, writer(mode, 1, 2), writer(mode, 2, 3), writer(mode, 4))
        steps = [plan.Run(1), plan.Run(0, 2), plan.Run(2), plan.Collect(1), plan.Run(1), plan.Collect(1)]
        name = f"three vCPUs in {mode} at CPL {cpl}"
        yield name, scenario(name, made, *steps)
    # again: mov [rdi], rcx; add rdi, 0x1000; dec rcx; jnz again: more pages than the ring has entries
    count = LEAST_RING + LEAST_RING // 2
    code = b"\xb9" + count.to_bytes(4, "little") + b"\xbf" + DATA.to_bytes(4, "little")
    code += bytes.fromhex("48890f 4881c700100000 48ffc9 75f1") + OUT
    made = CodeGuest(
        memories=(PAGES * PAGE_SIZE, count * PAGE_SIZE),
        slots=(SYSTEM_SLOT, SlotPlan(1, DATA, 1, 0, count * PAGE_SIZE, LOG)),
        contents=(Contents(0, CODE, code),),
        vcpus=(VcpuPlan("long", 3, Registers(rip=CODE, rsp=STACK, rflags=0x202)),),
        tables=TablePlan(TABLES, 40, handlers=0x4000),
        mappings=(Mapping(0, 0, PAGES * PAGE_SIZE, flags=0x27),
                  Mapping(DATA, DATA, count * PAGE_SIZE, flags=0x27)),
    )  # fmt: skip
    steps = [plan.Run(), plan.Harvest(), plan.Harvest()]
    yield "a full ring", scenario("a full ring", made, *steps, tracker="ring", ring_entries=LEAST_RING)
    for mode, cpl in (("real", 0), ("protected16", 0), ("protected32", 0), ("long", 0), ("long", 3)):
        name = f"the mode test {mode} at CPL {cpl}"
        linear = 0x700000000000
        size = 0x10000
        mappings = (Mapping(0, 0, 2 << 20, flags=0x27), Mapping(linear, 0x120000, size, flags=0x27))
        registers = Registers(rip=catalog.load(mode).header.entry, rsp=0x7000, rflags=2)
        made = CodeGuest(
            memories=(2 << 20,),
            slots=(SlotPlan(0, 0, 0, 0, 2 << 20, LOG),),
            contents=(),
            vcpus=(VcpuPlan(mode, cpl, registers),),
            tables=TablePlan(0x40000, 40),
            mappings=mappings if mode == "long" else (),
            image=mode,
        )
        yield name, scenario(name, made, plan.Run(), plan.Collect(0))
    for cpl, tracker in ((3, "bitmap"), (0, "manual"), (3, "ring")):
        name = f"a workload at CPL {cpl}, {tracker}"
        surplus = (Surplus(0, 0, 2 << 20, 0, WORKLOAD_ENTRIES),)
        steps = [plan.Logging(0, True), plan.Run(), plan.Harvest() if tracker == "ring" else plan.Collect(0)]
        made = WorkloadPlan("sequential", 4 << 20, 1, cpl, 5, 1)
        yield name, Scenario(name, made, tuple(steps), tracker, 4096, surplus)


FIXED: dict[str, Scenario] = {
    name: each for group in (modes, host_steps, exits, paging, several) for name, each in group()
} | {f"every step in {mode} at CPL {cpl}": every_step(mode, cpl) for mode, cpl in (("long", 3), ("long", 0))}


@pytest.mark.parametrize("name", FIXED)
def test_the_model_does_what_kvm_does(system: KvmSystem, model: ModelSystem, name: str) -> None:
    real, ours = traces(FIXED[name], system, model)
    result = judge(real, ours)
    assert isinstance(result, Agreement), str(result)
    assert not any(step.overdue for step in real.steps)


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("mode", ["paged32", "pae"])
def test_paged_modes_where_the_host_has_them(
    system: KvmSystem, model: ModelSystem, mode: str, cpl: int
) -> None:
    reason = why_mode_fails(system, mode, cpl=cpl)
    if reason is not None:
        pytest.skip(f"this host does not run {mode}: {reason}")
    mappings = (Mapping(0, 0, PAGES * PAGE_SIZE, flags=0x27), Mapping(DATA, DATA, 8 * PAGE_SIZE, flags=0x07))
    made = guest(mode, cpl, writer(mode, 1, 2), mappings=mappings)
    steps = [plan.Run(), plan.Collect(0), plan.Collect(1), plan.Run(0, 2), plan.Collect(1)]
    result = check(scenario(mode, made, *steps), system, model)
    assert isinstance(result, Agreement), str(result)


@pytest.mark.parametrize("name", ["long at CPL 3, ring", "every step in long at CPL 0", "a full ring"])
def test_a_scenario_gives_the_same_trace_again(system: KvmSystem, name: str) -> None:
    assert isinstance(judge(run(FIXED[name], system), run(FIXED[name], system)), Agreement)


def test_all_steps_and_exits_are_among_the_fixed_ones(model: ModelSystem) -> None:
    # Those of KVM's MMU have tests of their own (test_mmu_examples.py).
    mmu = {"access", "set_controls", "translate"}
    assert {step.kind for each in FIXED.values() for step in each.steps} == set(plan.KINDS) - mmu
    exits = {type(reason) for each in FIXED.values() for s in run(each, model).steps for reason in s.exits}
    assert exits == {IoIn, IoOut, MmioRead, MmioWrite, Halted, DebugStop}


# --- what a trace says, by reading -----------------------------------------------------------------


def test_a_trace_shows_what_the_guest_wrote(model: ModelSystem) -> None:
    trace = run(FIXED["long at CPL 0, bitmap"], model)
    first, collected = trace.steps[2], trace.steps[4]
    assert first.exits == (IoOut(0x10, 1, b"\x41"), IoOut(0x10, 1, b"\x41"))
    # Stores of 0x5a to data pages 1 and 5, whose entries had D clear.
    assert first.changed[1, 1][0] == first.changed[1, 5][0] == 0x5A
    assert {number for memory, number in first.changed if memory == 1} == {1, 5}
    assert collected.dirty is not None
    assert list(collected.dirty) == [(1, DATA // PAGE_SIZE + 1), (1, DATA // PAGE_SIZE + 5)]
    assert trace.backend == "model"


def test_an_image_of_the_catalogue_runs(model: ModelSystem) -> None:
    trace = run(FIXED["the mode test long at CPL 0"], model)
    assert trace.steps[0].exits == (IoOut(0xF4, 1, b"\0"),)
    stored = trace.steps[0].changed[0, stores_at("long") // PAGE_SIZE]
    assert int.from_bytes(stored[:4], "little") == PATTERN


def test_a_refusal_is_part_of_the_trace(model: ModelSystem) -> None:
    trace = run(FIXED["a slot moved onto another in long at CPL 3"], model)
    assert [step.refused for step in trace.steps] == ["SlotOverlapError", "SlotAlignmentError", ""]


ENDLESS = b"\xeb\xfe"


@pytest.mark.parametrize("make", [KvmSystem, ModelSystem])
@pytest.mark.kvm
def test_a_guest_without_end_is_kicked_out(make: Callable[[], KvmSystem | ModelSystem]) -> None:
    endless = scenario("endless", guest("long", 3, ENDLESS), plan.Run(), plan.Run())
    with make() as system:
        begin = time.monotonic()
        trace = run(endless, system, seconds=0.3)
        assert 0.3 <= time.monotonic() - begin < 5
        assert [step.overdue for step in trace.steps] == [True]


@pytest.mark.parametrize("exits", [1, 1000])
def test_a_guest_that_only_exits_ends_in_time(model: ModelSystem, exits: int) -> None:
    chatty = scenario("chatty", guest("long", 0, OUT + b"\xeb\xfc"), plan.Run(0, exits), plan.Run(0, 60000))
    trace = run(chatty, model, seconds=0.3)
    assert len(trace.steps[0].exits) <= exits
    assert trace.steps[-1].overdue


def test_what_a_host_cannot_single_step_is_said(system: KvmSystem, model: ModelSystem) -> None:
    """At CPL 3 some hosts cannot (hosts.md C.4): the trace says so, or else agrees with the model."""
    steps = scenario("steps", guest("long", 3, writer("long", 1)), plan.Run(), plan.SingleStep(0, 2))
    trace = run(steps, system)
    if trace.steps[1].impossible:
        assert "cannot stop after each instruction in mode long at CPL 3" in trace.steps[1].impossible
        assert not trace.steps[1].exits
    result = judge(trace, run(steps, model))
    assert isinstance(result, Agreement)
    assert result.steps == (1 if trace.steps[1].impossible else 2)


def test_what_kvms_emulator_lacks_ends_the_comparison(system: KvmSystem, model: ModelSystem) -> None:
    """popcnt is not in the emulator of the kernel (hosts.md C.2); hosts with native CPL 0 have it."""
    lacking = scenario("popcnt", guest("long", 0, b"\xf3\x0f\xb8\xc1" + OUT), plan.Run(), plan.Collect(1))
    trace = run(lacking, system)
    result = judge(trace, run(lacking, model))
    assert isinstance(result, Agreement)
    if isinstance(trace.steps[0].exits[0], InternalError):
        assert result.steps == 0
        assert "kvm gave up: KVM internal error 1 (emulation failed)" in result.note
    else:
        assert result.steps == 2


# --- where KVM's emulator has an order of its own (docs/kvm-findings.md) ------------------------------


def test_kvms_emulator_reads_before_it_faults(system: KvmSystem, model: ModelSystem) -> None:
    """inc byte [rdi] where the page is read-only and has no memory; hosts with native CPL 0 just fault."""
    mappings = (Mapping(0, 0, PAGES * PAGE_SIZE, flags=0x27), Mapping(DATA, 1 << 30, PAGE_SIZE, flags=0x25))
    code = b"\xbf" + DATA.to_bytes(4, "little") + b"\xfe\x07"
    made = scenario("rmw", guest("long", 0, code, mappings=mappings), plan.Run(fill=0), plan.Run())
    fault = IoOut(HANDLER_PORT + Vector.PF, 1, b"\x41")
    ours, theirs = run(made, model).steps[0].exits, run(made, system).steps[0].exits
    assert ours == (fault,)
    assert theirs in {(MmioRead(1 << 30, 1), fault), (fault,)}


def test_kvms_emulator_ends_rep_at_the_next_entry(system: KvmSystem, model: ModelSystem) -> None:
    """rep stosb of two bytes to a page without memory: both machines agree, with RIP where each has it."""
    code = b"\xb9\2\0\0\0\xbf" + (1 << 30).to_bytes(4, "little") + b"\xf3\xaa" + OUT
    made = scenario("rep", guest("protected32", 0, code), plan.Run(0, 2), plan.Run())
    theirs, ours = run(made, system), run(made, model)
    assert ours.steps[0].exits == (MmioWrite(1 << 30, b"\x41"), MmioWrite((1 << 30) + 1, b"\x41"))
    assert isinstance(judge(theirs, ours), Agreement)
    assert ours.steps[0].vcpus[0].registers.rip == CODE + 12
    assert theirs.steps[0].vcpus[0].registers.rip in {CODE + 10, CODE + 12}
    assert theirs.steps[1].exits == ours.steps[1].exits == (IoOut(PORT, 1, b"\x41"),)
