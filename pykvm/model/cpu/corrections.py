"""Where capstone's reading of an encoding differs from processors', and how it is put right.

``shown`` changes the bytes before capstone sees them, ``correct`` what it made of them.  Each rule names its
source; "host" means that it was seen on a processor (AMD Zen 4).  tests/model/test_decode.py holds an
example of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import capstone
from capstone import x86

from pykvm.model.cpu.instruction import ControlRegister, Immediate, Memory, Operand, Register
from pykvm.model.cpu.prefixes import InvalidEncodingError, Prefixes

_CODE_64: Final = 64
_STRINGS: Final = frozenset((*range(0x6C, 0x70), *range(0xA4, 0xA8), *range(0xAA, 0xB0)))
_NOP: Final = 0x90
_VEX_LENGTHS: Final = {0xC4: 5, 0xC5: 4, 0x62: 6}
"""VEX and EVEX prefixes, and the bytes of the shortest instruction with them."""
_REGISTER_FORM: Final = 0xC0
_X87_ALIASES: Final = {
    (0xDC, 2): (0xD8, 2),  # FCOM
    (0xDC, 3): (0xD8, 3),  # FCOMP
    (0xDD, 1): (0xD9, 1),  # FXCH
    (0xDE, 2): (0xD8, 3),  # FCOMP
    (0xDF, 1): (0xD9, 1),  # FXCH
    (0xDF, 2): (0xDD, 3),  # FSTP
    (0xDF, 3): (0xDD, 3),  # FSTP
}
"""Register forms by opcode and reg field that repeat another one (APM vol. 3, table A-15: reserved; host)."""
_EXTENSIONS: Final = """
    vmread vmwrite vmxon vmxoff vmclear vmptrld vmptrst vmlaunch vmresume vmfunc invept invvpid getsec
    rsm encls enclu enclv vmrun vmload vmsave stgi clgi skinit invlpga xbegin xend xabort xtest
    incsspd incsspq saveprevssp rstorssp wrssd wrssq wrussd wrussq setssbsy clrssbsy
    umonitor umwait tpause monitorx mwaitx ptwrite movdiri movdir64b enqcmd enqcmds
    femms montmul xsha1 xsha256 xstore xcryptecb xcryptcbc xcryptctr xcryptcfb xcryptofb
"""
_ABSENT: Final = frozenset(_EXTENSIONS.split())
"""Instructions of extensions that the processor never offers (VMX, SVM, SMX, SGX, TSX, CET, WAITPKG, 3DNow!,
PadLock …): #UD rather than missing semantics."""


def _opcodes(*bytes_of_one: int) -> tuple[bytes, ...]:
    return tuple(bytes([each]) for each in bytes_of_one)


def _two_byte(*second: int) -> tuple[bytes, ...]:
    return tuple(bytes([0x0F, each]) for each in second)


_SCANS: Final = frozenset(_two_byte(0xBC, 0xBD))
_COUNTS: Final = frozenset(_two_byte(0xB8, 0xBC, 0xBD))
_CRC32_OR_MOVBE: Final = frozenset({b"\x0f\x38\xf0", b"\x0f\x38\xf1"})
_GENERAL: Final = frozenset(
    _two_byte(0x02, 0x03, *range(0x18, 0x24), *range(0x40, 0x50), *range(0x80, 0xAE), 0xAF)
    + _two_byte(*range(0xB0, 0xB8), *range(0xBA, 0xBC), *range(0xBE, 0xC2), *range(0xC8, 0xD0))
)
"""Opcodes of the 0F map that no mandatory prefix turns into something else."""
_SSE: Final = frozenset(
    _two_byte(*range(0x10, 0x18), *range(0x28, 0x30), *range(0x50, 0x78), *range(0x7C, 0x80), 0xAE)
    + _two_byte(*range(0xC2, 0xC7), *range(0xD0, 0x100))
)
"""MMX and SSE opcodes of the 0F map, and the fences."""


# --- before capstone -------------------------------------------------------------------------------------


def least_length(body: bytes, bits: int) -> int:
    """How many bytes behind the prefixes are needed to know the opcode: with fewer nothing can be told."""
    if body[0] == 0x0F:
        return 3 if body[1:2] in {b"\x38", b"\x3a"} else 2
    if body[0] in _VEX_LENGTHS and bits != _CODE_64:
        return _VEX_LENGTHS[body[0]] if is_vex(body, bits) else 2
    return _VEX_LENGTHS.get(body[0], 1)


class Shown(NamedTuple):
    """What capstone decodes in place of the instruction: of equal length but for its prefixes."""

    prefixes: bytes
    body: bytes
    bits: int


