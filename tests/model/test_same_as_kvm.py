"""The guests of the catalogue end alike on real KVM and on the model: registers, memory, exits, dirty pages.

Scenarios beyond these guests are compared by pykvm.crosscheck.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from pykvm.crosscheck.abilities import marks_reads
from pykvm.guest import catalog
from pykvm.guest.modes import MODES, launch_mode_test, stores_at, why_mode_fails
from pykvm.guest.protocol import LOAD_ADDRESS
from pykvm.guest.workloads import WorkloadConfig, WorkloadGuest
from pykvm.kvm import KvmSystem
from pykvm.machine import Exit, Machine, Registers, SlotFlags, SpecialRegisters, System, Vcpu
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.model.system import ModelSystem
from pykvm.x86.bits import Rflags
from tests.patience import patient

MIB = 1 << 20
SEEDS = (1, 0x1234_5678_9ABC_DEF)


@dataclass(frozen=True)
class Left:
    """What a run left behind."""

    registers: list[Registers]
    special: list[SpecialRegisters]
    pages: dict[int, bytes]
    """Digests of the pages that are not zero."""
    exits: Counter[str]
    dirty: set[int]
    status: int | None
    report: Any


def leave(
    machine: Machine, memory: GuestMemory, exits: Counter[str], status: int | None, report: Any
) -> Left:
    for vcpu in machine.vcpus:
        assert vcpu.complete_io() is None  # on AMD the RIP of an OUT moves on only then (hosts.md C.3)
    numbers, digests = memory.page_digests()
    dirty: set[int] = set()
    for slot in machine.slots.values():
        dirty |= set(machine.get_dirty_log(slot).tolist())
    return Left(
        [without_iopl(vcpu) for vcpu in machine.vcpus],
        [vcpu.get_special_registers() for vcpu in machine.vcpus],
        {int(number): digest.tobytes() for number, digest in zip(numbers, digests, strict=True)},
        exits,
        dirty,
        status,
        report,
    )


def without_iopl(vcpu: Vcpu) -> Registers:
    """kvm_pvm, which runs CPL 3 natively, gives IOPL back as 0 there (docs/reference/hosts.md B.10)."""
    registers = vcpu.get_registers()
    return replace(registers, rflags=registers.rflags & ~int(Rflags.IOPL3))


def logging(machine: Machine) -> None:
    for slot in machine.slots.values():
        slot.set_flags(SlotFlags.LOG_DIRTY_PAGES)


def watching(exits: Counter[str]) -> Callable[[Vcpu, Exit], None]:
    """Counts exits by what they are; kicks are the host's doing."""

    def trace(vcpu: Vcpu, exit: Exit) -> None:
        if type(exit).__name__ != "Kicked":
            exits[str(exit)] += 1

    return trace


def run_workload(system: System, config: WorkloadConfig) -> Left:
    exits: Counter[str] = Counter()
    with WorkloadGuest.create(system, config) as guest:
        logging(guest.machine)
        guest.runner.trace = watching(exits)
        guest.runner.start()
        status = guest.runner.wait(patient(60))
        guest.runner.stop()
        return leave(guest.machine, guest.memory, exits, status, guest.report())


def run_mode(system: System, name: str, cpl: int) -> Left:
    exits: Counter[str] = Counter()
    with launch_mode_test(system, name, cpl=cpl) as guest:
        logging(guest.machine)
        guest.runner.trace = watching(exits)
        guest.runner.start()
        status = guest.runner.wait(patient(60))
        guest.runner.stop()
        left = leave(guest.machine, guest.memory, exits, status, None)
        first = stores_at(name) // PAGE_SIZE
        assert {page for page in left.dirty if page >= first} >= {first, first + 7}, "its stores are logged"
        return left


def assert_alike(real: Left, model: Left, *, reads_are_marked: bool) -> None:
    """``reads_are_marked``: this KVM also logs pages that were read, executed or walked (hosts.md B.9)."""
    assert model.status == real.status
    assert model.exits == real.exits
    assert model.registers == real.registers
    assert model.special == real.special
    assert {
        page for page in {*real.pages, *model.pages} if real.pages.get(page) != model.pages.get(page)
    } == set()
    assert model.report == real.report
    assert model.dirty <= real.dirty
    if not reads_are_marked:
        # A shadow MMU marks a page whose D bit is set already when it is only fetched from (hosts.md B.0).
        assert real.dirty - model.dirty <= {LOAD_ADDRESS // PAGE_SIZE}


@pytest.mark.parametrize("seed", SEEDS, ids=hex)
@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("workload", catalog.workloads())
def test_workload(system: KvmSystem, workload: str, cpl: int, seed: int) -> None:
    config = WorkloadConfig(
        workload, memory=2 * MIB, cpl=cpl, passes=2, touch=32 * PAGE_SIZE, quiet=10, throttle=0, seed=seed
    )
    with ModelSystem() as model:
        assert_alike(
            run_workload(system, config),
            run_workload(model, config),
            reads_are_marked=marks_reads(system, "long", cpl),
        )


@pytest.mark.parametrize(
    ("name", "cpl"), [(name, cpl) for name in MODES for cpl in ((0,) if name == "real" else (0, 3))]
)
def test_mode(system: KvmSystem, name: str, cpl: int) -> None:
    why = why_mode_fails(system, name, cpl=cpl)
    if why is not None:
        pytest.skip(f"this host does not run the mode: {why}")
    with ModelSystem() as model:
        assert_alike(
            run_mode(system, name, cpl),
            run_mode(model, name, cpl),
            reads_are_marked=marks_reads(system, name, cpl),
        )
