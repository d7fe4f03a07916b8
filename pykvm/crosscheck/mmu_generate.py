"""Random scenarios for KVM's MMU: page tables of all shapes, guests that rewrite them, hosts that interfere.

Each step is one access or one call, so that a difference can be laid at one door.  The guest's memory is a
few pages that the host has touched, so that no fault of the host's disturbs (hosts.md A); what hosts.md H
calls hazards is left out: CPL 0 runs few stores at a time and never jumps where code may be missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from pykvm.crosscheck import steps as plan
from pykvm.crosscheck.mmu_tables import (
    ALIAS_GFN,
    DATA_PAGES,
    HIGH_GFN,
    PAGES,
    SYSTEM_PAGES,
    TABLE_PAGES,
    Tables,
    Way,
    canonical,
    random_entry,
    random_tables,
    sort_ways,
)
from pykvm.crosscheck.programs import Source, chance, choose
from pykvm.crosscheck.scenario import CodeGuest, Contents, Controls, Scenario, TablePlan, VcpuPlan
from pykvm.crosscheck.snippets import FETCH_OFFSET, FETCHED, SNIPPETS
from pykvm.crosscheck.steps import SlotPlan, Step
from pykvm.machine import Registers, SlotFlags
from pykvm.memory import PAGE_SIZE
from pykvm.x86.bits import Cr0, Cr4, Efer, Pte

CODE: Final = 0x1000
_HANDLERS: Final = 0x2000
_SYSTEM_TABLES: Final = TablePlan(0x3000, 12, handlers=_HANDLERS)
CR0: Final = int(Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.PG)
CR4: Final = int(Cr4.PAE | Cr4.OSFXSR | Cr4.OSXMMEXCPT)
EFER: Final = int(Efer.LME | Efer.LMA | Efer.NXE)
_SYSTEM, _TABLES, _DATA, _OTHER = 0, 1, 2, 3
"""Slots."""
_HOMES: Final = {
    _SYSTEM: 0,
    _TABLES: TABLE_PAGES[0] * PAGE_SIZE,
    _DATA: DATA_PAGES[0] * PAGE_SIZE,
    _OTHER: ALIAS_GFN * PAGE_SIZE,
}
_RINGS: Final = (256, 512, 1024, 4096)
_OFFSETS: Final = (0, 8, 0x40, 0x208, 0xFE0, 0xFFC, 0xFFF)
"""Of accesses to data: at the end they cross into the next page; the code for ``fetch`` stays as it is."""
# Without PREFETCHW: whether it sets A in an SPTE, which a later fault then finds as it would make it, is the
# processor's affair.
_PLAIN: Final = (
    *("store8", "load8") * 6,
    *("store1", "store4", "store2", "load1", "load4"),
    *("add8", "lock_add4", "inc8", "xadd8", "lock_xadd8", "xchg8", "cmpxchg8", "lock_cmpxchg8"),
    *("bts8", "lock_bts8", "or4", "and2", "push", "pop", "call", "stos8", "movs8", "stos1", "movs1"),
    *("stos8_down", "movups", "movaps", "movdqu", "movntdq", "load_movups", "movnti8", "movnti4"),
    *("movq_mm", "cmpxchg8b", "lock_cmpxchg8b", "cmpxchg16b", "movq_xmm", "shift_by_zero4", "rotate8"),
    *("setc", "test8", "compare4", "bt8", "clflush", "store_load", "load_store"),
    *("store_store", "store4_times", "push_immediate", "neg4", "not8"),
)
_REWRITES: Final = (
    *("store8",) * 8,
    *("store4", "store1", "store2", "xchg8", "or8", "and8", "xor8", "or4", "and4", "store_immediate8"),
    *("cmpxchg8", "lock_cmpxchg8", "cmpxchg8b", "lock_cmpxchg8b", "bts8", "btr8", "btc4", "lock_bts8"),
    *("add8", "lock_add8", "inc8", "xadd8", "lock_xadd8", "sub8", "lock_inc4", "shift8"),
    *("movups", "movdqu", "movntdq", "movnti8", "movnti4", "movq_mm", "push", "stos8", "movs8", "stos1"),
    *("cmpxchg16b", "movq_xmm", "store4_times", "add4_times", "store_twice", "store_load", "store_store"),
    *("call", "pop", "or1", "and2", "lock_or8", "xchg4", "neg4", "setc"),
)
_STEPS: Final = (8, 20)
_ROAMED: Final = 60
_FILLED: Final = 40
"""Elements of the strings that fill a ring of 256 entries: fewer than its reserve of 64."""


@dataclass(slots=True)
class _World:
    """What the generator knows of the machine while it makes steps."""

    source: Source
    tables: Tables
    tracker: str
    vcpus: int
    kernel: bool
    """Whether this guest also runs at CPL 0."""
    fills: bool
    """Whether it fills its ring: emulated strings push an entry for each element."""
    roams: bool
    """Whether it uses so many tables that shadow pages are recycled."""
    roots: list[int]
    ways: dict[int, tuple[list[Way], list[Way]]] = field(default_factory=dict)
    slots: dict[int, int] = field(default_factory=dict)
    """Size in pages of slots by number."""
    other: SlotPlan | None = None
    recent: tuple[int, int] | None = None
    """The entry that was rewritten last."""

    def ways_of(self, vcpu: int) -> tuple[list[Way], list[Way]]:
        root = self.roots[vcpu]
        if root not in self.ways:
            self.ways[root] = sort_ways(self.tables.ways(root), self.tables.levels)
        return self.ways[root]


def random_mmu_scenario(source: Source, name: str = "random") -> Scenario:
    """A scenario that a model of KVM's MMU must predict exactly."""
    tracker = choose(source, ("bitmap", "ring", "manual", "manual-initially-set", "none"))
    ring = choose(source, _RINGS)
    tables = random_tables(source)
    vcpus = 1 + chance(source, 15)
    fills = tracker == "ring" and ring == _RINGS[0] and chance(source, 25)
    roams = chance(source, 4)
    kernel = chance(source, 30) or fills
    world = _World(
        source,
        tables,
        tracker,
        vcpus,
        kernel,
        fills,
        roams,
        [choose(source, tables.roots) for _ in range(vcpus)],
    )
    slots = _random_slots(world)
    plans = tuple(
        VcpuPlan("long", 3, Registers(rip=CODE, rsp=CODE, rflags=2), Controls(CR0, root << 12, CR4, EFER))
        for root in world.roots
    )
    guest = CodeGuest(
        memories=(PAGES * PAGE_SIZE,),
        slots=slots,
        contents=tuple(_contents(tables)),
        vcpus=plans,
        tables=_SYSTEM_TABLES,
        snippets=CODE,
    )
    steps: list[Step] = []
    wanted = source.integer(*_STEPS)
    while len(steps) < (_ROAMED if roams else wanted):
        steps.append(_random_step(world))
    steps += _collect_all(world)
    return Scenario(name, guest, tuple(steps), tracker, ring)


