"""What KVM's in-kernel emulator can do (``arch/x86/kvm/emulate.c``; kvm-mmu.md 12.7 and 12.8).

Instructions go by their names in the model's table; a few need their encoding as well.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu.instruction import Immediate, Memory

if TYPE_CHECKING:
    from pykvm.model.cpu.instruction import Instruction
    from pykvm.profiles import Profile


class Coverage(Enum):
    """What becomes of an instruction in the emulator."""

    EMULATED = "emulated"
    HOST = "the host's own"
    """The emulator fails, which is counted, and the host module carries it out all the same (kvm_pvm)."""
    UNDECODED = "not decoded"
    UNHANDLED = "decoded, but not carried out"
    """Its operand was read before (12.4, CMPXCHG16B)."""
    UNDEFINED = "undefined"
    """The emulator raises #UD by itself: the guest's CPUID lacks the instruction."""


_CONDITIONS: Final = (
    "a", "ae", "b", "be", "e", "g", "ge", "l", "le", "ne", "no", "np", "ns", "o", "p", "s",
)  # fmt: skip
_NAMES: Final = (
    "add", "or", "adc", "sbb", "and", "sub", "xor", "cmp", "test", "inc", "dec", "not", "neg", "mul",
    "imul", "div", "idiv", "das", "aam", "aad", "shl", "shr", "sar", "sal", "rol", "ror", "rcl", "rcr",
    "shld", "shrd", "mov", "movzx", "movsx", "movsxd", "bswap", "xchg", "lea", "xlat", "salc", "mov_sreg",
    "mov_cr", "mov_dr", "movnti", "movbe", "push", "pop", "pusha", "popa", "pushf", "popf", "push_sreg",
    "pop_sreg", "enter", "leave", "call", "ret", "lcall", "ljmp", "retf", "retfq", "jmp", "loop", "loope",
    "loopne", "jrcxz", "clc", "stc", "cmc", "cld", "std", "cli", "sti", "sahf", "lahf", "cbw", "cwd", "cdq",
    "cwde", "cdqe", "cqo", "nop", "pause", "hlt", "movs", "cmps", "stos", "lods", "scas", "ins", "outs",
    "in", "out", "bt", "bts", "btr", "btc", "bsf", "bsr", "tzcnt", "lzcnt", "xadd", "cmpxchg", "cmpxchg8b",
    "lds", "les", "lfs", "lgs", "lss", "sgdt", "sidt", "lgdt", "lidt", "sldt", "str", "lldt", "ltr", "smsw",
    "lmsw", "clts", "invlpg", "invd", "wbinvd", "wbnoinvd", "rdmsr", "wrmsr", "rdtsc", "rdpmc", "cpuid",
    "rdpid", "xsetbv", "syscall", "sysenter", "sysexit", "sysexitq", "vmcall", "vmmcall", "fninit",
    "fnstcw", "fnstsw", "movdqa", "movdqu", "movups", "movupd", "movaps", "movapd", "movntps", "movntpd",
    "movntdq", "prefetch", "prefetchw", "prefetchnta", "prefetcht0", "prefetcht1", "prefetcht2", "clflush",
    "clflushopt",
)  # fmt: skip
_EMULATED: Final = frozenset(
    [*_NAMES, *(kind + condition for kind in ("j", "cmov", "set") for condition in _CONDITIONS)]
)
_HOST: Final = frozenset((
    "fxsave", "fxsave64", "fxrstor", "fxrstor64", "lfence", "mfence", "sfence", "rdrand", "rdseed", "ud2",
    "swapgs", "rdfsbase", "rdgsbase", "wrfsbase", "wrgsbase", "endbr32", "endbr64", "cldemote", "iret",
))  # fmt: skip
"""What a host that emulates CPL 0 does by itself, measured on kvm_pvm."""
_REAL_MODE_ONLY: Final = frozenset({"int", "int3", "into", "iret"})
_BY_FEATURE: Final = {"movbe": "movbe", "rdpid": "rdpid"}

_PAGE_TABLE_MAIN: Final = frozenset(
    {*range(0x08, 0x0E), *range(0x20, 0x26), 0x86, 0x87, 0x88, 0x89, 0x8C, 0xA2, 0xA3, 0xC6, 0xC7}
)
_PAGE_TABLE_EXTENDED: Final = frozenset({0xAB, 0xBB, 0xB0, 0xB1})
_PAGE_TABLE_GROUPS: Final = {
    b"\x80": {1, 4},
    b"\x81": {1, 4},
    b"\x82": {1, 4},
    b"\x83": {1, 4},
    b"\x0f\xba": {5, 7},
    b"\x0f\xc7": {1},
}


