"""The page walk against the rules and tables of the SDM, written down here a second time in its own order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import NamedTuple

import pytest

from pykvm.model.paging import Access, Control, Rule, Update, Walk, read_pdptes, walk

P, RW, US, A, D, PS, XD = (1 << bit for bit in (0, 1, 2, 5, 6, 7, 63))
PG, WP = 1 << 31, 1 << 16
PSE, PAE, LA57, SMEP, SMAP, PKE, PKS = (1 << bit for bit in (4, 5, 12, 20, 21, 22, 24))
LMA, NXE = 1 << 10, 1 << 11
TABLE = P | RW | US | A
LEAF = TABLE | D
READ, WRITE, FETCH, USER, IMPLICIT = (
    Access.READ,
    Access.WRITE,
    Access.FETCH,
    Access.USER,
    Access.IMPLICIT,
)


class Mode(NamedTuple):
    """The bits that switch a mode on, bytes of an entry, index bits; levels with their lowest linear bit."""

    cr4: int
    efer: int
    entry: int
    index: int
    levels: tuple[tuple[str, int], ...]


LOW = (("PDE", 21), ("PTE", 12))
MODES = {
    "32": Mode(PSE, 0, 4, 10, (("PDE", 22), ("PTE", 12))),
    "PAE": Mode(PAE, NXE, 8, 9, LOW),
    "4": Mode(PAE, LMA | NXE, 8, 9, (("PML4E", 39), ("PDPTE", 30), *LOW)),
    "5": Mode(PAE | LA57, LMA | NXE, 8, 9, (("PML5E", 48), ("PML4E", 39), ("PDPTE", 30), *LOW)),
}
LINEAR = 0x0000_1234_5678_9ABC


def reader(memory: Mapping[int, int]) -> Callable[[int, int], int | None]:
    return lambda gpa, size: memory.get(gpa)


class Tables:
    """One path of tables for ``linear``: table n at (n + 2) pages, the leaf pointing to ``frame``."""

    def __init__(self, mode: str, linear: int, depth: int | None = None, frame: int = 0x4000_0000) -> None:
        self.mode = MODES[mode]
        self.name = mode
        self.linear = linear
        levels = self.mode.levels[: depth or len(self.mode.levels)]
        self.at = [
            (number + 2 << 12) + (linear >> shift & (1 << self.mode.index) - 1) * self.mode.entry
            for number, (_, shift) in enumerate(levels)
        ]
        self.memory = {at: number + 3 << 12 | TABLE for number, at in enumerate(self.at)}
        large = PS if len(levels) < len(self.mode.levels) else 0
        self.memory[self.at[-1]] = frame | LEAF | large

    def control(self, **fields: object) -> Control:
        usual = {
            "cr0": PG | WP,
            "cr3": 0x2000,
            "cr4": self.mode.cr4,
            "efer": self.mode.efer,
            "pdptrs": (0x2001, 0x2001, 0x2001, 0x2001) if self.name == "PAE" else (0, 0, 0, 0),
        }
        return Control(**(usual | fields))  # type: ignore[arg-type]

    def walk(self, access: Access = READ, **fields: object) -> Walk:
        return walk(self._read, self.control(**fields), self.linear, access)

    def _read(self, gpa: int, size: int) -> int | None:
        assert size == self.mode.entry
        return self.memory.get(gpa)


# --- addresses -----------------------------------------------------------------------------------------


def test_without_paging_linear_addresses_are_physical() -> None:
    result = walk(reader({}), Control(cr0=0, cr3=0, cr4=0, efer=0), 0x1_2345_6789, WRITE)
    assert (result.gpa, result.error, result.updates) == (0x2345_6789, None, ())


@pytest.mark.parametrize(
    ("mode", "depth", "linear", "offset"),
    [
        ("32", 2, 0x1234_5678, 12),
        ("32", 1, 0x1234_5678, 22),
        ("PAE", 2, 0xFEDC_BA98, 12),
        ("PAE", 1, 0xFEDC_BA98, 21),
        ("4", 4, LINEAR, 12),
        ("4", 3, LINEAR, 21),
        ("4", 2, LINEAR, 30),
        ("4", 4, LINEAR | 0xFFFF_8000_0000_0000, 12),
        ("5", 5, 0x00FE_DCBA_9876_5432, 12),
        ("5", 4, 0x00FE_DCBA_9876_5432, 21),
        ("5", 3, 0xFFFE_DCBA_9876_5432, 30),
    ],
)
def test_each_page_size_of_each_mode(mode: str, depth: int, linear: int, offset: int) -> None:
    frame = 0xC000_0000
    result = Tables(mode, linear, depth, frame).walk()
    assert result.error is None
    assert result.gpa == frame | linear & (1 << offset) - 1


def test_pse_36_addresses_come_from_bits_20_to_13() -> None:
    """SDM vol. 3, table 4-4: bits 39:32 of the address are bits 20:13 of the entry."""
    tables = Tables("32", 0x0080_1234, 1, 0x00C0_0000 | 0xA5 << 13)
    assert tables.walk(physical_bits=40).gpa == 0xA5_00C0_1234


def test_high_addresses_within_the_physical_width() -> None:
    tables = Tables("4", LINEAR, frame=0x000F_FFFF_FFFF_F000)
    assert tables.walk(physical_bits=52).gpa == 0x000F_FFFF_FFFF_FABC
    assert tables.walk(physical_bits=51).error == 9


def test_only_address_bits_of_cr3_count() -> None:
    tables = Tables("4", LINEAR)
    assert tables.walk(cr3=0x2FFF | 1 << 63).error is None  # PCID, and the bit that asks for no flush
    pae = Tables("PAE", 0)
    assert pae.walk(cr3=0xDEAD_BEEF).error is None  # PAE walks start at the registers


def test_large_pages_of_32_bit_mode_need_pse() -> None:
    tables = Tables("32", 0x0080_1234)
    tables.memory[tables.at[0]] |= PS
    assert tables.walk(cr4=0).gpa == 0x4000_0234
    assert tables.walk().gpa == 0x1_0000_1234  # the table's address, 0x3000, read as that of a 4-MByte page


def test_pae_takes_the_register_that_bits_31_and_30_choose() -> None:
    for number in range(4):
        tables = Tables("PAE", number << 30)
        registers = [0x2000] * 4
        registers[number] |= P
        assert tables.walk(pdptrs=tuple(registers)).error is None
        registers = [0x2001] * 4
        registers[number] &= ~P
        result = tables.walk(WRITE | USER, pdptrs=tuple(registers))
        assert (result.error, result.steps) == (6, ())


# --- reserved bits (SDM vol. 3, tables 4-4 to 4-20) -----------------------------------------------------


def bits(*parts: int | tuple[int, int]) -> set[int]:
    """From single bits and (high, low) pairs."""
    spans = [part if isinstance(part, tuple) else (part, part) for part in parts]
    return {bit for high, low in spans for bit in range(low, high + 1)}


RESERVED: list[tuple[str, int, str, dict[str, object], set[int]]] = [
    # mode, number of tables, level, control, reserved bits
    ("32", 2, "PDE", {}, bits()),
    ("32", 2, "PTE", {}, bits()),
    ("32", 1, "PDE", {"physical_bits": 40}, bits(21)),
    ("32", 1, "PDE", {"physical_bits": 46}, bits(21)),
    ("32", 1, "PDE", {"physical_bits": 36}, bits((21, 17))),
    ("32", 1, "PDE", {"physical_bits": 32}, bits((21, 13))),
    ("32", 1, "PDE", {"physical_bits": 46, "pse36": False}, bits((21, 13))),
    ("PAE", 2, "PDE", {"physical_bits": 46}, bits((62, 46))),
    ("PAE", 2, "PTE", {"physical_bits": 46}, bits((62, 46))),
    ("PAE", 2, "PTE", {"physical_bits": 36, "efer": 0}, bits((63, 36))),
    ("PAE", 1, "PDE", {"physical_bits": 36}, bits((62, 36), (20, 13))),
    ("PAE", 1, "PDE", {"physical_bits": 52, "efer": 0}, bits((63, 52), (20, 13))),
    ("4", 4, "PML4E", {"physical_bits": 46}, bits((51, 46), 7)),
    ("4", 4, "PML4E", {"physical_bits": 46, "amd": True}, bits((51, 46), 8, 7)),
    ("4", 4, "PML4E", {"physical_bits": 46, "efer": LMA}, bits(63, (51, 46), 7)),
    ("4", 4, "PDPTE", {"physical_bits": 46, "pages_1g": False}, bits((51, 46), 7)),
    ("4", 4, "PDPTE", {"physical_bits": 40, "amd": True, "pages_1g": False}, bits((51, 40), 7)),
    ("4", 2, "PDPTE", {"physical_bits": 46}, bits((51, 46), (29, 13))),
    ("4", 2, "PDPTE", {"physical_bits": 46, "efer": LMA}, bits(63, (51, 46), (29, 13))),
    ("4", 4, "PDE", {"physical_bits": 46, "amd": True}, bits((51, 46))),
    ("4", 3, "PDE", {"physical_bits": 46}, bits((51, 46), (20, 13))),
    ("4", 4, "PTE", {"physical_bits": 46, "amd": True}, bits((51, 46))),
    ("4", 4, "PTE", {"physical_bits": 52}, bits()),
    ("4", 4, "PTE", {"physical_bits": 52, "efer": LMA}, bits(63)),
    ("5", 5, "PML5E", {"physical_bits": 52}, bits(7)),
    ("5", 5, "PML5E", {"physical_bits": 46, "amd": True}, bits((51, 46), 8, 7)),
    ("5", 5, "PML4E", {"physical_bits": 46}, bits((51, 46), 7)),
    ("5", 5, "PTE", {"physical_bits": 46, "efer": LMA}, bits(63, (51, 46))),
]


@pytest.mark.parametrize(("mode", "depth", "level", "fields", "reserved"), RESERVED)
def test_reserved_bits_are_exactly_the_documented_ones(
    mode: str, depth: int, level: str, fields: dict[str, object], reserved: set[int]
) -> None:
    """Each bit in turn.  One that is not reserved may lead elsewhere, never to a reserved-bit fault here."""
    tables = Tables(mode, 0x1234_5678, depth)
    number = [name for name, _ in MODES[mode].levels].index(level)
    entry = tables.memory[tables.at[number]]
    found = set()
    for bit in range(8 * MODES[mode].entry):
        if bit == 7 and 7 not in reserved:
            continue  # the kind of entry, see the next test
        memory = tables.memory | {tables.at[number]: entry | 1 << bit}
        result = walk(reader(memory), tables.control(**fields), tables.linear, READ)
        if result.error == 9 and len(result.steps) == number + 1:
            found.add(bit)
    assert found == reserved


@pytest.mark.parametrize(
    ("mode", "number", "pages_1g", "error"),
    [
        ("4", 1, True, None),
        ("4", 1, False, 9),
        ("4", 2, True, None),
        ("4", 3, True, None),  # PAT
        ("4", 0, True, 9),
        ("5", 0, True, 9),
        ("PAE", 0, True, None),
    ],
)
def test_ps_is_reserved_where_there_is_no_such_page(
    mode: str, number: int, pages_1g: bool, error: int | None
) -> None:
    tables = Tables(mode, 0x1234_5678, frame=0x4000_0000)
    tables.memory[tables.at[number]] = 0x4000_0000 | TABLE | PS
    assert tables.walk(pages_1g=pages_1g).error == error


def test_absent_entries_may_have_any_other_bit() -> None:
    tables = Tables("4", LINEAR)
    for number, at in enumerate(tables.at):
        memory = tables.memory | {at: ~P & (1 << 64) - 1}
        result = walk(reader(memory), tables.control(physical_bits=36), LINEAR, USER | FETCH)
        assert (result.error, len(result.steps), result.rule) == (4 | 16, number + 1, Rule.NOT_PRESENT)


def test_tables_without_memory_count_as_absent() -> None:
    result = walk(reader({}), Tables("4", LINEAR).control(), LINEAR, WRITE)
    assert (result.error, result.rule) == (2, Rule.NO_MEMORY)


def test_an_upper_level_hides_what_is_below() -> None:
    """SDM vol. 3, 4.7: the walk ends at the first entry that is absent or has reserved bits."""
    tables = Tables("4", LINEAR)
    tables.memory[tables.at[1]] |= 1 << 51
    tables.memory[tables.at[2]] &= ~P
    assert tables.walk(USER).error == 13
    tables.memory[tables.at[0]] &= ~(P | US)
    assert tables.walk(USER).error == 4


# --- PDPTE registers (SDM vol. 3, 4.4.1, table 4-8) ----------------------------------------------------


@pytest.mark.parametrize("physical_bits", [36, 46, 52])
def test_pdptes_with_reserved_bits_are_refused_only_when_present(physical_bits: int) -> None:
    reserved = bits((2, 1), (8, 5), (63, physical_bits))
    for bit in range(1, 64):
        values = {0x1020 + 8 * number: 0x5001 for number in range(4)} | {0x1030: 1 | 1 << bit}
        loaded = read_pdptes(reader(values), 0x103F, physical_bits)
        assert loaded == (None if bit in reserved else (0x5001, 0x5001, 1 | 1 << bit, 0x5001))
        values[0x1030] &= ~P
        assert read_pdptes(reader(values), 0x103F, physical_bits) == (0x5001, 0x5001, 1 << bit, 0x5001)


def test_pdptes_without_memory_are_absent() -> None:
    assert read_pdptes(reader({}), 0x1000, 46) == (0, 0, 0, 0)


# --- access rights (SDM vol. 3, 4.6.1 and 4.6.2) and error codes (4.7) ---------------------------------


class Situation(NamedTuple):
    """What SDM 4.6 speaks about: the address (all levels together), the access, the controls."""

    user_address: bool
    every_rw: bool
    some_xd: bool
    kind: str
    user: bool
    implicit: bool
    wp: bool
    nxe: bool
    smep: bool
    smap: bool
    ac: bool
    pke: bool
    pks: bool
    pkru: int
    pkrs: int


def key_permits(s: Situation) -> bool:
    """SDM 4.6.2; rights are bit 0 access-disable, bit 1 write-disable."""
    if s.user_address:
        if not s.pke:
            return True
        if s.pkru & 1:
            return False
        return not (s.pkru & 2 and s.kind == "write" and (s.user or s.wp))
    if not s.pks:
        return True
    if s.pkrs & 1:
        return False
    return not (s.pkrs & 2 and s.kind == "write" and s.wp)


def permitted(s: Situation) -> bool:
    """SDM 4.6.1, bullet for bullet."""
    if s.user:
        if s.kind == "read":
            return s.user_address and key_permits(s)
        if s.kind == "write":
            return s.user_address and s.every_rw and key_permits(s)
        return s.user_address and not (s.nxe and s.some_xd)
    if s.kind == "fetch":
        if s.user_address and s.smep:
            return False
        return not (s.nxe and s.some_xd)
    if s.user_address and s.smap and (not s.ac or s.implicit):
        return False
    if s.kind == "read":
        return key_permits(s)
    return key_permits(s) and (s.every_rw or not s.wp)


def violation(s: Situation) -> int:
    """SDM 4.7: the error code of a walk that got through to the page and may not use it."""
    code = 1
    code |= 2 if s.kind == "write" else 0
    code |= 4 if s.user else 0
    code |= 16 if s.kind == "fetch" and (s.smep or s.nxe) else 0
    code |= 32 if s.kind != "fetch" and not key_permits(s) else 0
    return code


def reserved_violation(s: Situation) -> int:
    """SDM 4.7: XD is reserved while EFER.NXE = 0."""
    code = 9
    code |= 2 if s.kind == "write" else 0
    code |= 4 if s.user else 0
    code |= 16 if s.kind == "fetch" and s.smep else 0
    return code


KINDS = {"read": READ, "write": WRITE, "fetch": FETCH}
WHO = [(True, False), (False, False), (False, True)]
NO_KEYS = [(False, False, 3, 3)]
ALL_KEYS = [
    *((True, False, rights, 3) for rights in range(4)),
    *((False, True, 3, rights) for rights in range(4)),
    *((True, True, pkru, pkrs) for pkru, pkrs in product(range(4), repeat=2)),
]
RIGHTS = [rw | us | xd for rw, us, xd in product((0, RW), (0, US), (0, XD))]


def situations(keys: list[tuple[bool, bool, int, int]]) -> Iterator[tuple[Situation, int, int]]:
    """All of them, with the rights of an upper entry and of the leaf that make up the address's."""
    for upper, leaf, key in product(RIGHTS, RIGHTS, keys):
        for kind, (user, implicit), *switches in product(KINDS, WHO, *[(False, True)] * 5):
            both, either = upper & leaf, upper | leaf
            address = bool(both & US), bool(both & RW), bool(either & XD)
            yield Situation(*address, kind, user, implicit, *switches, *key), upper, leaf


