"""The self-test ROM judges processors: the model with and without translation, and a real KVM.

The ROM compares with values that its source states after the SDM.  That it can fail is shown by breaking
the model in one place at a time.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from pykvm.crosscheck.rules import comparable
from pykvm.crosscheck.trace import VcpuView
from pykvm.errors import EmulationError, GuestError
from pykvm.guest import catalog
from pykvm.guest.devices import Device, DeviceBus
from pykvm.guest.images import load_image
from pykvm.guest.launch import launch
from pykvm.guest.pc_devices import DebugExit, PostCode
from pykvm.kvm import KvmSystem
from pykvm.machine import Exit, Kicked, System
from pykvm.machine.emulation import QEMU_TCG, emulator
from pykvm.model import paging
from pykvm.model.cpu import decode, flags, iret, segments, stacks, tasks
from pykvm.model.cpu.faults import Fault
from pykvm.model.cpu.processor import Processor
from pykvm.model.cpu.semantics import TABLE
from pykvm.model.system import ModelSystem
from pykvm.x86.exceptions import Vector
from tests.patience import patient

MEMORY = 8 << 20
TIMEOUT = 30.0
PASSED = 1  # status 0 by the debug-exit port
POST_PORT, CHECK_PORT, STAGES_PORT, SUCCESS = 0x80, 0x84, 0x190, 0xFF
ALL = 0xFFFFFFFF

SOURCES = Path(catalog.__file__).parent / "images"
STAGES = {
    name: int(number)
    for file in sorted(SOURCES.glob("selftest*.inc"))
    for number, name in re.findall(r"^STAGE_BEGIN (\d+), (\w+)", file.read_text(), re.MULTILINE)
}

_EMULATED = "not emulated by a KVM that cannot run this code natively:"
UNKNOWN_TO_KVMS_EMULATOR = {
    "decimal": f"{_EMULATED} DAA, AAA, AAS",
    "nested_frames": f"{_EMULATED} ENTER with a level, BOUND",
    "traps": f"{_EMULATED} exceptions of UD2 and its like in real mode",
    "selectors": f"{_EMULATED} LAR, LSL, VERR, VERW, ARPL",
    "far_code": f"{_EMULATED} far jumps that fault in other ways than by the descriptor",
    "rings": f"{_EMULATED} call gates, INT and IRET in protected mode",
    "tasks": f"{_EMULATED} far transfers to a TSS or task gate",
    "virtual_8086": f"{_EMULATED} IRET in protected mode",
    "long_gates": f"{_EMULATED} INT",
}

FAILS_ON_TCG = {
    "far_transfers": 15,
    "protected_mode": 8,
    "segment_loads": 48,
    "limits": 1,
    "selectors": 2,
    "far_code": 30,
    "rings": 94,
    "tasks": 27,
    "virtual_8086": 7,
    "paging": 16,
    "large_pages": 7,
    "physical_address_extension": 17,
    "long_mode": 23,
    "long_gates": 29,
    "fast_calls": 16,
}
"""The checks that QEMU 10's TCG fails as well with the ROM on it alone, without any KVM, by stage.

Among others it knows no segment limits, and sets A of page-table entries and descriptors otherwise.
"""

PAGED_WITHOUT_LONG_MODE = ("paging", "large_pages", "physical_address_extension")
UNEXPECTED_GP = 0xE0 + Vector.GP
"""The check's number when MOV CR0 refuses to switch paging on."""


class Stages(Device):
    """What the ROM asks for the stages to run."""

    def __init__(self, mask: int) -> None:
        self.mask = mask

    def port_in(self, vcpu: object, port: int, size: int) -> int:
        return self.mask


@dataclasses.dataclass
class Outcome:
    status: int | None
    stages: list[int]
    check: int | None
    end: tuple[object, ...]

    @property
    def failed(self) -> int | None:
        """The stage that failed."""
        return None if self.status == PASSED else self.stages[-1]


def run(system: System, mask: int = ALL) -> Outcome:
    image = load_image(catalog.load("selftest").image, "rom")
    post, check, bus = PostCode(), PostCode(), DeviceBus()
    bus.attach_ports(post, POST_PORT)
    bus.attach_ports(check, CHECK_PORT)
    bus.attach_ports(Stages(mask), STAGES_PORT, 4)
    bus.attach_ports(DebugExit(), DebugExit.PORT)
    exits: list[Exit] = []
    with launch(system, image, bus, memory=MEMORY) as guest:
        guest.runner.trace = lambda vcpu, exit: exits.append(exit)
        guest.runner.start()
        status = guest.runner.wait(patient(TIMEOUT))
        guest.runner.stop()
        (vcpu,) = guest.machine.vcpus
        vcpu.kick()  # an OUT may be complete only at the next entry (docs/reference/hosts.md C.3)
        assert isinstance(vcpu.run(), Kicked)
        registers, special = vcpu.get_registers(), vcpu.get_special_registers()
        visible = comparable(VcpuView(registers, special))
        if not special.tr.selector:
            visible.pop("tr.type")  # Intel's processors and AMD's begin with different ones
        end = (exits, visible, guest.memory.read(0, MEMORY))
    return Outcome(status, post.codes, check.codes[-1] if check.codes else None, end)


