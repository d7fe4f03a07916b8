"""The reference machine's page walk applied to the cases of the page-table product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pykvm.crosscheck.paging_cases import Kind, PagingCase
from pykvm.crosscheck.paging_guest import FRAMES, TABLES
from pykvm.model.cpu.features import Features
from pykvm.model.paging import Access, Control, ReadEntry, Walk, read_pdptes, walk
from pykvm.x86.cpuid import CpuidEntry

_ACCESSES = {
    Kind.READ: (Access.READ,),
    Kind.WRITE: (Access.WRITE,),
    Kind.EXCHANGE: (Access.WRITE,),
    Kind.FETCH: (Access.FETCH,),
    Kind.LOAD_SEGMENT: (Access.IMPLICIT,),
    Kind.MARK_SEGMENT: (Access.IMPLICIT, Access.IMPLICIT | Access.WRITE),
}


def walks(case: PagingCase, cpuid: Sequence[CpuidEntry]) -> list[Walk]:
    """The walks of the case's instruction for its target, up to the first that faults.

    Tables and page lie where a machine's first case has them.
    """
    features = Features.of(cpuid)
    memory = dict(case.entries(TABLES, FRAMES[case.shape.page_shift], features.physical_bits))
    pae = case.shape.levels == 3
    registers = read_pdptes(_reader(memory), TABLES, features.physical_bits) if pae else None
    control = Control(
        cr0=case.cr0,
        cr3=TABLES,
        cr4=case.cr4,
        efer=case.efer,
        ac=case.control.ac,
        pkru=case.pkru,
        pdptrs=registers or (0, 0, 0, 0),
        physical_bits=features.physical_bits,
        pages_1g=features.pages_1g,
        pse36=features.pse36,
        amd=features.amd,
    )
    user = Access.USER if case.cpl == 3 else Access(0)
    made = []
    for access in _ACCESSES[case.kind]:
        made.append(walk(_reader(memory), control, case.linear, access | user))
        if made[-1].error is not None:
            break
        memory.update((update.gpa, update.new) for update in made[-1].updates)
    return made


def _reader(memory: Mapping[int, int]) -> ReadEntry:
    return lambda gpa, size: memory.get(gpa)


def explain(case: PagingCase, cpuid: Sequence[CpuidEntry]) -> str:
    """The walks in words."""
    return "\n".join(str(each) for each in walks(case, cpuid))