def check_rights(mode: str, depth: int, keys: list[tuple[bool, bool, int, int]], key: int = 0) -> int:
    """Walk every situation in a mode; how many there were.  ``key`` is the page's protection key."""
    tables = Tables(mode, 0x1234_5678, depth)
    upper_at, leaf_at = tables.at[0], tables.at[-1]
    if depth == 1:
        upper_at = 0  # the leaf is the only entry
    memory = dict(tables.memory)
    upper_base = memory.get(upper_at, 0) & ~(RW | US)
    leaf_base = memory[leaf_at] & ~(RW | US) | key << 59
    others = 0xFFFFFFFF & ~(3 << 2 * key)  # deny everything, so that taking another key would show
    count = 0
    for s, upper, leaf in situations(keys):
        if (depth == 1 and upper != RW | US) or (mode == "32" and (s.nxe or s.some_xd)):
            continue
        memory[upper_at], memory[leaf_at] = upper_base | upper, leaf_base | leaf
        cr4 = (s.smep and SMEP) | (s.smap and SMAP) | (s.pke and PKE) | (s.pks and PKS)
        control = tables.control(
            cr0=PG | (s.wp and WP),
            cr4=MODES[mode].cr4 | cr4,
            efer=MODES[mode].efer & LMA | (s.nxe and NXE),
            ac=s.ac,
            pkru=others | s.pkru << 2 * key,
            pkrs=others | s.pkrs << 2 * key,
        )
        access = KINDS[s.kind] | (USER if s.user else IMPLICIT if s.implicit else Access(0))
        result = walk(reader(memory), control, tables.linear, access)
        if s.some_xd and not s.nxe:
            expected: int | None = reserved_violation(s)
        else:
            expected = None if permitted(s) else violation(s)
        assert result.error == expected, f"{s}\n{result}"
        assert (result.error is None) == (result.rule is Rule.PERMITTED)
        count += 1
    return count


