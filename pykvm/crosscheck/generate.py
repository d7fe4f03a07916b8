"""Random scenarios: memory layouts, page tables, programs and what the host does in between.

One builder takes its choices from a ``Source``, so that the same scenarios come from a seeded generator for
mass runs, from hypothesis for tests, and from a recorded list of choices for shrinking.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Final, NamedTuple

from pykvm.crosscheck import steps as plan
from pykvm.crosscheck.programs import Source, Terrain, Unit, chance, choose, random_program
from pykvm.crosscheck.rig import build_tables
from pykvm.crosscheck.rules import CROSSING_STORE, NEW_MAPPINGS, READ_OF_DIRTY_ENTRY
from pykvm.crosscheck.scenario import (
    CodeGuest,
    Contents,
    Mapping,
    Scenario,
    Surplus,
    TablePlan,
    VcpuPlan,
)
from pykvm.crosscheck.steps import SlotPlan, Step
from pykvm.machine import Registers, SlotFlags
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.x86.bits import Pte, Rflags

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

# The system memory: code, stacks, handlers, tables.
_SYSTEM_PAGES: Final = 64
_CODE: Final = 0x1000
_CODE_BYTES: Final = 0x800
_STACK: Final = 0x4000
_HANDLERS: Final = 0x4000
_TABLES: Final = TablePlan(0x8000, 40, handlers=_HANDLERS)
# The data: 16 pages that all modes reach, in real mode through one segment.
_DATA: Final = 0x80000
_DATA_PAGES: Final = 16
_FIRST_BYTES: Final = 16
_SPARE: Final = 0xA0000
"""Where slots are moved to and added."""
_SYSTEM_FLAGS: Final = Pte.P | Pte.RW | Pte.US | Pte.A
"""D stays clear in what is only read, since a read of a page with D set may dirty it (hosts.md B.0)."""
MODES: Final = (("real", 0), ("protected32", 0), ("protected32", 3), ("long", 3), ("long", 0))
_BITS: Final = {"real": 16, "protected32": 32, "long": 64}


class RandomSource:
    """Choices from a seeded generator; remembers them in ``choices``."""

    def __init__(self, seed: int | str) -> None:
        self._random = Random(seed)
        self.choices: list[int] = []

    def integer(self, least: int, most: int) -> int:
        self.choices.append(self._random.randint(least, most) - least)
        return least + self.choices[-1]


class RecordedSource:
    """Choices from a list, as far as they fit; then always the simplest."""

    def __init__(self, choices: Sequence[int]) -> None:
        self._choices = iter(choices)

    def integer(self, least: int, most: int) -> int:
        return least + min(next(self._choices, 0), most - least)


class _Ground(NamedTuple):
    """A guest's layout, before it has programs."""

    mode: str
    cpl: int
    slots: tuple[SlotPlan, ...]
    mappings: tuple[Mapping, ...]
    kinds: tuple[str, ...]
    dirty: tuple[int, ...]
    """Data pages (physical) that an entry with D set maps."""


def random_scenario(source: Source, name: str = "random") -> Scenario:
    """A scenario that every machine should run alike, with all its surplus named."""
    mode, cpl = choose(source, MODES)
    tracker = choose(source, ("bitmap", "manual", "manual-initially-set", "ring", "none"))
    ground = _random_ground(source, mode, cpl, logs=tracker != "none")
    vcpus = 1 + chance(source, 20)
    terrain = _terrain(ground, vcpus)
    contents = _random_contents(source)
    plans, programs = [], []
    for number in range(vcpus):
        code, marks, units = random_program(source, terrain, _CODE_BYTES)
        at = _CODE + number * _CODE_BYTES
        contents.append(Contents(0, at, code))
        plans.append(VcpuPlan(mode, cpl, _random_registers(source, at, number, cpl)))
        programs.append((marks, units))
    steps = _random_steps(source, ground, tracker, [marks for marks, _ in programs])
    guest = CodeGuest(
        memories=(_SYSTEM_PAGES * PAGE_SIZE, _DATA_PAGES * PAGE_SIZE),
        slots=ground.slots,
        contents=tuple(contents),
        vcpus=tuple(plans),
        tables=_TABLES,
        mappings=ground.mappings,
    )
    units = tuple(unit for _, each in programs for unit in each)
    surplus = _surplus(ground, steps, units)
    return Scenario(name, guest, steps, tracker, 1024, surplus)


