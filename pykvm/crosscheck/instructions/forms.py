"""The instruction forms that cases are made of: the opcode maps of SDM vol. 2, appendix A, one row each.

A row: name, opcode (``66:0f6f`` with a mandatory prefix, ``50-57`` for a range), then words.  ``/r`` takes a
ModR/M byte, ``/0`` to ``/7`` one with that opcode extension; ``reg`` and ``mem`` restrict it.  Immediates:
``ib``, ``iw``, ``iz`` (2 or 4 bytes by operand size), ``iv`` (8 with REX.W), ``moffs``, ``ptr`` (offset and
selector), ``jb``, ``jz`` (displacements).  ``64``, ``!64``, ``16``, ``!16`` say in which code it exists.
Others: ``byte``: no operand sizes; ``string``; ``stack``; ``sse``, ``mmx``, ``x87``: floating-point state
takes part;
``sel``: an operand is a selector; ``count``: CL or an immediate counts; ``protected``: not in real mode;
``cpl0``: only where everything is allowed; ``user``: only at CPL 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pykvm.crosscheck.instructions import forms_float, forms_sse


@dataclass(frozen=True, slots=True)
class Form:
    """One opcode with one shape of operands; ``words`` are those of its row."""

    name: str
    prefix: int | None
    opcode: bytes
    modrm: str
    words: frozenset[str]

    @property
    def extension(self) -> int | None:
        """The opcode extension in ModR/M.reg, or None."""
        return int(self.modrm[1]) if self.modrm[1:].isdigit() else None

    @property
    def id(self) -> str:
        """The form's row in the coverage table."""
        prefix = f"{self.prefix:02X} " if self.prefix is not None else ""
        extension = f" {self.modrm}" if self.extension is not None else ""
        if self.vex is not None:
            return f"VEX.{('NP', '66', 'F3', 'F2')[self.vex]}.0F38 {self.opcode.hex().upper()}{extension}"
        return f"{prefix}{self.opcode.hex(' ').upper()}{extension}"

    @property
    def vex(self) -> int | None:
        """VEX.pp of a VEX-encoded form, all of which are in map 0F 38."""
        return next((int(word[2:]) for word in self.words if word[:2] == "pp"), None)

    @property
    def floating(self) -> bool:
        """Whether floating-point state takes part."""
        return bool(self.words & {"sse", "mmx", "x87"})

    def exists(self, mode: int, cpl: int) -> bool:
        """Whether cases of that mode and privilege use it."""
        words = self.words
        return not (
            ("64" in words and mode != 64)
            or ("!64" in words and mode == 64)
            or ("16" in words and mode != 16)
            or ("!16" in words and mode == 16)
            or ("protected" in words and mode == 16)
            or ("cpl0" in words and cpl)
            or ("user" in words and cpl != 3)
        )


_ALU: Final = "\n".join(
    f"""
    {name} {8 * number:02x} /r byte
    {name} {8 * number + 1:02x} /r
    {name} {8 * number + 2:02x} /r byte
    {name} {8 * number + 3:02x} /r
    {name} {8 * number + 4:02x} ib byte
    {name} {8 * number + 5:02x} iz
    {name} 80 /{number} ib byte
    {name} 81 /{number} iz
    {name} 82 /{number} ib byte !64
    {name} 83 /{number} ib"""
    for number, name in enumerate(("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp"))
)

_SHIFTS: Final = "\n".join(
    f"""
    {name} c0 /{number} ib byte count
    {name} c1 /{number} ib count
    {name} d0 /{number} byte
    {name} d1 /{number}
    {name} d2 /{number} byte count
    {name} d3 /{number} count"""
    for number, name in enumerate(("rol", "ror", "rcl", "rcr", "shl", "shr", "sal", "sar"))
)

_CONDITIONS: Final = "\n".join(
    f"""
    j{name} {0x70 + number:02x} jb
    j{name} 0f{0x80 + number:02x} jz
    set{name} 0f{0x90 + number:02x} /r byte
    cmov{name} 0f{0x40 + number:02x} /r"""
    for number, name in enumerate(
        ("o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g")
    )
)