@pytest.mark.parametrize(("mode", "depth"), [("PAE", 2), ("PAE", 1), ("4", 4), ("4", 3), ("4", 2), ("5", 5)])
def test_access_rights_in_every_situation(mode: str, depth: int) -> None:
    """64 pairs of entries (8 leaves where there is one level), 5 switches, 9 kinds of access."""
    assert check_rights(mode, depth, NO_KEYS) == (8 if depth == 1 else 64) * 32 * 9


@pytest.mark.parametrize("depth", [1, 2])
def test_access_rights_in_32_bit_mode(depth: int) -> None:
    """No XD there."""
    assert check_rights("32", depth, NO_KEYS) == (4 if depth == 1 else 16) * 16 * 9


def test_protection_keys_in_every_situation() -> None:
    assert check_rights("4", 4, ALL_KEYS, key=9) == 64 * 32 * 9 * 24


def test_protection_keys_of_large_pages_and_five_levels() -> None:
    some = [(True, True, 1, 2), (True, True, 2, 1), (True, False, 0, 3)]
    for mode, depth in [("4", 2), ("4", 3), ("5", 5)]:
        assert check_rights(mode, depth, some, key=15) == 64 * 32 * 9 * 3


def test_keys_exist_in_4_and_5_level_paging_only() -> None:
    """SDM vol. 3, 4.6.2: elsewhere CR4.PKE is ignored (and bits 62:59 are reserved in PAE)."""
    for mode in ("32", "PAE"):
        assert Tables(mode, 0x1234_5678).walk(USER, cr4=MODES[mode].cr4 | PKE, pkru=3).error is None