def scenarios() -> SearchStrategy[Scenario]:
    """Random scenarios as a hypothesis strategy."""
    from hypothesis import strategies as st

    class Drawn:
        def __init__(self, draw: st.DrawFn) -> None:
            self._draw = draw

        def integer(self, least: int, most: int) -> int:
            return self._draw(st.integers(least, most))

    @st.composite
    def build(draw: st.DrawFn) -> Scenario:
        return random_scenario(Drawn(draw))

    return build()


# --- the guest -----------------------------------------------------------------------------------


def _random_ground(source: Source, mode: str, cpl: int, *, logs: bool) -> _Ground:
    slots = _random_slots(source, logs=logs)
    if mode != "long":
        return _Ground(mode, cpl, slots, (), ("rw",) * _DATA_PAGES, ())
    mappings = [Mapping(0, 0, _SYSTEM_PAGES * PAGE_SIZE, flags=int(_SYSTEM_FLAGS))]
    kinds, dirty = [], []
    for page in range(_DATA_PAGES):
        target = source.integer(0, _DATA_PAGES - 1) if chance(source, 20) else page
        flags = Pte.P | Pte.RW | Pte.US | choose(source, (Pte.A, Pte(0), Pte.A | Pte.D))
        kind = "rw"
        if chance(source, 12):
            taken = choose(source, (Pte.RW, Pte.P, Pte.US))
            flags &= ~taken
            kind = "rw" if taken == Pte.US and not cpl else "faults"
        if flags & Pte.D:
            dirty.append(target)
        mappings.append(
            Mapping(_DATA + page * PAGE_SIZE, _DATA + target * PAGE_SIZE, PAGE_SIZE, flags=int(flags))
        )
        kinds.append(kind)
    return _Ground(mode, cpl, slots, tuple(mappings), tuple(kinds), tuple(dirty))


def _random_slots(source: Source, *, logs: bool) -> tuple[SlotPlan, ...]:
    """Slot 0 for the system; the data's pages in up to four slots, with holes and read-only ones."""
    log = SlotFlags.LOG_DIRTY_PAGES if logs else SlotFlags.NONE
    slots = [SlotPlan(0, 0, 0, 0, _SYSTEM_PAGES * PAGE_SIZE, log)]
    page = 0
    while page < _DATA_PAGES:
        left = _DATA_PAGES - page
        pages = left if len(slots) == 4 else left - source.integer(0, left - 1)
        kind = choose(source, ("logs", "logs", "logs", "plain", "read-only", "hole", "aliased"))
        offset = source.integer(0, _DATA_PAGES - pages) if kind == "aliased" else page
        flags = {"plain": SlotFlags.NONE, "read-only": SlotFlags.READONLY}.get(kind, log)
        if kind != "hole":
            gpa, size = _DATA + page * PAGE_SIZE, pages * PAGE_SIZE
            slots.append(SlotPlan(len(slots), gpa, 1, offset * PAGE_SIZE, size, flags))
        page += pages
    return tuple(slots)


def _terrain(ground: _Ground, vcpus: int) -> Terrain:
    segment = _DATA if ground.mode == "real" else 0
    bits, kinds = _BITS[ground.mode], list(ground.kinds)
    entries = []
    if ground.mode == "long":
        registers = Registers(rip=_CODE, rsp=_STACK)
        guest = CodeGuest(
            (_SYSTEM_PAGES * PAGE_SIZE,),
            (),
            (),
            (VcpuPlan(ground.mode, ground.cpl, registers),) * vcpus,
            _TABLES,
            ground.mappings,
        )
        with GuestMemory(_SYSTEM_PAGES * PAGE_SIZE) as memory:
            tables, _ = build_tables(memory, guest)
            assert tables is not None
            for page in range(_DATA_PAGES - 4, _DATA_PAGES):
                at = tables.entry_address(_DATA + page * PAGE_SIZE)
                entries.append((page, at, int.from_bytes(memory.read(at, 8), "little")))
                kinds[page] = "changes"
    careful = ground.mode == "long" and not ground.cpl
    return Terrain(bits, ground.cpl, _DATA, segment, tuple(kinds), tuple(entries), careful)


def _random_contents(source: Source) -> list[Contents]:
    """What the data's pages begin with, decided by one choice: it does not matter much."""
    random = Random(source.integer(0, 0xFFFF))
    return [Contents(1, page * PAGE_SIZE, random.randbytes(_FIRST_BYTES)) for page in range(_DATA_PAGES)]


