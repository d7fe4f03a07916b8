"""The rows of the table of forms that compute with floating point: SSE and x87; see forms.py."""

from __future__ import annotations

from typing import Final

ALL_FOUR: Final = """
    51 sqrt
    58 add
    59 mul
    5c sub
    5d min
    5e div
    5f max
"""
"""Opcodes in map 0F that have packed and scalar forms of both precisions."""

SSE: Final = """
    cvtpi2ps 0f2a /r sse
    cvtpi2pd 66:0f2a /r sse
    cvtsi2ss f3:0f2a /r sse
    cvtsi2sd f2:0f2a /r sse
    cvttps2pi 0f2c /r sse
    cvttpd2pi 66:0f2c /r sse
    cvttss2si f3:0f2c /r sse
    cvttsd2si f2:0f2c /r sse
    cvtps2pi 0f2d /r sse
    cvtpd2pi 66:0f2d /r sse
    cvtss2si f3:0f2d /r sse
    cvtsd2si f2:0f2d /r sse
    ucomiss 0f2e /r sse
    ucomisd 66:0f2e /r sse
    comiss 0f2f /r sse
    comisd 66:0f2f /r sse
    cvtps2pd 0f5a /r sse
    cvtpd2ps 66:0f5a /r sse
    cvtss2sd f3:0f5a /r sse
    cvtsd2ss f2:0f5a /r sse
    cvtdq2ps 0f5b /r sse
    cvtps2dq 66:0f5b /r sse
    cvttps2dq f3:0f5b /r sse
    haddpd 66:0f7c /r sse
    haddps f2:0f7c /r sse
    hsubpd 66:0f7d /r sse
    hsubps f2:0f7d /r sse
    cmpps 0fc2 /r ib sse
    cmppd 66:0fc2 /r ib sse
    cmpss f3:0fc2 /r ib sse
    cmpsd f2:0fc2 /r ib sse
    addsubpd 66:0fd0 /r sse
    addsubps f2:0fd0 /r sse
    cvttpd2dq 66:0fe6 /r sse
    cvtdq2pd f3:0fe6 /r sse
    cvtpd2dq f2:0fe6 /r sse
    roundps 66:0f3a08 /r ib sse
    roundpd 66:0f3a09 /r ib sse
    roundss 66:0f3a0a /r ib sse
    roundsd 66:0f3a0b /r ib sse
    dpps 66:0f3a40 /r ib sse
    dppd 66:0f3a41 /r ib sse
"""

X87: Final = """
    fld d9 /0 x87
    fxch d9 /1 reg x87
    fst d9 /2 mem x87
    fstp d9 /3 mem x87
    fnstenv d9 /6 mem x87
    fnop d9d0 x87
    fchs d9e0 x87
    fabs d9e1 x87
    ftst d9e4 x87
    fxam d9e5 x87
    fconst d9e8-d9ee x87
    fdecstp d9f6 x87
    fincstp d9f7 x87
    fsqrt d9fa x87
    frndint d9fc x87
    fcmovb da /0 x87
    fcmove da /1 x87
    fcmovbe da /2 x87
    fcmovu da /3 x87
    fisub da /4 mem x87
    fisubr da /5 mem x87
    fidiv da /6 mem x87
    fidivr da /7 mem x87
    fucompp dae9 x87
    fild db /0 x87
    fisttp db /1 x87
    fist db /2 x87
    fistp db /3 x87
    fucomi db /5 x87
    fcomi db /6 reg x87
    fstp db /7 mem x87
    fld dd /0 x87
    fisttp dd /1 mem x87
    fst dd /2 x87
    fstp dd /3 x87
    fucom dd /4 reg x87
    fucomp dd /5 reg x87
    fnsave dd /6 mem x87
    fiadd de /0 x87
    fimul de /1 x87
    ficom de /2 mem x87
    ficomp de /3 mem x87
    fcompp ded9 x87
    fisub de /4 x87
    fisubr de /5 x87
    fidiv de /6 x87
    fidivr de /7 x87
    fild df /0 mem x87
    fisttp df /1 mem x87
    fist df /2 mem x87
    fistp df /3 mem x87
    fbld df /4 mem x87
    fild df /5 x87
    fbstp df /6 mem x87
    fucomip df /5 reg x87
    fcomip df /6 reg x87
    fistp df /7 mem x87
""" + "\n".join(
    f"    {name} d8 /{number} x87\n    {name} dc /{number} x87"
    for number, name in enumerate(("fadd", "fmul", "fcom", "fcomp", "fsub", "fsubr", "fdiv", "fdivr"))
)
"""Without the transcendental functions, whose last bits are the processor's own."""