def _contents(tables: Tables) -> list[Contents]:
    found = [Contents(0, frame * PAGE_SIZE, _entries_only(tables, frame)) for frame in tables.entries]
    found += [
        Contents(0, frame * PAGE_SIZE + FETCH_OFFSET, FETCHED)
        for frame in (*tables.entries, *DATA_PAGES[:12])
    ]
    return found


def _entries_only(tables: Tables, frame: int) -> bytes:
    return tables.image(frame).rstrip(b"\0") or b"\0"


def _random_slots(world: _World) -> tuple[SlotPlan, ...]:
    source = world.source
    log = SlotFlags.NONE if world.tracker == "none" else SlotFlags.LOG_DIRTY_PAGES
    slots = []
    for slot, pages in ((_SYSTEM, range(SYSTEM_PAGES)), (_TABLES, TABLE_PAGES), (_DATA, DATA_PAGES)):
        flags = SlotFlags.NONE if chance(source, 12) else log
        home = _HOMES[slot]
        slots.append(SlotPlan(slot, home, 0, home, len(pages) * PAGE_SIZE, flags))
    if chance(source, 50):
        slots.append(_random_other(world, log))
        world.other = slots[-1]
    for each in slots:
        world.slots[each.slot] = each.size // PAGE_SIZE
    return tuple(slots)


