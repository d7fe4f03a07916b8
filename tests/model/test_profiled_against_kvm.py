"""The model on the profile of a kvm_pvm host and the real one, step by step: marks, exits and counters.

Random scenarios of the same kind are the cross-check's (``pykvm crosscheck --level L3``); here is what each
instruction and each event does at CPL 0, where the host's emulator carries it out, and at CPL 3.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import pytest

from pykvm.kvm import KvmSystem
from pykvm.machine import DirtyRingFull, InternalError, IoIn, IoOut, SlotFlags
from pykvm.model.system import ModelSystem
from pykvm.probe import detect, read_evidence
from pykvm.profiles import Profile
from tests.model.hostguest import DATA, DONE, PD, PDPT, PML4, PT, HostGuest, Step

pytestmark = pytest.mark.interruptible

STORE: Final = b"\x48\x89\x07" + DONE
LOAD: Final = b"\x48\x8b\x07" + DONE
FRESH, USED = 0x07, 0x67
"""Flags of leaves: without A and D, and with both."""

COMMON: Final = {
    "mov to memory": "488907",
    "mov from memory": "488b07",
    "mov imm": "48c70755000000",
    "add": "480107",
    "lock add": "f0480107",
    "xchg": "488707",
    "cmpxchg that fails": "480fb10f",
    "lock cmpxchg that fails": "f0480fb10f",
    "cmpxchg8b": "0fc70f",
    "xadd": "480fc107",
    "shld": "480fa40703",
    "setc": "0f9207",
    "bts": "480fba2f05",
    "bt": "480fba2700",
    "not": "48f717",
    "mul": "48f727",
    "imul": "480faf07",
    "div": "48f737",
    "cmov": "480f4407",
    "movzx": "0fb607",
    "xlat": "d7",
    "push": "50",
    "push mem": "ff37",
    "pop mem": "508f07",
    "pushf popf": "9c9d",
    "enter": "c8080000",
    "leave": "c9",
    "movups": "0f1107",
    "movdqu": "f30f7f07",
    "movntps": "0f2b07",
    "movntdq": "660fe707",
    "movnti": "480fc307",
    "movq mm": "0f7f07",
    "fnstcw": "d93f",
    "fnstsw": "dd3f",
    "sgdt": "0f0107",
    "sldt": "0f0007",
    "str": "0f000f",
    "smsw": "0f0127",
    "fxsave": "0fae07",
    "fxrstor": "0fae0f",
    "clflush": "0fae3f",
    "mfence": "0faef0",
    "swapgs": "0f01f8",
    "stosq": "f348ab",
    "endbr64": "f30f1efa",
    "nop mem": "0f1f00",
    "prefetchw": "0f0d0f",
    "mov ds": "8ed8",
    "hlt": "f4",
    "ud2": "0f0b",
    "ud1": "0fb9c0",
    "int3": "cc",
    "int 33": "cd21",
    "invlpg": "0f013f",
    "mov cr3": "0f20d90f22d9",
    "wbinvd": "0f09",
    "cli": "fa",
    "clac": "0f01ca",
    "lar": "0f02c0",
    "in": "e410",
}
"""Instructions: RDI and RBX point to data, RAX is 2, RCX 0."""
LACKED: Final = {
    "movss": "f30f1107",
    "movd": "660f7e07",
    "stmxcsr": "0fae1f",
    "cmpxchg16b": "480fc70f",
    "fld1": "d9e8",
    "fnstenv": "d937",
    "paddd": "660ffec0",
    "emms": "0f77",
    "wait": "9b",
}
"""Others, which KVM's emulator does not know."""


class Pair:
    """The same guest on the real host and on its model; each step must be the same."""

    def __init__(self, real: KvmSystem, profile: Profile, **options: Any) -> None:
        self.real = HostGuest(real.create_machine(), **options)
        self.model = HostGuest(
            ModelSystem(profile=profile).create_machine(), cpuid=self.real.machine.supported_cpuid, **options
        )

    def step(self, code: bytes, **registers: int) -> Step:
        """Run it on both."""
        return self.agree(self.real.step(code, **registers), self.model.step(code, **registers))

    def go_on(self) -> Step:
        return self.agree(self.real.go_on(), self.model.go_on())

    def agree(self, kvm: Step, model: Step) -> Step:
        if isinstance(kvm.exit, InternalError):  # KVM tells more about it
            assert isinstance(model.exit, InternalError)
            assert (model.exit.suberror, model.exit.instruction) == (kvm.exit.suberror, kvm.exit.instruction)
        else:
            assert model.exit == kvm.exit
        assert [hex(gfn) for gfn in model.marks] == [hex(gfn) for gfn in kvm.marks]
        assert model.counters == kvm.counters
        return model

    def both(self, what: Any) -> None:
        """Do it to both guests."""
        what(self.real)
        what(self.model)

    def back(self) -> None:
        """Out of a handler, to where the guest began."""
        self.both(lambda guest: guest.vcpu.set_special_registers(guest.special))

    def close(self) -> None:
        self.real.close()
        self.model.close()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@cache