def is_page_table_opcode(insn: Instruction) -> bool:
    """The PageTable flag: on a write-protected page KVM emulates at once, without trying to unprotect the
    page first (12.7)."""
    opcode = insn.opcode
    if len(opcode) == 1:
        if opcode[0] in _PAGE_TABLE_MAIN:
            return True
    elif len(opcode) == 2 and opcode[1] in _PAGE_TABLE_EXTENDED:
        return True
    group = _PAGE_TABLE_GROUPS.get(opcode)
    return group is not None and insn.modrm is not None and insn.modrm >> 3 & 7 in group


def coverage(insn: Instruction, profile: Profile, *, protected: bool, bits64: bool) -> Coverage:
    """What the emulator of a host does with an instruction, in the mode that it is in."""
    name = insn.name
    if name in _EMULATED:
        if name == "enter" and insn.operands[1].size and _nesting(insn):
            return Coverage.UNHANDLED
        if name == "nop" and insn.opcode[:1] == b"\x0f" and insn.opcode[1] in {0x1A, 0x1B, 0x1C, 0x1E}:
            return Coverage.HOST if profile.emulates_all_but_user else Coverage.UNDECODED
        return Coverage.EMULATED
    if name in _REAL_MODE_ONLY and not protected:
        return Coverage.EMULATED
    if name in {"fxsave", "fxrstor"} and not bits64:
        return Coverage.EMULATED
    if name == "movq" and insn.opcode in (b"\x0f\x6f", b"\x0f\x7f"):
        return Coverage.EMULATED
    if name == "movntdqa" and profile.emulates_avx:
        return Coverage.EMULATED
    if name in _HOST and profile.emulates_all_but_user:
        return Coverage.HOST
    if name in _REAL_MODE_ONLY or name == "cmpxchg16b":
        return Coverage.UNHANDLED
    return Coverage.UNDECODED


def _nesting(insn: Instruction) -> int:
    level = insn.operands[1]
    return level.value & 31 if isinstance(level, Immediate) else 0


def lacked_feature(insn: Instruction) -> str | None:
    """The field of Features without which the emulator raises #UD for the instruction."""
    return _BY_FEATURE.get(insn.name)


STANDARD_WRITES: Final = frozenset({"sgdt", "sidt", "fxsave", "fxsave64"})
"""Stores by ``write_std``: marked dirty, unheard by track_write (12.4)."""
GATHERED: Final = frozenset({"fxsave", "fxsave64"})
"""Instructions whose stores are one write."""
LENIENT: Final = frozenset({"fxsave", "fxsave64", "fxrstor", "fxrstor64"})
"""Those of the host's own that take any alignment."""
READ_FIRST: Final = frozenset({"sldt", "str"})
"""Plain stores that the emulator takes for updates: it reads their operand first."""
EXCHANGES: Final = frozenset({"xchg"})
"""Locked without a prefix."""


_TWO_MEMORY_OPERANDS: Final = frozenset({"movs", "cmps"})
_STRINGS: Final = frozenset({"movs", "cmps", "stos", "lods", "scas", "ins", "outs"})


def uses_exit_gpa(insn: Instruction) -> bool:
    """``emulator_can_use_gpa``: whether the fault's guest-physical address stands for the operand (12.4).

    It does not for a repeated string instruction, nor where there are two operands in memory.
    """
    if insn.name in _TWO_MEMORY_OPERANDS or (insn.rep and insn.name in _STRINGS):
        return False
    in_memory = any(isinstance(operand, Memory) for operand in insn.operands)
    return not (in_memory and insn.name in ("push", "pop"))


_PREFIXES: Final = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
_LOCK: Final = 0xF0
_NOT_IN_64_BIT: Final = frozenset(b"\x06\x07\x0e\x16\x17\x1e\x1f\x2f\x60\x61\x82\x9a\xce\xd4\xd5\xd6\xea")


def refuses(code: bytes) -> bool:
    """Whether the emulator knows undefined 64-bit code for what it is and raises #UD by itself.

    Opcodes that its tables mark as undefined, or as none of 64-bit mode, and LOCK where it is not allowed;
    of the others it says that it lacks them (measured on kvm_pvm, opcode by opcode).
    """
    at = 0
    while at < len(code) and code[at] in _PREFIXES:
        at += 1
    if _LOCK in code[:at]:
        return True
    if at < len(code) and code[at] & 0xF0 == 0x40:
        at += 1
    opcode, modrm = (*code[at : at + 2], 0, 0)[:2]
    if opcode in (0xC6, 0xC7):
        return bool(modrm & 0x38)
    return opcode in _NOT_IN_64_BIT or (opcode == 0xFF and modrm & 0x38 == 0x38)