def _random_registers(source: Source, rip: int, vcpu: int, cpl: int) -> Registers:
    values = Random(source.integer(0, 0xFFFF))
    flags = Rflags.FIXED | (Rflags.IF if cpl else 0)
    registers = Registers(rip=rip, rsp=_STACK - vcpu * PAGE_SIZE, rflags=int(flags))
    for name in ("rax", "rbx", "rcx", "rdx", "rbp", "r8", "r15"):
        setattr(registers, name, values.getrandbits(64))
    return registers


# --- the steps -----------------------------------------------------------------------------------


def _random_steps(source: Source, ground: _Ground, tracker: str, marks: list[int]) -> tuple[Step, ...]:
    """Run the programs bit by bit, with calls of the host in between; collect everything at the end."""
    steps: list[Step] = []
    for vcpu, count in enumerate(marks):
        left = count + 1
        while left > 0:
            exits = source.integer(1, max(1, min(left, 6)))
            steps.append(plan.Run(vcpu, exits, fill=source.integer(0, 255)))
            left -= exits
            steps += [_random_host_step(source, ground, tracker) for _ in range(source.integer(0, 2))]
    steps += _collect_all(ground, tracker)
    return tuple(steps)


def _collect_all(ground: _Ground, tracker: str) -> list[Step]:
    if tracker == "ring":
        return [plan.Harvest()]
    return [plan.Collect(slot.slot) for slot in ground.slots]


def _random_host_step(source: Source, ground: _Ground, tracker: str) -> Step:
    slot = choose(source, ground.slots)
    spare = _SPARE + source.integer(0, 3) * _DATA_PAGES * PAGE_SIZE
    usual = plan.Harvest() if tracker == "ring" else plan.Collect(slot.slot)
    pages = slot.size // PAGE_SIZE
    choices: list[Step] = [
        *[usual] * 6,
        plan.Clear(slot.slot, 0, pages),
        plan.Clear(slot.slot, 64 * source.integer(0, 1), source.integer(0, 64)),
        plan.HostWrite(1, source.integer(0, _DATA_PAGES * PAGE_SIZE - 8), b"\x5a" * 8),
        plan.Logging(slot.slot, chance(source, 50)),
        plan.ReadStatistics(),
        plan.SaveLoad(chance(source, 50)),
        plan.ReflagSlot(slot.slot, SlotFlags(source.integer(0, 3))),
        plan.Harvest(),
    ]
    if slot.slot:  # the guest cannot do without the system's
        choices += [
            plan.MoveSlot(slot.slot, spare),
            plan.MoveSlot(slot.slot, slot.gpa),
            plan.DeleteSlot(slot.slot),
            plan.AddSlot(SlotPlan(9, spare, 1, 0, PAGE_SIZE, SlotFlags.LOG_DIRTY_PAGES)),
        ]
    return choose(source, choices)


def _surplus(ground: _Ground, steps: tuple[Step, ...], units: tuple[Unit, ...]) -> tuple[Surplus, ...]:
    """What KVM may report beyond what was written: only where it runs a guest on shadow page tables."""
    if ground.mode != "long":
        return ()
    found = []
    for page in sorted(set(ground.dirty)):
        found += _everywhere(ground, page, 0, READ_OF_DIRTY_ENTRY)
    for unit in units:
        if unit.crosses is not None:
            linear = ground.mappings[1 + unit.crosses]
            found += _everywhere(ground, (linear.physical - _DATA) // PAGE_SIZE, 0, CROSSING_STORE)
    for number, step in enumerate(steps):
        if isinstance(step, plan.MoveSlot | plan.DeleteSlot | plan.SaveLoad | plan.ReflagSlot) or (
            isinstance(step, plan.Logging) and not step.on
        ):
            # From here on everything that has been written may be marked again by a read.
            found += [
                Surplus(slot.slot, 0, slot.size // PAGE_SIZE, number, NEW_MAPPINGS) for slot in ground.slots
            ]
            found.append(Surplus(9, 0, 1, number, NEW_MAPPINGS))
            break
    return tuple(found)


def _everywhere(ground: _Ground, page: int, since: int, rule: str) -> list[Surplus]:
    """A data page by its physical address, in the slot that shows it there."""
    gpa = _DATA + page * PAGE_SIZE
    return [
        Surplus(slot.slot, (gpa - slot.gpa) // PAGE_SIZE, 1, since, rule)
        for slot in ground.slots
        if slot.gpa <= gpa < slot.gpa + slot.size
    ]
