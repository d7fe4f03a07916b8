"""Control registers, MSRs and system instructions at CPL 0 on the model and on a real KVM.

On hosts whose KVM emulates guest code at CPL 0 this tests KVM's in-kernel emulator; what it does otherwise
than the SDM says is listed here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pykvm.kvm import KvmSystem
from pykvm.machine.exits import Halted, InternalError
from pykvm.x86.bits import Cr4
from tests.model.flow import DATA, HANDLERS, World
from tests.model.flow_kvm import emulates_cpl0, ended_on_kvm, under_tcg

pytestmark = pytest.mark.timeout(60)

_WRITE_CR = {0: "0f22c0 0f20c0", 3: "0f22d8 0f20d8", 4: "0f22e0 0f20e0", 8: "440f22c0 440f20c0"}
_CR_VALUES = {
    0: (0x80010033, 0x80000011, 0x11, 0x80000010, 0xA0000011, 0xE0000011, 1 << 32 | 0x80010033, 0x8005003F, 0,
        0x60000010, 0x1F8FF1F1),
    3: (0x1018, 0x1FFF, 1 << 46 | 0x1000, 1 << 63 | 0x1000, 1 << 52 | 0x1000),
    4: (0x620, 0x600, 0x6A0, 0, 0x20620, 0x1620, 0x2620, 0xE20, 0x8620, 0x1000620, 0x400620, 1 << 32 | 0x620),
    8: (0, 15, 16, 1 << 63),
}  # fmt: skip
_DR_VALUES = {0: (0x1234,), 4: (0,), 6: (0, 0xFFFFFFFF, 1 << 32), 7: (0, 0xFFFF, 0x400, 0x2400, 1 << 32)}
_MSR_VALUES = {
    0xC0000080: (0xD01, 0x501, 0x101, 1, 0x901, 0xD00, 0x2D01, 0x8D01, 0xD03),
    0xC0000081: (2**64 - 1,),
    0xC0000082: (1 << 47, 0xFFFF800000000000),
    0xC0000084: (0xFFFFFFFF, 1 << 32),
    0xC0000100: (0x1234, 1 << 47),
    0xC0000102: (5, 1 << 47),
    0xC0000103: (5, 1 << 32),
    0x174: (5, 1 << 32),
    0x277: (0x0007040600070406, 2),
    0x1B: (0xFEE00900, 0xFEE00901, 1 << 50),
    0xFE: (0,),
    0x200: (6, 2, 1 << 46),
    0x201: (0x800, 0x400, 1 << 46),
    0x250: (0x0606060606060606, 7),
    0x2FF: (0xC06, 2, 0x1000),
    0xDA0: (0, 1),
    0x12345: (0,),
}
_OTHERS = {
    "smsw": "0f01e0",
    "lmsw": "31c0 0f01f0",
    "clts": "0f06",
    "invlpg": "0f013b",
    "rdpmc": "0f33",
    "wbinvd": "0f09",
    "invd": "0f08",
    "sgdt": "0f0103",
    "sidt": "0f010b",
    "lgdt": "0f0113",
    "lidt": "0f011b",
    "lgdt of 16 bits": "660f0113",
    "sgdt of 16 bits": "660f0103",
    "cr1": "0f20c8",
    "swapgs": "0f01f8",
}
_OTHERWISE = {
    "64 cr0 0x180010033": "the upper half of CR0 is ignored in place of #GP",
    "64 cr4 0x100000620": "the upper half of CR4 is ignored in place of #GP",
    "64 cr4 0x400620": "CR4.PKE may be set without PKU in CPUID",
    "32 cr4 0x400620": "CR4.PKE may be set without PKU in CPUID",
    "64 dr7 0xffff": "bit 11 of DR7 (RTM) can be set without the feature",
    "32 dr7 0xffff": "bit 11 of DR7 (RTM) can be set without the feature",
    "64 msr 0xc0000084 0x100000000": "the upper half of SFMASK can be set",
    "32 msr 0xc0000084 0x100000000": "the upper half of SFMASK can be set",
    "64 msr 0x277 0x2": "PAT takes the reserved type 2",
    "32 msr 0x277 0x2": "PAT takes the reserved type 2",
    "32 swapgs": "SWAPGS works outside 64-bit mode",
}
"""What a KVM that emulates CPL 0 does otherwise than the SDM (docs/kvm-findings.md)."""
_ON_AMD = {
    "64 msr 0xc0000103 0x100000000": "KVM ignores the upper half of TSC_AUX for guests that are not Intel's",
    "32 msr 0xc0000103 0x100000000": "KVM ignores the upper half of TSC_AUX for guests that are not Intel's",
    "64 rdpmc": "AMD's processors have performance counters without a CPUID bit; the model has none",
    "32 rdpmc": "AMD's processors have performance counters without a CPUID bit; the model has none",
}
"""What KVM gives guests on AMD and the model does not."""
_CANONICAL = "WRMSR takes an address that is not canonical"
_CR3 = "MOV takes reserved bits of CR3, which VMRUN refuses then"
_UNDER_TCG = {
    "64 cr3 0x400000001000": _CR3,
    "64 cr3 0x8000000000001000": _CR3,
    "64 cr3 0x10000000001000": _CR3,
    "64 dr6 0xffffffff": "bit 12 of DR6 can be set",
    "32 dr6 0xffffffff": "bit 12 of DR6 can be set",
    "64 msr 0xc0000080 0x2d01": "offers EFER.LMSLE, which KVM then allows and VMRUN refuses",
    "64 msr 0xc0000082 0x800000000000": _CANONICAL,
    "64 msr 0xc0000100 0x800000000000": _CANONICAL,
    "64 msr 0xc0000102 0x800000000000": _CANONICAL,
    "32 msr 0xc0000082 0x800000000000": _CANONICAL,
    "32 msr 0xc0000100 0x800000000000": _CANONICAL,
    "32 msr 0xc0000102 0x800000000000": _CANONICAL,
    "64 msr 0x174 0x100000000": "drops the upper half of SYSENTER_CS",
    "32 msr 0x174 0x100000000": "drops the upper half of SYSENTER_CS",
    "64 msr 0xc0000084 0x100000000": "takes the upper half of SFMASK",
    "32 msr 0xc0000084 0x100000000": "takes the upper half of SFMASK",
    "64 cr0 0x180010033": "ignores the upper half of CR0 in place of #GP",
    "64 cr4 0x100000620": "ignores the upper half of CR4 in place of #GP",
    "64 dr7 0xffff": "DR7 takes reserved bits",
    "32 dr7 0xffff": "DR7 takes reserved bits",
    "64 lgdt of 16 bits": "66 cuts the base to 24 bits in 64-bit mode, too",
}
"""Where QEMU's TCG is no faithful processor."""
_LME = "#VMEXIT with EFER.LME and without CR4.PAE leaves the host without paging"
_FATAL = {f"32 msr 0xc0000080 {value:#x}": _LME for value in _MSR_VALUES[0xC0000080] if value & 0x100}
"""TCG restores CR0 before CR4 and EFER, and drops a CR0.PG that the guest's EFER.LME makes an error."""