def _random_other(world: _World, log: SlotFlags) -> SlotPlan:
    """A slot that shows data or tables again, elsewhere."""
    source = world.source
    pages = choose(source, (16, 4, 1, 32))
    first = choose(source, (DATA_PAGES[0], DATA_PAGES[0] + 4, TABLE_PAGES[0]))
    pages = min(pages, PAGES - first)
    gfn = choose(source, (ALIAS_GFN, HIGH_GFN))
    flags = choose(source, (log, log, SlotFlags.NONE, SlotFlags.READONLY))
    return SlotPlan(_OTHER, gfn * PAGE_SIZE, 0, first * PAGE_SIZE, pages * PAGE_SIZE, flags)


# --- the steps -----------------------------------------------------------------------------------


def _collect_all(world: _World) -> list[Step]:
    if world.tracker == "ring":
        return [plan.Harvest()]
    return [plan.Collect(slot) for slot in world.slots]


def _random_step(world: _World) -> Step:
    source = world.source
    kind = source.integer(0, 99)
    vcpu = source.integer(0, world.vcpus - 1)
    if world.fills and chance(source, 60):
        return plan.Access("stos8", _some_address(world, vcpu) & ~0xFFF, 1, _FILLED, 0, 0, vcpu)
    if world.roams and chance(source, 80):
        return _roam(world, vcpu)
    if kind < 34:
        return _access(world, vcpu)
    if kind < 62:
        return _rewrite(world, vcpu)
    if kind < 66:
        return _fetch(world, vcpu)
    if kind < 72:
        return _controls(world, vcpu)
    if kind < 78 and world.kernel:
        return _kernel(world, vcpu)
    if kind < 88:
        return _harvest(world)
    if kind < 94:
        return _slot_step(world)
    if kind < 96:
        return _host_write(world)
    if kind < 98:
        return plan.Translate(_some_address(world, vcpu), vcpu)
    return _anywhere(world, vcpu)


def _level(world: _World) -> int:
    return 0 if world.kernel and chance(world.source, 25) else 3


def _count(world: _World, cpl: int) -> int:
    """Elements of a string: emulated ones push an entry each, and a run must not push more than what the ring
    keeps in reserve (hosts.md D.7)."""
    return choose(world.source, (1, 2, 3, 0, 17) if cpl else (1, 2, 3, 0, 40, 40))


def _some_address(world: _World, vcpu: int) -> int:
    """A linear address of data, by preference one that the last rewrite concerns."""
    source = world.source
    tables, others = world.ways_of(vcpu)
    if world.recent is not None and chance(source, 50):
        concerned = [way for way in (*others, *tables) if world.recent in way.path]
        if concerned:
            return _at(source, choose(source, concerned))
    ways = _preferred(source, tables if tables and chance(source, 15) else others)
    return _at(source, choose(source, ways)) if ways else 0x30000


def _preferred(source: Source, ways: list[Way]) -> list[Way]:
    """Mostly those that user code may store through."""
    free = [way for way in ways if way.free]
    return free if free and not chance(source, 15) else ways


def _at(source: Source, way: Way) -> int:
    """An address within the page; of a large one, in one of the frames that there are."""
    offset = choose(source, _OFFSETS)
    if way.level > 1:
        offset += choose(source, (*DATA_PAGES[:6], *TABLE_PAGES[:6], ALIAS_GFN)) * PAGE_SIZE
    return way.linear + offset


def _access(world: _World, vcpu: int) -> Step:
    source = world.source
    name, cpl = choose(source, _PLAIN), _level(world)
    if not cpl and SNIPPETS[name].lacking:
        cpl = 3
    address = _some_address(world, vcpu)
    second = _some_address(world, vcpu) if SNIPPETS[name].reads_second else 0
    count = _count(world, cpl) if SNIPPETS[name].counted else 0
    return plan.Access(name, address, source.integer(0, 0xFF), count, second, cpl, vcpu)