def only(name: str) -> int:
    return 1 << STAGES[name]


def test_the_stages_are_numbered_from_one_on() -> None:
    assert sorted(STAGES.values()) == list(range(1, len(STAGES) + 1))
    assert len(STAGES) > 15


@pytest.mark.parametrize("translate", [True, False], ids=["translated", "interpreted"])
def test_the_model_passes(translate: bool) -> None:
    outcome = run(ModelSystem(translate=translate))
    assert (outcome.status, outcome.check) == (PASSED, None)
    assert outcome.stages == [*range(1, len(STAGES) + 1), SUCCESS]


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_stands_alone(name: str) -> None:
    outcome = run(ModelSystem(), only(name))
    assert (outcome.status, outcome.stages) == (PASSED, [STAGES[name], SUCCESS])


@pytest.mark.kvm
@pytest.mark.parametrize("name", STAGES)
def test_kvm_ends_in_the_same_state(name: str) -> None:
    """Registers, memory and every exit, where KVM can run the stage at all."""
    if emulator() == QEMU_TCG and name == "tasks":
        pytest.xfail("qemu-tcg fails this stage without KVM, too, and never ends it under KVM")
    with KvmSystem() as system:
        try:
            real = run(system, only(name))
        except (EmulationError, GuestError):
            if name not in UNKNOWN_TO_KVMS_EMULATOR:
                raise
            pytest.skip(UNKNOWN_TO_KVMS_EMULATOR[name])
    if emulator() == QEMU_TCG and (real.failed, real.check) == (STAGES[name], FAILS_ON_TCG.get(name)):
        pytest.xfail(f"qemu-tcg fails check {real.check} of this stage without KVM, too")
    if name == "fast_calls" and real.failed:
        pytest.skip("SYSCALL at CPL 3 stays there on this KVM (docs/reference/hosts.md, C.2)")
    if name in PAGED_WITHOUT_LONG_MODE and real.check == UNEXPECTED_GP:
        pytest.skip("this KVM has paging in long mode only")
    assert (real.status, real.check) == (PASSED, None)
    for ours, theirs in zip(run(ModelSystem(), only(name)).end, real.end, strict=True):
        assert ours == theirs


# --- that it can fail -------------------------------------------------------------------------------------


def _wrong_error(cls: type[Fault], error: int) -> Fault:
    return cls(Vector.NP, error | 1)


def _as_without_ist(cpu: Processor, ist: int, ext: int) -> int:
    return stacks.inner_stack64(cpu, 0, ext)


DAMAGES: dict[str, tuple[str, object, object, object]] = {
    "no parity": ("arithmetic", flags, "PARITY", (0,) * 256),
    "DAA for DAS": ("decimal", TABLE, "das", TABLE["daa"]),
    "STD without effect": ("strings", TABLE, "std", TABLE["cld"]),
    "descriptors are not marked": ("protected_mode", segments, "mark_accessed", lambda cpu, segment: segment),
    "wrong error code of #NP": ("segment_loads", Fault, "np", classmethod(_wrong_error)),
    "#GP for #NP": ("segment_loads", Fault, "np", Fault.gp),
    "VERW for VERR": ("selectors", TABLE, "verr", TABLE["verw"]),
    "IRET leaves segments": ("rings", iret, "release_data_segments", lambda cpu: None),
    "a task is never busy": ("tasks", tasks, "_set_busy", lambda cpu, tss, busy: tss),
    "no A and D bits": ("paging", paging, "_updates", lambda steps, size, kind: ()),
    "CR0.WP without effect": ("paging", paging, "_WP", 0),
    "IST without effect": ("long_gates", stacks, "interrupt_stack", _as_without_ist),
}
"""What is wrong: the stage that is about it, and what to put where."""


@pytest.mark.parametrize("name", DAMAGES)
def test_a_broken_processor_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, where, key, value = DAMAGES[name]
    monkeypatch.setattr(decode, "decoder", decode.Decoder)  # those that are shared know instructions already
    if isinstance(where, dict):
        monkeypatch.setitem(where, key, value)
    else:
        monkeypatch.setattr(where, str(key), value)
    outcome = run(ModelSystem(translate=False), only(stage))
    assert (outcome.status, outcome.stages) == (STAGES[stage] * 2 + 1, [STAGES[stage]])
    assert outcome.check