def test_user_mode_does_not_make_an_implicit_access_a_user_access() -> None:
    tables = Tables("4", LINEAR)
    tables.memory[tables.at[3]] &= ~US
    assert tables.walk(USER | IMPLICIT).error is None
    tables.memory[tables.at[3]] &= ~P
    assert tables.walk(USER | IMPLICIT | WRITE).error == 2


def test_fetches_are_told_from_reads_only_where_the_processor_could_forbid_them() -> None:
    """SDM vol. 3, 4.7, I/D: CR4.SMEP, or CR4.PAE and EFER.NXE together."""
    for mode, cr4, efer, code in [
        ("32", PSE, NXE, 0),
        ("32", PSE | SMEP, 0, 16),
        ("PAE", PAE, 0, 0),
        ("PAE", PAE, NXE, 16),
        ("4", PAE, LMA, 0),
        ("4", PAE, LMA | NXE, 16),
        ("4", PAE | SMEP, LMA, 16),
    ]:
        tables = Tables(mode, 0x1234_5678)
        tables.memory.clear()
        assert tables.walk(FETCH, cr4=cr4, efer=efer).error == code, (mode, cr4, efer)


# --- accessed and dirty flags (SDM vol. 3, 4.8; docs/reference/kvm-mmu.md 13.3) ------------------------


