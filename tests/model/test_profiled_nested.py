"""Instructions on hosts with nested paging, whole: emulators' deviations, the exit's address, triple faults.

Expected values: random scenarios in labs (AMD NPT with 6.1, 6.12 and 7.2 under QEMU), the manual's rules for
hardware, docs/reference/kvm-mmu.md 12.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pykvm.machine import MmioRead, MmioWrite, Registers, Shutdown
from pykvm.machine.exits import Exit
from pykvm.model.system import ModelSystem
from pykvm.profiles import Execution, profile
from pykvm.x86.registers import DescriptorTable
from tests.mmu_rig import CODE, DATA, DATA_PT, Host, Rig

_INC, _CLFLUSH, _MOV_CR4, _CMPXCHG16B = b"\x48\xff\x07", b"\x0f\xae\x3f", b"\x0f\x22\xe0", b"\x48\x0f\xc7\x0f"
_HOLE = 0x9000


@contextmanager
def _rig(
    execution: Execution = Execution.HARDWARE,
    name: str = "amd-npt 6.12",
    entries: dict[tuple[int, int], int] | None = None,
) -> Iterator[Rig]:
    wanted = profile(*name.split(), execution=execution)
    with ModelSystem(profile=wanted) as system, Rig(Host(system, wanted), ring=1024, entries=entries) as rig:
        rig.run(b"")
        yield rig


def _run(rig: Rig, code: bytes, **registers: int) -> Exit:
    """A KVM_RUN whose exit may be any."""
    at = CODE * 4096 + 0xF00
    rig.memory.write(at, code)
    rig.vcpu.set_registers(Registers(rip=at, rflags=0x3002, **registers))
    exit_: Exit = rig.vcpu.run()
    return exit_


@pytest.mark.parametrize(("execution", "error"), [(Execution.HARDWARE, 7), (Execution.TCG, 5)])
def test_an_update_of_a_supervisor_page(execution: Execution, error: int) -> None:
    with _rig(execution, entries={(DATA_PT, 5): DATA + 5 << 12 | 0x23}) as rig:
        assert rig.run(_INC, rdi=DATA + 5 << 12).fault == (14, error)


@pytest.mark.parametrize(("execution", "fault"), [(Execution.HARDWARE, (14, 4)), (Execution.TCG, None)])
def test_clflush_of_an_absent_page(execution: Execution, fault: tuple[int, int] | None) -> None:
    with _rig(execution, entries={(DATA_PT, 5): 0}) as rig:
        assert rig.run(_CLFLUSH, rdi=DATA + 5 << 12).fault == fault


@pytest.mark.parametrize(("execution", "decodes"), [(Execution.HARDWARE, 0), (Execution.TCG, 1)])
def test_svm_without_decode_assists_emulates_mov_to_cr4(execution: Execution, decodes: int) -> None:
    with _rig(execution) as rig:
        seen = rig.at_cpl0(_MOV_CR4, rax=0x6A0)
        assert seen.other.get("insn_emulation", 0) == decodes


@pytest.mark.parametrize(("execution", "flags"), [(Execution.HARDWARE, 0x60), (Execution.TCG, 0x20)])
def test_the_emulator_walks_no_tables_for_the_operand_that_faulted(execution: Execution, flags: int) -> None:
    """QEMU's processor read first, so D would be the emulator's to set."""
    with _rig(execution, entries={(DATA_PT, 5): _HOLE << 12 | 7}) as rig:
        assert isinstance(_run(rig, _INC, rdi=DATA + 5 << 12), MmioRead)
        assert isinstance(rig.vcpu.run(), MmioWrite)
        assert rig.leaf(DATA + 5) & 0x60 == flags


def test_an_instruction_that_the_emulator_lacks_is_decoded_once() -> None:
    with _rig(entries={(DATA_PT, 5): _HOLE << 12 | 7}) as rig:
        before = rig.counters()
        assert isinstance(_run(rig, _CMPXCHG16B, rdi=DATA + 5 << 12), MmioRead)
        for _ in range(2):  # the other half, and the handler of #UD
            rig.vcpu.run()
        assert rig.counters()["insn_emulation"] - before["insn_emulation"] == 1
        assert rig.counters()["insn_emulation_fail"] - before["insn_emulation_fail"] == 1


@pytest.mark.parametrize(("name", "rip", "rax"), [("amd-npt 6.12", 0xFFF0, 0), ("intel-ept 6.12", 0x1F00, 9)])
def test_a_triple_fault_resets_a_vcpu_of_kvm_amd(name: str, rip: int, rax: int) -> None:
    with _rig(name=name, entries={(DATA_PT, 5): 0}) as rig:
        special = rig.vcpu.get_special_registers()
        special.idt = DescriptorTable(0, 0)
        rig.vcpu.set_special_registers(special)
        assert _run(rig, _INC, rdi=DATA + 5 << 12, rax=9) == Shutdown()
        registers = rig.vcpu.get_registers()
        assert (registers.rip, registers.rax) == (rip, rax)
        assert rig.vcpu.get_special_registers().tr.type == (3 if rip == 0xFFF0 else 0xB)