def _load(register: int, value: int, bits: int) -> bytes:
    """MOV register, value (RAX 0, RCX 1, RDX 2)."""
    if bits == 64:
        return bytes([0x48, 0xB8 + register]) + value.to_bytes(8, "little")
    return bytes([0xB8 + register]) + value.to_bytes(4, "little")


def _programs() -> Iterator[tuple[str, int, bytes]]:
    for bits in (64, 32):
        top = 64 if bits == 64 else 32
        for cr, code in _WRITE_CR.items():
            for value in _CR_VALUES[cr]:
                # Outside IA-32e mode such a KVM has no paging; CR8 is there in 64-bit mode only.
                if value < 1 << top and (bits == 64 or (cr != 8 and (cr or not value >> 31))):
                    yield f"{bits} cr{cr} {value:#x}", bits, _load(0, value, bits) + bytes.fromhex(code)
        for dr, values in _DR_VALUES.items():
            for value in values:
                if value < 1 << top:
                    code = f"0f23{0xC0 | dr << 3:02x} 31c0 0f21{0xC0 | dr << 3:02x}"
                    yield f"{bits} dr{dr} {value:#x}", bits, _load(0, value, bits) + bytes.fromhex(code)
        for msr, values in _MSR_VALUES.items():
            for value in values:
                loads = _load(1, msr, bits) + _load(0, value & 0xFFFFFFFF, bits) + _load(2, value >> 32, bits)
                yield f"{bits} msr {msr:#x} {value:#x}", bits, loads + bytes.fromhex("0f30 0f32")
        for name, code in _OTHERS.items():
            yield f"{bits} {name}", bits, bytes.fromhex(code)