def _detected() -> Profile:
    with KvmSystem() as system:
        return detect(system, read_evidence(), system.check_extension).profile


@pytest.fixture
def host(system: KvmSystem) -> tuple[KvmSystem, Profile]:
    profile = _detected()
    if not profile.emulates_all_but_user:
        pytest.skip("This host runs CPL 0 natively; what its processor does between faults is its own.")
    return system, profile


@pytest.mark.parametrize("flags", [FRESH, USED], ids=["fresh", "used"])
@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("name", [*COMMON, *LACKED])
def test_an_instruction(host: tuple[KvmSystem, Profile], name: str, cpl: int, flags: int) -> None:
    """Once aligned, and once over the end of a page."""
    code = bytes.fromhex((COMMON | LACKED)[name]) + DONE
    registers = {"rbx": DATA << 12, "rcx": 0, "rax": 1 if name == "div" else 2}
    with Pair(*host, cpl=cpl, flags=flags, upper=flags & 0x3F) as pair:
        done = pair.step(code, rdi=DATA << 12, **registers)
        if isinstance(done.exit, IoIn | InternalError):
            return
        pair.back()
        pair.step(code, rdi=(DATA + 3 << 12) - 4, **registers)


@pytest.mark.parametrize(
    "code",
    [
        *(
            "06",
            "0e",
            "1e",
            "27",
            "60",
            "6200",
            "82c000",
            "9a",
            "ce",
            "d40a",
            "d6",
            "ea",
            "f001c0",
            "fff8",
            "fef8",
        ),
        *(
            "c6c800",
            "8fc8",
            "0f04",
            "0f0a",
            "0f24c0",
            "0f36",
            "0fffc0",
            "0fa6",
            "0f7ac0",
            "0fc7c8",
            "8dc0",
            "0f01c4",
        ),
    ],
)
def test_what_neither_processor_nor_emulator_takes(host: tuple[KvmSystem, Profile], code: str) -> None:
    """After #UD the emulator tries: what it lacks counts as failed, what it knows as undefined does not."""
    with Pair(*host, cpl=3) as pair:
        pair.step(bytes.fromhex(code) + DONE, rdi=DATA << 12, rax=2, rbx=DATA << 12, rcx=0)


@pytest.mark.parametrize("ring", [0, 4096], ids=["bitmap", "ring"])
@pytest.mark.parametrize("cpl", [0, 3])
def test_a_guest_that_edits_its_tables(host: tuple[KvmSystem, Profile], cpl: int, ring: int) -> None:
    """hosts.md B.1 to B.3: leaf tables, upper tables, and what is stored to them with which instruction."""
    with Pair(*host, cpl=cpl, ring=ring) as pair:
        pair.step(STORE, rdi=DATA << 12)
        pair.step(LOAD, rdi=DATA + 1 << 12)
        for entry in (DATA, DATA + 9):
            pair.step(STORE, rdi=PT + 16 << 12, rax=entry << 12 | FRESH)
        pair.step(LOAD, rdi=DATA << 12)
        for _ in range(5):
            pair.step(STORE, rdi=(PD << 12) + 8 * 20, rax=PT + 20 << 12 | FRESH)
        pair.step(LOAD, rdi=20 << 21)
        for code in ("480107", "f0480907", "0f1107", "66890f", "880f", "89470c", "f348ab", "488707"):
            pair.step(bytes.fromhex(code) + DONE, rdi=(PD << 12) + 8 * 21, rax=0, rcx=3)
            pair.step(LOAD, rdi=DATA << 12)
        for table in (PDPT, PML4):
            pair.step(STORE, rdi=(table << 12) + 8 * 7, rax=PD << 12 | FRESH)
        pair.step(STORE, rdi=7 << 30 | DATA + 2 << 12)