def _anywhere(world: _World, vcpu: int) -> Step:
    """An access to some address that may be nowhere."""
    source = world.source
    indices = [choose(source, (0, 1, 2, 4, 300, 511)) for _ in range(4)]
    linear = 0
    for index in indices:
        linear = linear << 9 | index
    address = canonical(linear << 12 | choose(source, _OFFSETS[:4]))
    if indices[:3] == [0, 0, 0]:
        return plan.Access("load8", address, vcpu=vcpu)
    return plan.Access(choose(source, ("load8", "store8")), address, 1, vcpu=vcpu)


def _roam(world: _World, vcpu: int) -> Step:
    """Read through any of the ways, so that as many tables as possible get shadow pages."""
    source = world.source
    tables, others = world.ways_of(vcpu)
    ways = [*tables, *others]
    return plan.Access("load8", _at(source, choose(source, ways)) if ways else 0x30000, vcpu=vcpu)


def _fetch(world: _World, vcpu: int) -> Step:
    """Jump to the code at the end of a page; only where the tables led to one at first."""
    source = world.source
    _, others = world.ways_of(vcpu)
    others = [way for way in others if way.level == 1 and way.gfn in DATA_PAGES[:12]]
    if not others:
        return _access(world, vcpu)
    return plan.Access("fetch", choose(source, others).linear + FETCH_OFFSET, vcpu=vcpu)


def _rewrite(world: _World, vcpu: int) -> Step:
    """Change an entry of some table, through whatever mapping of it."""
    source = world.source
    tables, _ = world.ways_of(vcpu)
    if not tables:
        return _access(world, vcpu)
    way = choose(source, _preferred(source, tables))
    frame, level = way.gfn, world.tables.levels[way.gfn]
    known = world.tables.entries[frame]
    index = choose(source, list(known)) if known and not chance(source, 15) else choose(source, (0, 1, 2, 9))
    old = known.get(index, 0)
    name, cpl = choose(source, _REWRITES), _level(world)
    if not cpl and SNIPPETS[name].lacking:
        cpl = 3
    if (frame, index) in world.tables.system:
        value, name = choose(source, (old, old & ~int(Pte.A), old | int(Pte.A))), "store8"
    else:
        value = _new_value(world, name, level, frame, old)
    world.recent = frame, index
    offset = 8 * index
    if name in {"store8", "xchg8", "movnti8", "push"} and (frame, index) not in world.tables.system:
        known[index] = value
        world.ways.clear()
        if chance(source, 6):
            offset = min(offset + choose(source, (4, 1, 2)), PAGE_SIZE - 8)
    elif SNIPPETS[name].size < 8 and chance(source, 40):
        offset += choose(source, (4, 1, 2, 6, 7))
    count = _count(world, cpl) if SNIPPETS[name].counted else 0
    second = _some_address(world, vcpu) if SNIPPETS[name].reads_second else 0
    if SNIPPETS[name].counted and (frame, 0) in world.tables.system:
        count = min(count, 1)
    return plan.Access(name, way.linear + offset, value, count, second, cpl, vcpu)


def _new_value(world: _World, name: str, level: int, frame: int, old: int) -> int:
    source = world.source
    if name.startswith(("or", "lock_or", "xor")):
        return int(choose(source, (Pte.A, Pte.RW, Pte.US, Pte.D, Pte.P, Pte.NX)))
    if name.startswith("and"):
        return ~int(choose(source, (Pte.A, Pte.RW, Pte.US, Pte.D, Pte.P))) & (1 << 64) - 1
    if name.startswith(("cmpxchg", "lock_cmpxchg")):
        return choose(source, (old, old ^ int(Pte.A), 0))
    if "add" in name:
        return choose(source, (0, PAGE_SIZE, 1, 0x20))
    kind = source.integer(0, 9)
    if kind < 4 and old:
        bit = choose(source, (Pte.A, Pte.RW, Pte.D, Pte.US, Pte.P, Pte.NX))
        return old ^ int(bit)
    if kind < 5:
        return old
    if kind < 6:
        return 0
    return random_entry(source, world.tables, level, frame)


