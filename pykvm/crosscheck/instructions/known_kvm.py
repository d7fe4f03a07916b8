"""Where KVM differs from processors: its emulator, and kvm_pvm's way of running user code.

docs/kvm-findings.md tells more.
"""

from __future__ import annotations

from typing import Final

from pykvm.crosscheck.instructions.case import InstructionCase, Outcome
from pykvm.crosscheck.instructions.rule import Opcode, known, opcodes
from pykvm.x86.bits import Rflags
from pykvm.x86.exceptions import Vector

_SELECTORS: Final = opcodes("8c 8e 9a ca cb cf ea ff 0f00 0f02 0f03 0fa0 0fa1 0fa8 0fa9 0fb2 0fb4 0fb5")
_LACKED: Final = opcodes("27 37 3f 62 63 9b c8 cc cd ce c4 c5 0f02 0f03 0fb8 0f77 0ff0 0f0d")
_LACKED_MAPS: Final = (b"\x0f\x38", b"\x0f\x3a")
_LONGEST_OPERAND: Final = 64
_MOST_PUSHED: Final = 64
"""Bytes of the stack that an instruction with its exception uses."""


def _emulated(case: InstructionCase) -> bool:
    """What kvm_pvm runs in the kernel's emulator: everything but 64-bit code at CPL 3."""
    return case.mode != 64 or case.cpl == 0