_GENERAL: Final = """
    push 50-57 stack
    pop 58-5f stack
    inc 40-47 !64
    dec 48-4f !64
    push_sreg 06 stack !64
    push_sreg 0e stack !64
    push_sreg 16 stack !64
    push_sreg 1e stack !64
    push_sreg 0fa0 stack
    push_sreg 0fa8 stack
    pop_sreg 07 stack sel !64
    pop_sreg 17 stack sel !64
    pop_sreg 1f stack sel !64
    pop_sreg 0fa1 stack sel
    pop_sreg 0fa9 stack sel
    pusha 60 stack !64
    popa 61 stack !64
    bound 62 /r mem !64
    arpl 63 /r !64 protected sel
    movsxd 63 /r 64
    push 68 iz stack
    push 6a ib stack
    imul 69 /r iz
    imul 6b /r ib
    imul 0faf /r
    test 84 /r byte
    test 85 /r
    xchg 86 /r byte
    xchg 87 /r
    mov 88 /r byte
    mov 89 /r
    mov 8a /r byte
    mov 8b /r
    mov_sreg 8c /r
    mov_sreg 8e /r sel
    lea 8d /r
    pop 8f /0 stack
    xchg 90-97
    cbw 98
    cwd 99
    pushf 9c stack
    popf 9d stack
    sahf 9e
    lahf 9f
    mov a0 moffs byte
    mov a1 moffs
    mov a2 moffs byte
    mov a3 moffs
    movs a4 string byte
    movs a5 string
    cmps a6 string byte
    cmps a7 string
    test a8 ib byte
    test a9 iz
    stos aa string byte
    stos ab string
    lods ac string byte
    lods ad string
    scas ae string byte
    scas af string
    mov b0-b7 ib byte
    mov b8-bf iv
    ret c2 iw stack
    ret c3 stack
    les c4 /r mem !64 sel
    lds c5 /r mem !64 sel
    lss 0fb2 /r mem sel
    lfs 0fb4 /r mem sel
    lgs 0fb5 /r mem sel
    mov c6 /0 ib byte
    mov c7 /0 iz
    enter c8 iw ib stack
    leave c9 stack
    retf ca iw stack sel
    retf cb stack sel
    int3 cc
    int cd ib 16 stack
    into ce !64
    iret cf stack sel
    aam d4 ib byte !64
    aad d5 ib byte !64
    salc d6 byte !64
    xlat d7 byte
    daa 27 byte !64
    das 2f byte !64
    aaa 37 byte !64
    aas 3f byte !64
    loopne e0 jb
    loope e1 jb
    loop e2 jb
    jrcxz e3 jb
    call e8 jz stack
    jmp e9 jz
    jmp eb jb
    lcall 9a ptr stack sel !64
    ljmp ea ptr sel !64
    hlt f4
    cmc f5
    clc f8
    stc f9
    cli fa
    sti fb
    cld fc
    std fd
    test f6 /0 ib byte
    test f6 /1 ib byte
    not f6 /2 byte
    neg f6 /3 byte
    mul f6 /4 byte
    imul f6 /5 byte
    div f6 /6 byte
    idiv f6 /7 byte
    test f7 /0 iz
    test f7 /1 iz
    not f7 /2
    neg f7 /3
    mul f7 /4
    imul f7 /5
    div f7 /6
    idiv f7 /7
    inc fe /0 byte
    dec fe /1 byte
    inc ff /0
    dec ff /1
    call ff /2 stack
    lcall ff /3 stack sel
    jmp ff /4
    ljmp ff /5 sel
    push ff /6 stack
    ud ff /7
    ud fe /2
    ud c6 /1
    ud c7 /3
    ud 8f /5
    movzx 0fb6 /r
    movzx 0fb7 /r
    movsx 0fbe /r
    movsx 0fbf /r
    bt 0fa3 /r
    bts 0fab /r
    btr 0fb3 /r
    btc 0fbb /r
    bt 0fba /4 ib
    bts 0fba /5 ib
    btr 0fba /6 ib
    btc 0fba /7 ib
    ud 0fba /0 ib
    bsf 0fbc /r
    bsr 0fbd /r
    tzcnt f3:0fbc /r
    lzcnt f3:0fbd /r
    popcnt f3:0fb8 /r
    shld 0fa4 /r ib count
    shld 0fa5 /r count
    shrd 0fac /r ib count
    shrd 0fad /r count
    cmpxchg 0fb0 /r byte
    cmpxchg 0fb1 /r
    xadd 0fc0 /r byte
    xadd 0fc1 /r
    cmpxchg8b 0fc7 /1 mem
    bswap 0fc8-0fcf
    movnti 0fc3 /r mem
    movbe 0f38f0 /r mem
    movbe 0f38f1 /r mem
    crc32 f2:0f38f0 /r byte
    crc32 f2:0f38f1 /r
    adcx 66:0f38f6 /r
    adox f3:0f38f6 /r
    nop 0f1f /0
    nop 0f18 /0 mem
    prefetchw 0f0d /1 mem
    ud2 0f0b
    ud1 0fb9 /r
    lar 0f02 /r protected sel
    lsl 0f03 /r protected sel
    verr 0f00 /4 protected sel
    verw 0f00 /5 protected sel
    lldt 0f00 /2 protected user
    ltr 0f00 /3 protected user
    lgdt 0f01 /2 mem user
    lidt 0f01 /3 mem user
    lmsw 0f01 /6 user
    invlpg 0f01 /7 mem user
    sldt 0f00 /0 protected cpl0
    str 0f00 /1 protected cpl0
    sgdt 0f01 /0 mem cpl0
    sidt 0f01 /1 mem cpl0
    smsw 0f01 /4 cpl0
    invlpg 0f01 /7 mem cpl0
    clts 0f06
    invd 0f08 user
    wbinvd 0f09
    mov_cr 0f20 /0 reg
    mov_cr 0f20 /2 reg
    mov_cr 0f20 /3 reg
    mov_cr 0f20 /4 reg
    mov_cr 0f22 /0 reg user
    mov_dr 0f21 /7 reg
    mov_dr 0f23 /7 reg user
    rdmsr 0f32 user
    wrmsr 0f30 user
    lfence 0fae /5 reg
    mfence 0fae /6 reg
    sfence 0fae /7 reg
    clflush 0fae /7 mem
"""