@pytest.mark.parametrize(
    ("mode", "depth"),
    [("32", 1), ("32", 2), ("PAE", 1), ("PAE", 2), ("4", 2), ("4", 3), ("4", 4), ("5", 5)],
)
def test_accessed_and_dirty_flags_from_the_root_to_the_leaf(mode: str, depth: int) -> None:
    """Every combination of flags already set; A in all entries, D in the leaf of a write, one update each."""
    tables = Tables(mode, 0x1234_5678, depth)
    before = dict(tables.memory)
    for flags in product((0, A, D, A | D), repeat=depth):
        for at, flag in zip(tables.at, flags, strict=True):
            tables.memory[at] = before[at] & ~(A | D) | flag
        for access in (READ, WRITE, FETCH, USER | WRITE, IMPLICIT):
            expected = []
            for at in tables.at:
                old = tables.memory[at]
                new = old | A | (D if access & WRITE and at == tables.at[-1] else 0)
                if new != old:
                    expected.append(Update(at, MODES[mode].entry, old, new))
            assert tables.walk(access).updates == tuple(expected)


def test_a_walk_that_faults_sets_no_flag() -> None:
    tables = Tables("4", LINEAR)
    for at in tables.at:
        tables.memory[at] &= ~(A | D)
    assert len(tables.walk(WRITE).updates) == 4
    for number, change in [(3, P), (3, RW), (3, US), (0, US), (2, P)]:
        memory = tables.memory | {tables.at[number]: tables.memory[tables.at[number]] & ~change}
        result = walk(reader(memory), tables.control(), LINEAR, USER | WRITE)
        assert result.error is not None
        assert result.updates == ()