PROGRAMS = {name: (bits, code) for name, bits, code in _programs()}


def _vector(rip: int) -> int | None:
    number, rest = divmod(rip - 1 - HANDLERS, 16)
    return number if not rest and 0 <= number < 256 else None


def _differences(system: KvmSystem, world: World, *, cr4: bool) -> list[str]:
    with ended_on_kvm(system, world) as (exit_, vcpu, memory):
        if isinstance(exit_, InternalError) and emulates_cpl0(system):
            pytest.xfail("KVM cannot emulate it")
        theirs = vcpu.get_registers(), vcpu.get_special_registers(), vcpu.get_debug_registers()
        cpu = world.processor(cpuid=vcpu.get_cpuid())
        written = bytes(memory.read(DATA, 16))
    assert cpu.run(1000) == Halted() == exit_
    if cr4 and not emulates_cpl0(system):
        # KVM on AMD has the host's MCE in the CR4 that the guest reads (svm_set_cr4), not in KVM_GET_SREGS.
        theirs[0].rax = theirs[0].rax & ~Cr4.MCE | cpu.get_registers().rax & Cr4.MCE
    found = []
    if _vector(cpu.rip) != _vector(theirs[0].rip):
        found.append(f"vector: model {_vector(cpu.rip)}, KVM {_vector(theirs[0].rip)}")
    pairs: list[tuple[object, object, tuple[str, ...]]] = []
    if not found:
        pairs.append((cpu.get_registers(), theirs[0], ("rax", "rcx", "rdx")))
    pairs.append((cpu.get_special_registers(), theirs[1], _SPECIAL))
    pairs.append((cpu, theirs[2], ("dr6", "dr7")))
    for mine, other, names in pairs:
        found += [
            f"{name}: model {getattr(mine, name)}, KVM {getattr(other, name)}"
            for name in names
            if getattr(mine, name) != getattr(other, name)
        ]
    image = bytes(cpu.bus.bytes[DATA : DATA + 16])  # type: ignore[attr-defined]
    return found if image == written else [*found, f"memory: model {image.hex()}, KVM {written.hex()}"]


_SPECIAL = ("cr0", "cr3", "cr4", "cr8", "efer", "apic_base", "gdt", "idt")


@pytest.mark.parametrize("name", under_tcg(PROGRAMS, _UNDER_TCG, _FATAL))
def test_model_and_kvm_agree(system: KvmSystem, name: str) -> None:
    bits, code = PROGRAMS[name]
    world = World(bits).code(code + b"\xf4").set(rbx=DATA)
    world.put(DATA, (0x12345678ABCD).to_bytes(10, "little"))
    found = _differences(system, world, cr4=" cr4 " in name)
    if found and name in _ON_AMD and not emulates_cpl0(system):
        pytest.xfail(_ON_AMD[name])
    if found and name in _OTHERWISE and emulates_cpl0(system):
        pytest.xfail(_OTHERWISE[name])
    assert not found, "\n".join(found)