@pytest.mark.parametrize("cpl", [0, 3])
def test_repetitions(host: tuple[KvmSystem, Profile], cpl: int) -> None:
    """kvm-mmu.md 12.6: decodes of N iterations, and their marks."""
    with Pair(*host, cpl=cpl) as pair:
        for count in (0, 1, 3, 1023, 1024, 1025):
            pair.step(b"\xf3\xaa" + DONE, rdi=DATA << 12, rcx=count)
        pair.step(b"\xf3\x48\xa5" + DONE, rdi=DATA + 4 << 12, rsi=(DATA + 8 << 12) - 16, rcx=40)
        pair.step(b"\xf3\xa6" + DONE, rdi=DATA + 12 << 12, rsi=DATA + 13 << 12, rcx=40)
        pair.step(b"\xf2\xae" + DONE, rdi=DATA + 14 << 12, rcx=40, rax=0)


@pytest.mark.parametrize("cpl", [0, 3])
def test_page_faults(host: tuple[KvmSystem, Profile], cpl: int) -> None:
    """Their delivery: gate, TSS, a mark for each word pushed, then the code segment (hosts.md C.2)."""
    with Pair(*host, cpl=cpl) as pair:
        for _ in range(2):
            pair.step(LOAD, rdi=1 << 30)
            pair.go_on()
            pair.back()
        pair.both(lambda guest: guest.entry(PT + 16, 5, DATA + 5 << 12 | 5))
        pair.step(STORE, rdi=DATA + 5 << 12)
        pair.back()
        pair.step(STORE, rdi=(DATA + 5 << 12) - 4)
        pair.back()
        pair.step(LOAD, rdi=DATA + 5 << 12)


@pytest.mark.parametrize("cpl", [0, 3])
def test_logs_and_slots(host: tuple[KvmSystem, Profile], cpl: int) -> None:
    """Harvest, logging off and on, a slot more, and none."""
    with Pair(*host, cpl=cpl) as pair:
        for gfn in range(DATA, DATA + 40, 3):
            pair.step(STORE, rdi=gfn << 12)
        pages = [guest.machine.collect_rings().pages.gfns(0).tolist() for guest in (pair.real, pair.model)]
        assert pages[0] == pages[1]
        pair.step(STORE, rdi=DATA << 12)
        pair.step(LOAD, rdi=DATA + 3 << 12)
        for flags in (SlotFlags.NONE, SlotFlags.LOG_DIRTY_PAGES):
            pair.both(lambda guest, flags=flags: guest.slot.set_flags(flags))
            pair.step(STORE, rdi=DATA << 12)
        pair.both(lambda guest: guest.machine.create_slot(guest.memory, 0x8000 << 12, size=1 << 20))
        pair.step(STORE, rdi=DATA + 6 << 12)
        pair.both(lambda guest: guest.machine.slots[1].delete())
        pair.step(STORE, rdi=DATA + 6 << 12)


@pytest.mark.parametrize("name", ["rows of a hot loop", "a loop over many pages"])
def test_translated_code_marks_as_much(host: tuple[KvmSystem, Profile], name: str) -> None:
    """Stores without a fault mark nothing, so code that runs translated changes no count."""
    stride, count = (0, 5000) if name.startswith("rows") else (0x1000, 700)
    loop = b"\x48\x89\x0f\x48\x01\xd7\x48\xff\xc9\x75\xf5" + DONE
    with Pair(*host, cpl=3, ring=4096) as pair:
        for _ in range(2):
            pair.step(loop, rdi=DATA << 12, rcx=count, rdx=stride)
        assert pair.model.vcpu.cpu.translated > count
        pair.both(lambda guest: guest.machine.collect_rings())
        pair.step(loop, rdi=DATA << 12, rcx=count, rdx=stride)


def test_a_ring_that_is_full(host: tuple[KvmSystem, Profile]) -> None:
    """4.4: KVM_RUN returns with the fault that made it full fixed and its store not yet done."""
    loop = b"\x48\x89\x0f\x48\x01\xd7\x48\xff\xc9\x75\xf5" + DONE
    with Pair(*host, cpl=3, ring=256) as pair:
        pair.step(loop, rdi=DATA << 12, rcx=600, rdx=0x1000)
        last = pair.go_on()
        for _ in range(8):
            if not isinstance(last.exit, DirtyRingFull):
                break
            pair.both(lambda guest: guest.machine.collect_rings())
            last = pair.go_on()
        assert isinstance(last.exit, IoOut)
        assert bytes(pair.real.memory.view(DATA << 12, 700 << 12)) == bytes(
            pair.model.memory.view(DATA << 12, 700 << 12)
        )