# --- the explanation -----------------------------------------------------------------------------------


def test_a_walk_prints_its_entries_and_its_rule() -> None:
    tables = Tables("4", LINEAR)
    tables.memory[tables.at[1]] &= ~RW
    tables.memory[tables.at[3]] |= XD | 5 << 59
    assert str(tables.walk(USER | WRITE, cr4=PAE | PKE | SMAP, pkru=0xC, ac=True)).splitlines() == [
        "user write of 0x123456789abc, 4-level paging, CR0.WP, CR4.SMAP, EFER.NXE, RFLAGS.AC, PKRU=0xc, "
        "MAXPHYADDR 46",
        "  PML4E at 0x2120: 0x0000000000003027 P R/W U/S A -> table 0x3000",
        "  PDPTE at 0x3688: 0x0000000000004025 P U/S A -> table 0x4000",
        "  PDE   at 0x4598: 0x0000000000005027 P R/W U/S A -> table 0x5000",
        "  PTE   at 0x5c48: 0xa800000040000067 P R/W U/S A D XD key 5 -> page 0x40000000",
        "  #PF, error code 0x7 (P WR US): a write needs R/W = 1 at every level, in supervisor mode where "
        "CR0.WP = 1 (SDM vol. 3, 4.6.1); denied by PDPTE",
    ]


