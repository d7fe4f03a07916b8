"""A page walk in words: each level with its named bits, and the rule that decided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from pykvm.model.paging_format import (
    ADDRESS,
    PAE,
    Access,
    Control,
    Format,
    Level,
    Rule,
    format_of,
    page_address,
)
from pykvm.x86.bits import Cr0, Cr4, Efer, PageFault, Pte

Steps = Sequence[tuple[int, "int | None"]]

_WORDS: Final = {
    Rule.NO_PAGING: "CR0.PG = 0: linear addresses are physical ones (SDM vol. 3, 4.1.1)",
    Rule.PERMITTED: "every level permits the access (SDM vol. 3, 4.6.1)",
    Rule.NO_MEMORY: "the table lies where the guest has no memory, as if P were 0 (kvm-mmu.md 13.3)",
    Rule.NOT_PRESENT: "P = 0 (SDM vol. 3, 4.7)",
    Rule.RESERVED: "P = 1 with reserved bits set (SDM vol. 3, 4.7, RSVD)",
    Rule.SUPERVISOR_PAGE: "a user-mode access needs U/S = 1 at every level (SDM vol. 3, 4.6.1)",
    Rule.READ_ONLY: "a write needs R/W = 1 at every level, in supervisor mode where CR0.WP = 1 "
    "(SDM vol. 3, 4.6.1)",
    Rule.EXECUTE_DISABLE: "a fetch needs XD = 0 at every level (SDM vol. 3, 4.6.1)",
    Rule.SMEP: "CR4.SMEP keeps supervisor mode from fetching from a user-mode address (SDM vol. 3, 4.6.1)",
    Rule.SMAP: "CR4.SMAP keeps supervisor mode from the data of a user-mode address unless RFLAGS.AC = 1 "
    "and the access is explicit (SDM vol. 3, 4.6.1)",
    Rule.KEY: "the rights of the page's protection key deny the access (SDM vol. 3, 4.6.2)",
}
_BLAMED: Final = {
    Rule.SUPERVISOR_PAGE: lambda entry: not entry & Pte.US,
    Rule.READ_ONLY: lambda entry: not entry & Pte.RW,
    Rule.EXECUTE_DISABLE: lambda entry: bool(entry & Pte.NX),
}
_BITS: Final = (
    (Pte.P, "P"), (Pte.RW, "R/W"), (Pte.US, "U/S"), (Pte.PWT, "PWT"), (Pte.PCD, "PCD"), (Pte.A, "A"),
    (Pte.D, "D"), (Pte.PS, "PS"), (Pte.G, "G"), (Pte.NX, "XD"),
)  # fmt: skip
_CONTROLS: Final = (
    ("cr0", "CR0", ((Cr0.WP, "WP"),)),
    ("cr4", "CR4", ((Cr4.PSE, "PSE"), (Cr4.SMEP, "SMEP"), (Cr4.SMAP, "SMAP"))),
    ("efer", "EFER", ((Efer.NXE, "NXE"),)),
)  # fmt: skip


def explain(
    control: Control,
    linear: int,
    access: Access,
    steps: Steps,
    rule: Rule,
    error: int | None,
    gpa: int,
) -> str:
    """Several lines: the access and the control bits, the entries from the root, the outcome."""
    if rule is Rule.NO_PAGING:
        return f"{_access(access)} of {linear:#x}: {_WORDS[rule]}"
    paging = format_of(control)
    lines = [f"{_access(access)} of {linear:#x}, {paging.name}{_control(control)}"]
    lines += _entries(control, paging, linear, steps)
    outcome = f"gpa {gpa:#x}" if error is None else f"#PF, error code {error:#x} ({error_names(error)})"
    lines.append(f"  {outcome}: {_WORDS[rule]}{_blame(paging, steps, rule)}")
    return "\n".join(lines)


def error_names(error: int) -> str:
    """The set bits of a page-fault error code, "none" for 0."""
    return " ".join(str(bit.name) for bit in PageFault if error & bit) or "none"


def _access(access: Access) -> str:
    implicit = bool(access & Access.IMPLICIT)
    mode = "implicit supervisor" if implicit else "user" if access & Access.USER else "supervisor"
    return f"{mode} {'write' if access & Access.WRITE else 'fetch' if access & Access.FETCH else 'read'}"


def _control(control: Control) -> str:
    words = [
        f"{name}.{bit_name}"
        for field, name, bits in _CONTROLS
        for bit, bit_name in bits
        if getattr(control, field) & bit
    ]
    if control.ac:
        words.append("RFLAGS.AC")
    if control.cr4 & Cr4.PKE:
        words.append(f"PKRU={control.pkru:#x}")
    if control.cr4 & Cr4.PKS:
        words.append(f"PKRS={control.pkrs:#x}")
    return "".join(f", {word}" for word in (*words, f"MAXPHYADDR {control.physical_bits}"))


def _entries(control: Control, paging: Format, linear: int, steps: Steps) -> Iterator[str]:
    if paging.name is PAE:
        number = linear >> 30 & 3
        entry = control.pdptrs[number]
        yield f"  PDPTE register {number}: {entry:#018x} {'P' if entry & Pte.P else 'P=0'}"
    for level, (at, value) in zip(paging.levels, steps, strict=False):
        what = "no memory" if value is None else _entry(control, paging, level, value)
        yield f"  {level.name:5} at {at:#x}: {what}"


def _entry(control: Control, paging: Format, level: Level, entry: int) -> str:
    size = paging.entry
    names = [name for bit, name in _BITS if entry & bit]
    if not entry & Pte.P:
        names.insert(0, "P=0")
    is_page = bool(entry & level.page)
    if is_page and control.cr4 & (Cr4.PKE | Cr4.PKS) and size == 8:
        names.append(f"key {entry >> 59 & 15}")
    reserved = entry & (level.page_reserved if is_page else level.table_reserved)
    if entry & Pte.P and reserved:
        names.append(f"reserved {reserved:#x}")
    text = f"{entry:#0{2 + 2 * size}x} {' '.join(names)}"
    if not entry & Pte.P:
        return text
    if is_page:
        return f"{text} -> page {page_address(paging, level, entry):#x}"
    return f"{text} -> table {entry & ADDRESS:#x}"


def _blame(paging: Format, steps: Steps, rule: Rule) -> str:
    test = _BLAMED.get(rule)
    if test is None:
        return ""
    names = [
        level.name
        for level, (_, entry) in zip(paging.levels, steps, strict=False)
        if entry is not None and test(entry)
    ]
    return f"; denied by {', '.join(names)}"