def shown(found: Prefixes, body: bytes, bits: int, amd: bool) -> Shown:
    """The bytes to show capstone; ``found`` loses the prefixes that processors ignore.

    Raises InvalidEncodingError for what capstone accepts and processors do not.
    """
    if is_vex(body, bits):
        # SDM vol. 2, 2.3.2 to 2.3.4: LOCK, 66, F2, F3 and REX before VEX are #UD.
        if found.lock or found.mandatory or found.rex:
            raise InvalidEncodingError
        return Shown(found.canonical(), body, bits)
    if _is_near_branch(body):
        _drop_operand_size_of_branch(found, bits, amd)
        if _has_long_displacement(body):
            # There is no address: capstone takes 67 before these in 32-bit code for the operand size (host).
            found.address = False
        if bits == _CODE_64 and found.operand and _has_long_displacement(body):
            # AMD: a 16-bit displacement (APM vol. 3, "Near branches"; host), of which capstone knows only
            # in 16-bit code.
            found.rep = 0
            return Shown(b"", body, 16)
    if body[0] != 0x0F:
        body = _one_byte_body(found, body, amd)
        return Shown(_prefixes_of_one_byte_opcode(found, body[0], bits), body, bits)
    _drop_meaningless(found, body)
    body = _two_byte_body(found, body)
    if bits == 16 and _has_mandatory_prefixes(body):
        # In 16-bit code capstone takes a mandatory 66 for the operand size (host): decode as 32-bit code.
        return Shown(found.canonical(address=not found.address), body, 32)
    return Shown(found.canonical(), body, bits)


def _prefixes_of_one_byte_opcode(found: Prefixes, opcode: int, bits: int) -> bytes:
    """REX.W wins over 66 (SDM vol. 2, 2.2.1.2); F2 and F3 matter to string instructions and PAUSE alone.

    PAUSE is F3 90 without REX.B; 66 does nothing to it.
    """
    pause = opcode == _NOP and not found.rex & 1 and found.rep == 0xF3
    if opcode not in _STRINGS and not pause:
        found.rep = 0
    if found.wide or pause:
        found.operand = False
    if pause or (bits == _CODE_64 and opcode == 0x63):
        # capstone rejects the address-size prefix (host); MOVSXD's operand still follows it by its mask.
        return found.canonical(address=False)
    return found.canonical()


def _one_byte_body(found: Prefixes, body: bytes, amd: bool) -> bytes:
    """x87 instructions by their documented encoding; no XOP (8F with another reg field than POP's)."""
    if amd and body[0] in {0xE0, 0xE1} and found.rep:
        # F2 makes LOOPNE of both conditional loops, F3 LOOPE (host).
        return bytes([0xE0 if found.rep == 0xF2 else 0xE1]) + body[1:]
    if len(body) < 2:
        return body
    opcode, modrm = body[0], body[1]
    if opcode == 0x8F and modrm >> 3 & 7:
        raise InvalidEncodingError
    if modrm >= _REGISTER_FORM and (opcode, modrm >> 3 & 7) in _X87_ALIASES:
        opcode, extension = _X87_ALIASES[opcode, modrm >> 3 & 7]
        return bytes([opcode, _REGISTER_FORM | extension << 3 | modrm & 7]) + body[2:]
    return body


def _two_byte_body(found: Prefixes, body: bytes) -> bytes:
    """Reserved encodings of the 0F map, shown as the one that they are an alias of."""
    opcode, rest = body[1], body[2:]
    if not rest:
        return body
    modrm = rest[0]
    register_form = modrm >= _REGISTER_FORM
    if 0x18 <= opcode <= 0x1E:
        # Reserved NOPs; also MPX, CET and CLDEMOTE, which processors without them take as NOPs
        # (SDM vol. 2, appendix A, table A-6, group 16; host).
        return bytes([0x0F, 0x1F, modrm & 0xC7]) + rest[1:]
    if opcode == 0x0D and not register_form:
        # Prefetches: the reg field is a hint (APM vol. 3, PREFETCH; host).
        return bytes([0x0F, 0x0D, modrm & 0xC7]) + rest[1:]
    if found.mandatory and _takes_no_prefix(found, opcode, modrm):
        raise InvalidEncodingError
    if opcode == 0xAE and modrm >= 0xE8:
        # Fences ignore the r/m field (SDM vol. 2, LFENCE; host).
        return bytes([0x0F, 0xAE, modrm & 0xF8]) + rest[1:]
    return body


def _drop_meaningless(found: Prefixes, body: bytes) -> None:
    """Of the general instructions in the 0F maps F2 and F3 are no part, and REX.W wins over 66; capstone
    takes them for mandatory ones (SDM vol. 2, 2.2.1.2; host)."""
    opcode = opcode_bytes(body)
    counts = opcode in _COUNTS and found.rep == 0xF3  # POPCNT, TZCNT, LZCNT
    crc32 = opcode in _CRC32_OR_MOVBE and found.rep == 0xF2
    general = opcode in _GENERAL or (opcode in _SCANS and found.rep != 0xF3)
    if general:
        found.rep = 0
    if found.wide and (general or counts or crc32 or (opcode in _CRC32_OR_MOVBE and not found.rep)):
        found.operand = False