@known(
    "user code on kvm_pvm sees the host's descriptor tables",
    "kvm",
    "64-bit code at CPL 3 runs natively with the host's GDT and LDT: selectors mean something else",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return case.mode == 64 and case.cpl == 3 and opcode.code in _SELECTORS


@known(
    "kvm_pvm emulates what user code may not do",
    "kvm",
    "after #UD and #GP of 64-bit user code KVM's emulator tries the instruction, by rules of its own",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return case.mode == 64 and case.cpl == 3 and model.vector in {Vector.UD, Vector.GP}


@known(
    "kvm_pvm emulates with a stack pointer that is not canonical",
    "kvm",
    "64-bit user code whose RSP is not canonical is not entered but emulated, as far as the emulator goes",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    top = case.registers.rsp >> 47
    return case.mode == 64 and case.cpl == 3 and top not in {0, 0x1FFFF}


@known(
    "KVM's emulator lacks the instruction",
    "kvm",
    "kvm-mmu.md 12.8: at CPL 3 KVM raises #UD for what its emulator does not know",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    lacked = (
        opcode.code in _LACKED
        or opcode.code[:2] in _LACKED_MAPS
        or (opcode.code == b"\x0f\x00" and opcode.extension in {4, 5})
        or case.floating is not None
    )
    return _emulated(case) and other.vector == Vector.UD and model.vector != Vector.UD and lacked


@known("KVM's emulator does not check alignment", "kvm", "#AC is not implemented (emulate.c, linearize)")
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return _emulated(case) and model.vector == Vector.AC


@known(
    "KVM's emulator runs TZCNT and LZCNT as BSF and BSR",
    "kvm",
    "kvm-mmu.md 12.8: the REP prefix of 0F BC and 0F BD is ignored",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return _emulated(case) and opcode.code in {b"\x0f\xbc", b"\x0f\xbd"} and 0xF3 in opcode.prefixes


@known(
    "KVM's emulator lets flat segments wrap",
    "kvm",
    "an operand that crosses 4 GiB in a segment of that limit faults on processors (SDM vol. 3, 5.3)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return (
        case.mode == 32
        and model.vector in {Vector.GP, Vector.SS}
        and (other.vector == Vector.PF and (other.address or 0) >= 0xFFFFFF00)
    )


@known(
    "KVM's emulator pushes 16 bits of a segment register",
    "kvm",
    "em_push_sreg writes a word and leaves the rest of the slot; AMD's processors write all of it",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    pushes = opcode.code in opcodes("06 0e 16 1e 0fa0 0fa8")
    within = model.vector is None or model.vector in {Vector.SS, Vector.PF}
    return _emulated(case) and pushes and within and other.vector is None


@known(
    "KVM's emulator ignores REP before LOOP",
    "kvm",
    "F2 and F3 choose between LOOPNE and LOOPE on AMD's processors (host)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    repeated = 0xF2 in opcode.prefixes or 0xF3 in opcode.prefixes
    return _emulated(case) and opcode.code in {b"\xe0", b"\xe1"} and repeated


@known(
    "KVM's emulator takes prefixes that make an instruction undefined",
    "kvm",
    "66 before MOVNTI, and LOCK or 66 before fences and CLFLUSH, are #UD on processors",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return _emulated(case) and opcode.code in opcodes("0fc3 0fae") and model.vector == Vector.UD


@known(
    "KVM's emulator looks at a segment's rights after its memory",
    "kvm",
    "a read-modify-write through CS faults with #GP on processors, with #PF in KVM where its page is absent",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return (
        _emulated(case)
        and 0x2E in opcode.prefixes
        and model.vector == Vector.GP
        and other.vector == Vector.PF
    )


@known(
    "KVM's emulator computes SF, ZF and PF of AAM and AAD otherwise",
    "kvm",
    "SDM vol. 2, AAM and AAD: by AL; the emulator's differ",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return _emulated(case) and opcode.code in {b"\xd4", b"\xd5"} and model.vector is other.vector is None


@known(
    "KVM's emulator refuses LOCK MOV CR0",
    "kvm",
    "AMD's processors take it for MOV CR8 (APM vol. 3, MOV CRn); KVM raises #UD",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return opcode.code in opcodes("0f20 0f22") and 0xF0 in opcode.prefixes


@known(
    "KVM's emulator lacks IRET and far transfers of protected mode",
    "kvm",
    "kvm-mmu.md 12.8: INT n, INT3, INTO and IRET only in real mode; far returns to inner levels only",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return case.mode != 16 and _emulated(case) and opcode.code in opcodes("cd ce cf ca cb")


@known(
    "KVM's emulator stores in parts across pages",
    "kvm",
    "a store that crosses into a page where it faults has written the first page already (hosts.md E), and "
    "the fault names the second page where a processor names the first byte that may not be written",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    near = abs((model.address or 0) - (other.address or 0)) < _LONGEST_OPERAND
    same = model.address == other.address and model.memory == other.memory
    return _emulated(case) and model.vector == other.vector == Vector.PF and near and not same


@known(
    "KVM's emulator does not run ENTER as processors do",
    "kvm",
    "em_enter only knows nesting level 0, and writes nothing at the new top of the stack",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return _emulated(case) and opcode.code == b"\xc8"


@known(
    "KVM's emulator follows Intel in near branches with 66",
    "kvm",
    "in 64-bit code AMD's processors branch within 64 KiB (APM vol. 3, near branches; host); KVM ignores 66",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    near = (
        opcode.code[0] in {0xC2, 0xC3, 0xE8, 0xE9, 0xEB, *range(0x70, 0x80), *range(0xE0, 0xE4)}
        or (opcode.code == b"\xff" and opcode.extension in {2, 4})
        or (len(opcode.code) == 2 and 0x80 <= opcode.code[1] <= 0x8F)
    )
    return case.mode == 64 and near and 0x66 in opcode.prefixes


@known(
    "KVM's emulator reads 64-bit far pointers",
    "kvm",
    "with REX.W, as Intel's processors do; AMD's ignore it (APM vol. 3, CALL (Far), LFS; host)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    wide = case.mode == 64 and opcode.prefixes[-1:] >= b"\x48" and opcode.prefixes[-1:] < b"\x50"
    far = opcode.code in opcodes("0fb2 0fb4 0fb5") or (opcode.code == b"\xff" and opcode.extension in {3, 5})
    return wide and far


@known(
    "KVM's emulator looks at the first byte's address only",
    "kvm",
    "an operand that crosses the end of the canonical addresses is #GP on processors",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return (
        case.mode == 64
        and model.vector in {Vector.GP, Vector.SS}
        and other.vector == Vector.PF
        and (other.address or 0) & 0x7FFFFFFFFF00 in {0x7FFFFFFFFF00, 0}
    )


@known(
    "KVM's emulator knows REX.R before a segment register",
    "kvm",
    "processors ignore it in MOV to and from Sreg (SDM vol. 2, 2.2.1.2); KVM raises #UD for register 8 on",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return case.mode == 64 and opcode.code in {b"\x8c", b"\x8e"} and other.vector == Vector.UD


@known(
    "KVM's emulator does not check FXSAVE's alignment",
    "kvm",
    "an area that is not aligned to 16 bytes is #GP (SDM vol. 2, FXSAVE)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return opcode.code == b"\x0f\xae" and opcode.extension in {0, 1} and model.vector == Vector.GP


@known(
    "KVM's emulator pushes doublewords for a real-mode INT with 66",
    "kvm",
    "processors push IP, CS and FLAGS as words, whatever the operand size (SDM vol. 2, INT n)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return case.mode == 16 and 0x66 in opcode.prefixes and opcode.code in opcodes("cc cd ce")


@known(
    "KVM's emulator heeds null segment prefixes",
    "kvm",
    "ES, CS, SS and DS overrides of 64-bit code mean nothing (SDM vol. 1, 3.4.2.1); KVM's replace FS and GS, "
    "and make #SS of #GP",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    prefixes = set(opcode.prefixes)
    matters = bool(prefixes & {0x64, 0x65}) or model.vector in {Vector.GP, Vector.SS}
    return case.mode == 64 and bool(prefixes & {0x26, 0x2E, 0x36, 0x3E}) and matters


@known(
    "KVM's emulator stores selectors by operand size",
    "kvm",
    "in memory MOV from Sreg, SLDT, STR and SMSW write 16 bits whatever the operand size (SDM vol. 2)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    stores = (b"\x0f\x00", 0), (b"\x0f\x00", 1), (b"\x0f\x01", 4)
    selects = opcode.code == b"\x8c" or (opcode.code, opcode.extension) in stores
    return selects and model.vector == other.vector


@known(
    "KVM's emulator delivers real-mode interrupts beyond the stack's limit",
    "kvm",
    "a push that crosses offset FFFFH is #SS, and in delivery a shutdown (SDM vol. 3, 22.6)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    sp = case.registers.rsp & 0xFFFF
    return case.mode == 16 and model.failure == "shutdown" and sp & 1 == 1 and sp < _MOST_PUSHED


@known(
    "KVM's emulator writes the destination of a failed CMPXCHG",
    "kvm",
    "the upper half of a 32-bit register stays on AMD's processors (host)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return case.mode == 64 and opcode.code == b"\x0f\xb1" and opcode.modrm >= 0xC0


@known(
    "KVM's emulator sign-extends the vector of INT",
    "kvm",
    "in real mode INT 80H to FFH read before the interrupt table and go wherever that leads",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return case.mode == 16 and opcode.code == b"\xcd" and opcode.modrm >= 0x80


@known(
    "KVM's emulator reads the operand of MOV to a segment register that does not exist",
    "kvm",
    "reg fields 1, 6 and 7 are #UD before memory is read (SDM vol. 2, MOV)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return opcode.code == b"\x8e" and opcode.extension in {1, 6, 7} and model.vector == Vector.UD


@known(
    "KVM's emulator stores a part of a faulting PUSHA",
    "kvm",
    "the registers that were pushed before the fault stay in memory",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return opcode.code == b"\x60" and model.vector == other.vector is not None


@known(
    "KVM's emulator blames the stack segment for a misaligned operand",
    "kvm",
    "an operand that must be aligned is #GP(0) in any segment (SDM vol. 2, table 2-21)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return case.floating is not None and model.vector == Vector.GP and other.vector == Vector.SS


@known(
    "user code on kvm_pvm reaches PML4 slot 256",
    "kvm",
    "faults at FFFF8000_00000000 to FFFF807F_FFFFFFFF come with the error code of the host's mapping "
    "(hosts.md C.1)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    slot = (model.address or 0) >> 39 & 0x1FF
    return case.mode == 64 and case.cpl == 3 and slot == 256 and model.vector == other.vector == Vector.PF


@known(
    "KVM's emulator touches MMX state before a fault",
    "kvm",
    "the tag word is valid after a MOVQ of an MMX register that faulted",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return case.floating is not None and _emulated(case) and model.vector == other.vector is not None


@known(
    "KVM's emulator forgets the flags of a REP comparison that faults",
    "kvm",
    "AMD's processors keep those of the last iteration (host); SDM vol. 2, REP, restores the old ones",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    return opcode.code in opcodes("a6 a7 ae af") and model.vector == other.vector is not None


@known(
    "KVM's emulator pops 16 bits of a segment register",
    "kvm",
    "processors read the whole slot, and fault where a part of it is out of reach (host)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    pops = opcode.code in opcodes("07 17 1f 0fa1 0fa9")
    return pops and model.vector in {Vector.SS, Vector.PF} and other.vector != model.vector


@known(
    "KVM's emulator ignores 67, FS and GS before FXSAVE and FXRSTOR",
    "kvm",
    "in 64-bit code the area's address is not cut to 32 bits, and has no segment base",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    fx = opcode.code == b"\x0f\xae" and opcode.extension in {0, 1}
    return case.mode == 64 and fx and not {0x64, 0x65, 0x67}.isdisjoint(opcode.prefixes)


@known(
    "KVM's emulator clears the upper half after BSF and BSR of 0",
    "kvm",
    "the destination stays as it is on AMD's processors (APM vol. 3, BSF), all 64 bits of it (host)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    scans = opcode.code in {b"\x0f\xbc", b"\x0f\xbd"} and model.vector is other.vector is None
    return case.mode == 64 and scans and bool(model.registers.rflags & Rflags.ZF)


@known(
    "KVM's emulator writes less than FXSAVE's area",
    "kvm",
    "an area whose unused end may not be written is #PF on processors (host)",
)
def _(case: InstructionCase, opcode: Opcode, model: Outcome, other: Outcome) -> bool:
    fxsave = opcode.code == b"\x0f\xae" and opcode.extension == 0
    return fxsave and model.vector == Vector.PF and other.vector is None