_VEX: Final = """
    andn f2:0 vex protected
    bzhi f5:0 vex protected
    bextr f7:0 vex protected
    shlx f7:1 vex protected
    sarx f7:2 vex protected
    shrx f7:3 vex protected
    pext f5:2 vex protected
    pdep f5:3 vex protected
    mulx f6:3 vex protected
    blsr f3:0 /1 vex protected
    blsmsk f3:0 /2 vex protected
    blsi f3:0 /3 vex protected
"""
"""VEX-encoded general-purpose instructions in map 0F 38: opcode, VEX.pp."""


def _span(text: str) -> list[bytes]:
    first, _, last = text.partition("-")
    start = bytes.fromhex(first)
    end = bytes.fromhex(last) if last else start
    return [start[:-1] + bytes([number]) for number in range(start[-1], end[-1] + 1)]


def _parse(text: str) -> list[Form]:
    forms = []
    for line in text.splitlines():
        if not line.strip():
            continue
        name, code, *words = line.split()
        if "vex" in words:
            opcode, pp = code.split(":")
            modrm = next((word for word in words if word[0] == "/"), "/r")
            words = [*words, f"pp{pp}"]
            forms.append(Form(name, None, bytes.fromhex(opcode), modrm, frozenset(words)))
            continue
        prefix, _, opcodes = code.rpartition(":")
        modrm = next((word for word in words if word[0] == "/"), "")
        mandatory = int(prefix, 16) if prefix else None
        rest = frozenset(words) - {modrm}
        forms += [Form(name, mandatory, each, modrm, rest) for each in _span(opcodes)]
    return forms


def _spans(prefixes: tuple[str, ...], escape: str, spans: str) -> list[Form]:
    rows = []
    for span in spans.split():
        for opcode in _span(span):
            for prefix in prefixes:
                kind = "sse" if prefix else "mmx"
                colon = f"{prefix}:" if prefix else ""
                rows.append(f"p{opcode.hex()} {colon}{escape}{opcode.hex()} /r {kind}")
    return _parse("\n".join(rows))


def _all_four(text: str) -> list[Form]:
    rows = []
    for line in text.split("\n"):
        if line.strip():
            opcode, name = line.split()
            for prefix, suffix in (("", "ps"), ("66:", "pd"), ("f3:", "ss"), ("f2:", "sd")):
                rows.append(f"{name}{suffix} {prefix}0f{opcode} /r sse")
    return _parse("\n".join(rows))


FORMS: Final = tuple(
    _parse(_ALU)
    + _parse(_SHIFTS)
    + _parse(_CONDITIONS)
    + _parse(_GENERAL)
    + _parse(_VEX)
    + _parse(forms_sse.SSE)
    + _spans(("", "66"), "0f", forms_sse.MMX_AND_SSE)
    + _spans(("", "66"), "0f38", forms_sse.SSSE3)
    + _spans(("66",), "0f38", forms_sse.SSE41)
    + _parse(forms_float.SSE)
    + _all_four(forms_float.ALL_FOUR)
    + _parse(forms_float.X87)
)
"""Every form that the generator knows."""