def _has_mandatory_prefixes(body: bytes) -> bool:
    """Whether 66, F2 and F3 select among SSE and MMX instructions: none depends on the operand size."""
    opcode = opcode_bytes(body)
    if len(opcode) == 3:
        return opcode not in _CRC32_OR_MOVBE
    return opcode in _SSE


def _takes_no_prefix(found: Prefixes, opcode: int, modrm: int) -> bool:
    """Opcodes marked NP (SDM vol. 2, 3.1.1.1), where capstone accepts a 66, F2 or F3 all the same (host)."""
    extension = modrm >> 3 & 7
    if opcode == 0xAE and modrm < _REGISTER_FORM:
        # FXSAVE to XRSTOR; 66 makes CLWB and CLFLUSHOPT of the last two.
        return found.rep != 0 or extension < 6
    if opcode == 0xAE:
        return extension >= 5  # fences; the prefixed ones belong to CET and WAITPKG
    return opcode == 0xC7 and extension in {3, 4, 5}  # XRSTORS, XSAVEC, XSAVES


def is_vex(body: bytes, bits: int) -> bool:
    """Whether C4, C5 or 62 is a VEX or EVEX prefix: outside 64-bit mode it is LES, LDS or BOUND with a
    memory operand (SDM vol. 2, 2.3.5)."""
    if body[0] not in _VEX_LENGTHS:
        return False
    return bits == _CODE_64 or (len(body) > 1 and body[1] >= _REGISTER_FORM)


def _is_near_branch(body: bytes) -> bool:
    first, second = body[0], body[1] if len(body) > 1 else 0
    return (
        first in {0xE8, 0xE9, 0xEB, 0xC2, 0xC3}
        or 0x70 <= first <= 0x7F
        or 0xE0 <= first <= 0xE3
        or (first == 0x0F and 0x80 <= second <= 0x8F)
        or (first == 0xFF and second >> 3 & 7 in {2, 4})
    )


def _has_long_displacement(body: bytes) -> bool:
    return body[0] in {0xE8, 0xE9, 0x0F}


def _drop_operand_size_of_branch(found: Prefixes, bits: int, amd: bool) -> None:
    """In 64-bit mode Intel processors ignore the operand-size prefix of near branches (SDM vol. 2, JMP, CALL,
    RET, Jcc: superscript f64), AMD's use a 16-bit offset (APM vol. 3, "Near branches")."""
    if bits == _CODE_64 and (not amd or found.wide):
        found.operand = False


# --- behind capstone -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Draft:
    """An instruction before its corrections; ``prefixes`` are those in force."""

    name: str
    operands: list[Operand]
    opcode: bytes
    modrm: int | None
    operand_size: int
    address_size: int
    bits: int
    amd: bool
    prefixes: Prefixes

    @property
    def extension(self) -> int:
        """The reg field of ModR/M, -1 without."""
        return -1 if self.modrm is None else self.modrm >> 3 & 7


def opcode_bytes(body: bytes) -> bytes:
    """The opcode at the start of an instruction without prefixes; of VEX encodings the prefix."""
    if body[0] != 0x0F:
        return body[:1]
    return body[:3] if body[1:2] in {b"\x38", b"\x3a"} else body[:2]


def is_relative(found: capstone.CsInsn) -> bool:
    """Whether the immediate is a branch target relative to the next instruction."""
    return x86.X86_GRP_BRANCH_RELATIVE in found.groups


_NAMES: Final = {
    opcode: name
    for name, opcodes in {
        # String instructions, which capstone calls by their size, some like an SSE instruction.
        "ins": _opcodes(0x6C, 0x6D),
        "outs": _opcodes(0x6E, 0x6F),
        "movs": _opcodes(0xA4, 0xA5),
        "cmps": _opcodes(0xA6, 0xA7),
        "stos": _opcodes(0xAA, 0xAB),
        "lods": _opcodes(0xAC, 0xAD),
        "scas": _opcodes(0xAE, 0xAF),
        # Instructions on segment, control and debug registers, which share a name with general ones.
        "mov_sreg": _opcodes(0x8C, 0x8E),
        "push_sreg": _opcodes(0x06, 0x0E, 0x16, 0x1E) + _two_byte(0xA0, 0xA8),
        "pop_sreg": _opcodes(0x07, 0x17, 0x1F) + _two_byte(0xA1, 0xA9),
        "mov_cr": _two_byte(0x20, 0x22),
        "mov_dr": _two_byte(0x21, 0x23),
        # One name for all operand sizes.
        "mov": _opcodes(*range(0xA0, 0xA4), *range(0xB8, 0xC0)),
        "pusha": _opcodes(0x60),
        "popa": _opcodes(0x61),
        "pushf": _opcodes(0x9C),
        "popf": _opcodes(0x9D),
        "iret": _opcodes(0xCF),
        "jrcxz": _opcodes(0xE3),
        "xlat": _opcodes(0xD7),
    }.items()
    for opcode in opcodes
}
"""Names by opcode, where capstone's tell too little or too much apart."""