def test_every_outcome_has_words() -> None:
    """A walk that ends by each of the rules names it, and what it shows of the entries is what decided."""
    tables = Tables("4", LINEAR)
    leaf = tables.at[3]
    entry = tables.memory[leaf]
    outcomes = [
        (entry, READ, {}, Rule.PERMITTED, "gpa 0x40000abc"),
        (entry, READ, {"cr0": WP}, Rule.NO_PAGING, "CR0.PG = 0"),
        (entry & ~P, READ, {}, Rule.NOT_PRESENT, "P=0"),
        (entry | 1 << 50, READ, {}, Rule.RESERVED, "reserved 0x4000000000000"),
        (entry & ~US, USER, {}, Rule.SUPERVISOR_PAGE, "denied by PTE"),
        (entry & ~RW, WRITE, {}, Rule.READ_ONLY, "denied by PTE"),
        (entry | XD, FETCH, {}, Rule.EXECUTE_DISABLE, "denied by PTE"),
        (entry, FETCH, {"cr4": PAE | SMEP}, Rule.SMEP, "CR4.SMEP keeps"),
        (entry, IMPLICIT, {"cr4": PAE | SMAP, "ac": True}, Rule.SMAP, "CR4.SMAP keeps"),
        (entry, READ, {"cr4": PAE | PKE, "pkru": 1}, Rule.KEY, "(P PK): the rights of the page's"),
        (entry, READ, {"cr3": 0x9000}, Rule.NO_MEMORY, "no memory"),
    ]
    for value, access, fields, rule, words in outcomes:
        tables.memory[leaf] = value
        result = tables.walk(access, **fields)  # type: ignore[arg-type]
        assert result.rule is rule
        assert words in str(result)
    assert {rule for *_, rule, _ in outcomes} == set(Rule)


def test_an_explanation_of_pae_starts_with_the_register() -> None:
    text = str(Tables("PAE", 0x1234_5678, 1).walk())
    assert "  PDPTE register 0: 0x0000000000002001 P\n  PDE   at 0x2488: 0x00000000400000e7 P R/W" in text