def _controls(world: _World, vcpu: int) -> Step:
    source = world.source
    kind = source.integer(0, 9)
    if kind < 6:
        world.roots[vcpu] = choose(source, world.tables.roots)
        return plan.SetControls(vcpu, cr3=world.roots[vcpu] << 12)
    if kind < 8:
        return plan.SetControls(vcpu, cr0=CR0 ^ choose(source, (0, int(Cr0.WP))))
    if kind < 9:
        return plan.SetControls(vcpu, cr4=CR4 ^ choose(source, (int(Cr4.PGE), 0)))
    return plan.SetControls(vcpu, efer=EFER ^ choose(source, (int(Efer.NXE), 0)))


def _kernel(world: _World, vcpu: int) -> Step:
    """What only CPL 0 may."""
    source = world.source
    kind = source.integer(0, 9)
    if kind < 4:
        world.roots[vcpu] = choose(source, world.tables.roots)
        return plan.Access("load_cr3", 0, world.roots[vcpu] << 12, cpl=0, vcpu=vcpu)
    if kind < 5:
        return plan.Access("load_cr0", 0, CR0 ^ choose(source, (0, int(Cr0.WP))), cpl=0, vcpu=vcpu)
    if kind < 6:
        return plan.Access("load_cr4", 0, CR4 ^ choose(source, (int(Cr4.PGE), 0)), cpl=0, vcpu=vcpu)
    address = _some_address(world, vcpu)
    if kind < 8:
        return plan.Access("invlpg", address, cpl=0, vcpu=vcpu)
    name = choose(source, ("store_invlpg_load", "store_reload_cr3"))
    second = address if chance(source, 50) else _some_address(world, vcpu)
    return plan.Access(name, address, source.integer(0, 0xFF), 0, second, 0, vcpu)


def _harvest(world: _World) -> Step:
    source = world.source
    if world.tracker == "ring":
        return plan.Harvest()
    slot = choose(source, list(world.slots))
    if world.tracker.startswith("manual") and chance(source, 60):
        pages = world.slots[slot]
        marks = bytes([choose(source, (0xFF, 0x0F, 0xAA))]) * -(-pages // 8) if chance(source, 40) else None
        return plan.Clear(slot, 0, pages, marks)
    return plan.Collect(slot)


def _slot_step(world: _World) -> Step:
    source = world.source
    slot = choose(source, list(world.slots))
    log = choose(source, (SlotFlags.LOG_DIRTY_PAGES, SlotFlags.NONE))
    kind = source.integer(0, 9)
    if kind < 5:
        return plan.Logging(slot, bool(log))
    if kind < 8:
        world.other = _random_other(world, log)
        known = world.slots.get(_OTHER)
        if known is not None and chance(source, 60):
            return plan.DeleteSlot(_OTHER)
        world.slots[_OTHER] = world.other.size // PAGE_SIZE
        return plan.AddSlot(world.other)
    moving = choose(source, [each for each in world.slots if each not in {_SYSTEM, _TABLES}] or [_DATA])
    home = _HOMES[moving]
    return plan.MoveSlot(moving, choose(source, (home + 0x100000, home)))


def _host_write(world: _World) -> Step:
    """The host's own store, to data or to an entry: KVM sees nothing of it."""
    source = world.source
    if chance(source, 60):
        return plan.HostWrite(0, choose(source, DATA_PAGES[:12]) * PAGE_SIZE + 0x40, b"\x5a" * 8)
    frame = choose(source, list(world.tables.levels))
    places: Sequence[int] = [
        index for index in world.tables.entries[frame] if (frame, index) not in world.tables.system
    ]
    if not places:
        return plan.HostWrite(0, DATA_PAGES[0] * PAGE_SIZE, b"\x5a" * 8)
    value = random_entry(source, world.tables, world.tables.levels[frame], frame)
    return plan.HostWrite(0, frame * PAGE_SIZE + 8 * choose(source, places), value.to_bytes(8, "little"))
