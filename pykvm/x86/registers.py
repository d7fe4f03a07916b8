"""Register files as plain values.

Fields are unsigned integers of the architectural width.  Reading a vCPU gives such a value, changing a
field changes nothing until the value is written back.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

GENERAL = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip


@dataclass(slots=True)
class Registers:
    """General-purpose registers, RIP and RFLAGS; bit 1 of RFLAGS always reads as one (SDM vol. 1, 3.4.3)."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2

    def __str__(self) -> str:
        rows = [f"{name}={getattr(self, name):016x}" for name in (*GENERAL, "rip", "rflags")]
        return "\n".join(" ".join(rows[i : i + 4]) for i in range(0, len(rows), 4))


@dataclass(slots=True)
class Segment:
    """A segment register with its hidden part (SDM vol. 3, 3.4.3 and 3.4.5).

    ``limit`` is in bytes after applying G; ``type`` is the four-bit type field; ``s`` is 1 for code and
    data; ``unusable`` marks a null selector's hidden part (SDM vol. 3, 24.4.1).
    """

    base: int = 0
    limit: int = 0xFFFF
    selector: int = 0
    type: int = 3
    present: int = 1
    dpl: int = 0
    db: int = 0
    s: int = 1
    l: int = 0  # noqa: E741 - the SDM's name
    g: int = 0
    avl: int = 0
    unusable: int = 0

    def copy(self) -> Segment:
        """Another one like it: every look at a vCPU's registers makes eight."""
        return Segment(
            self.base, self.limit, self.selector, self.type, self.present, self.dpl, self.db, self.s,
            self.l, self.g, self.avl, self.unusable,
        )  # fmt: skip


@dataclass(slots=True)
class DescriptorTable:
    """GDTR or IDTR: linear base and limit (last valid byte offset)."""

    base: int = 0
    limit: int = 0xFFFF


def _code() -> Segment:
    return Segment(base=0xFFFF0000, selector=0xF000, type=0xB)


def _system(type_: int) -> Segment:
    return Segment(type=type_, s=0)


@dataclass(slots=True)
class SpecialRegisters:
    """Segments, descriptor tables, control registers; the defaults are those after RESET.

    SDM vol. 3, 10.1.1.  ``pdptrs`` holds the four PAE PDPTE registers, or None where they are not valid
    (KVM_GET_SREGS2).
    ``interrupt`` is the vector of an external interrupt that is queued but not yet delivered, or None.
    """

    cs: Segment = field(default_factory=_code)
    ds: Segment = field(default_factory=Segment)
    es: Segment = field(default_factory=Segment)
    fs: Segment = field(default_factory=Segment)
    gs: Segment = field(default_factory=Segment)
    ss: Segment = field(default_factory=Segment)
    tr: Segment = field(default_factory=lambda: _system(0xB))
    ldt: Segment = field(default_factory=lambda: _system(2))
    gdt: DescriptorTable = field(default_factory=DescriptorTable)
    idt: DescriptorTable = field(default_factory=DescriptorTable)
    cr0: int = 0x60000010
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0
    apic_base: int = 0xFEE00900
    interrupt: int | None = None
    pdptrs: tuple[int, int, int, int] | None = None


SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
SEGMENT_FIELDS = tuple(f.name for f in fields(Segment))