_NAMES_BY_EXTENSION: Final = {(bytes([opcode]), 6): "shl" for opcode in (0xC0, 0xC1, *range(0xD0, 0xD4))} | {
    (b"\xff", 3): "lcall",
    (b"\xff", 5): "ljmp",
}
"""The same by opcode and the reg field of ModR/M: far forms, and the second encoding of SHL."""

_DEFAULT_64: Final = frozenset(
    _opcodes(*range(0x50, 0x60), 0x68, 0x6A, *range(0x70, 0x80), 0x8F, 0x9C, 0x9D)
    + _opcodes(0xC2, 0xC3, 0xC8, 0xC9, *range(0xE0, 0xE4), 0xE8, 0xE9, 0xEB)
    + _two_byte(*range(0x80, 0x90), 0xA0, 0xA1, 0xA8, 0xA9)
)
"""Opcodes with an operand size of 64 bits in 64-bit mode without REX.W: near branches, and all that use the
stack but far transfers (SDM vol. 1, 6.2.5; vol. 2, table A-1, superscripts d64 and f64)."""

_STACK_OPERAND: Final = frozenset({(b"\x8f", 0), (b"\xff", 2), (b"\xff", 4), (b"\xff", 6)})
"""POP, CALL, JMP and PUSH with ModR/M."""


_COMPARISONS: Final = {0xF3: "cmpss", 0xF2: "cmpsd", True: "cmppd", False: "cmpps"}
"""SSE comparisons by their mandatory prefix: F3 or F2 before 66."""


def correct(draft: Draft) -> None:
    """Put right what capstone made of the encoding."""
    draft.name = _NAMES.get(draft.opcode, draft.name)
    draft.name = _NAMES_BY_EXTENSION.get((draft.opcode, draft.extension), draft.name)
    stack_operand = (draft.opcode, draft.extension) in _STACK_OPERAND
    if draft.bits == _CODE_64 and (draft.opcode in _DEFAULT_64 or stack_operand):
        draft.operand_size = 2 if draft.prefixes.operand and not draft.prefixes.wide else 8
    if stack_operand:
        # capstone lets 66 win over REX.W, and ignores it for branches (APM vol. 3, "Near branches"; host).
        draft.operands = [resized(draft.operands[0], draft.operand_size)]
    elif draft.opcode == b"\xc8":
        # ENTER: capstone extends the unsigned immediates by their sign (SDM vol. 2, ENTER).
        draft.operands = [
            Immediate(each.value, size)
            for each, size in zip(draft.operands, (2, 1), strict=True)
            if isinstance(each, Immediate)
        ]
    elif draft.opcode == b"\x63" and draft.bits == _CODE_64:
        # MOVSXD with 66 has a 16-bit source (SDM vol. 2, MOVSXD); capstone says 32.
        draft.operands[1] = resized(draft.operands[1], min(draft.operand_size, 4))
    elif draft.opcode == b"\x0f\xc2":
        # capstone has one name for all four, and a mnemonic that tells the predicate (SDM vol. 2, CMPPS).
        draft.name = _COMPARISONS[draft.prefixes.rep or draft.prefixes.operand]
    elif draft.name == "mov_cr" and draft.amd and draft.prefixes.lock:
        # AMD: LOCK MOV CR0 is MOV CR8 (APM vol. 3, MOV CRn; host).
        draft.operands = [_alternate(each) for each in draft.operands]
        draft.prefixes.lock = False


def is_absent(name: str, body: bytes, bits: int) -> bool:
    """Whether an instruction without semantics is undefined: also all that need XCR0.AVX or more."""
    return name in _ABSENT or is_vex(body, bits)


def resized(operand: Operand, size: int) -> Operand:
    """The same register or memory operand of another size (2, 4 or 8)."""
    if operand.size == size:
        return operand
    if isinstance(operand, Register):
        return Register(operand.index, size)
    assert isinstance(operand, Memory)
    return Memory(
        operand.base,
        operand.index,
        operand.scale,
        operand.displacement,
        operand.segment,
        operand.mask,
        size,
    )


def _alternate(operand: Operand) -> Operand:
    return ControlRegister(operand.index + 8) if isinstance(operand, ControlRegister) else operand
