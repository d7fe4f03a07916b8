"""The MMX, SSE and x87 rows of the table of forms; see forms.py."""

from __future__ import annotations

from typing import Final

MMX_AND_SSE: Final = """
    60-6b d1-d5 d8-df e0-e5 e8-ef f1-f6 f8-fe 74-76
"""
"""Opcodes in map 0F that work on MMX registers, and with 66 on XMM registers."""

SSE: Final = """
    movups 0f10 /r sse
    movups 0f11 /r sse
    movss f3:0f10 /r sse
    movss f3:0f11 /r sse
    movupd 66:0f10 /r sse
    movupd 66:0f11 /r sse
    movsd f2:0f10 /r sse
    movsd f2:0f11 /r sse
    movlps 0f12 /r sse
    movlps 0f13 /r mem sse
    movlpd 66:0f12 /r mem sse
    movlpd 66:0f13 /r mem sse
    movsldup f3:0f12 /r sse
    movddup f2:0f12 /r sse
    unpcklps 0f14 /r sse
    unpcklpd 66:0f14 /r sse
    unpckhps 0f15 /r sse
    unpckhpd 66:0f15 /r sse
    movhps 0f16 /r sse
    movhps 0f17 /r mem sse
    movhpd 66:0f16 /r mem sse
    movhpd 66:0f17 /r mem sse
    movshdup f3:0f16 /r sse
    movaps 0f28 /r sse
    movaps 0f29 /r sse
    movapd 66:0f28 /r sse
    movapd 66:0f29 /r sse
    movntps 0f2b /r mem sse
    movntpd 66:0f2b /r mem sse
    movmskps 0f50 /r reg sse
    movmskpd 66:0f50 /r reg sse
    andps 0f54 /r sse
    andpd 66:0f54 /r sse
    andnps 0f55 /r sse
    andnpd 66:0f55 /r sse
    orps 0f56 /r sse
    orpd 66:0f56 /r sse
    xorps 0f57 /r sse
    xorpd 66:0f57 /r sse
    punpcklqdq 66:0f6c /r sse
    punpckhqdq 66:0f6d /r sse
    movd 0f6e /r mmx
    movd 66:0f6e /r sse
    movq 0f6f /r mmx
    movdqa 66:0f6f /r sse
    movdqu f3:0f6f /r sse
    pshufw 0f70 /r ib mmx
    pshufd 66:0f70 /r ib sse
    pshufhw f3:0f70 /r ib sse
    pshuflw f2:0f70 /r ib sse
    psrlw 0f71 /2 reg ib mmx
    psraw 0f71 /4 reg ib mmx
    psllw 0f71 /6 reg ib mmx
    psrld 0f72 /2 reg ib mmx
    psrad 0f72 /4 reg ib mmx
    pslld 0f72 /6 reg ib mmx
    psrlq 0f73 /2 reg ib mmx
    psllq 0f73 /6 reg ib mmx
    psrlw 66:0f71 /2 reg ib sse
    psraw 66:0f71 /4 reg ib sse
    psllw 66:0f71 /6 reg ib sse
    psrld 66:0f72 /2 reg ib sse
    psrad 66:0f72 /4 reg ib sse
    pslld 66:0f72 /6 reg ib sse
    psrlq 66:0f73 /2 reg ib sse
    psrldq 66:0f73 /3 reg ib sse
    psllq 66:0f73 /6 reg ib sse
    pslldq 66:0f73 /7 reg ib sse
    emms 0f77 mmx
    movd 0f7e /r mmx
    movd 66:0f7e /r sse
    movq f3:0f7e /r sse
    movq 0f7f /r mmx
    movdqa 66:0f7f /r sse
    movdqu f3:0f7f /r sse
    pinsrw 0fc4 /r ib mmx
    pinsrw 66:0fc4 /r ib sse
    pextrw 0fc5 /r reg ib mmx
    pextrw 66:0fc5 /r reg ib sse
    shufps 0fc6 /r ib sse
    shufpd 66:0fc6 /r ib sse
    movq 66:0fd6 /r sse
    movq2dq f3:0fd6 /r reg sse
    movdq2q f2:0fd6 /r reg sse
    pmovmskb 0fd7 /r reg mmx
    pmovmskb 66:0fd7 /r reg sse
    movntq 0fe7 /r mem mmx
    movntdq 66:0fe7 /r mem sse
    lddqu f2:0ff0 /r mem sse
    maskmovq 0ff7 /r reg mmx
    maskmovdqu 66:0ff7 /r reg sse
    palignr 0f3a0f /r ib mmx
    palignr 66:0f3a0f /r ib sse
    pextrb 66:0f3a14 /r ib sse
    pextrw 66:0f3a15 /r ib sse
    pextrd 66:0f3a16 /r ib sse
    extractps 66:0f3a17 /r ib sse
    pinsrb 66:0f3a20 /r ib sse
    insertps 66:0f3a21 /r ib sse
    pinsrd 66:0f3a22 /r ib sse
    blendps 66:0f3a0c /r ib sse
    blendpd 66:0f3a0d /r ib sse
    pblendw 66:0f3a0e /r ib sse
    mpsadbw 66:0f3a42 /r ib sse
    pcmpestrm 66:0f3a60 /r ib sse
    pcmpestri 66:0f3a61 /r ib sse
    pcmpistrm 66:0f3a62 /r ib sse
    pcmpistri 66:0f3a63 /r ib sse
    pblendvb 66:0f3810 /r sse
    blendvps 66:0f3814 /r sse
    blendvpd 66:0f3815 /r sse
    ptest 66:0f3817 /r sse
    movntdqa 66:0f382a /r mem sse
    ldmxcsr 0fae /2 mem sse
    stmxcsr 0fae /3 mem sse
    fxsave 0fae /0 mem sse
    fninit dbe3 x87
    fnclex dbe2 x87
    fwait 9b x87
    fnstcw d9 /7 mem x87
    fldcw d9 /5 mem x87
    fnstsw dd /7 mem x87
    fnstsw dfe0 x87
"""
SSSE3: Final = "00-0b 1c-1e"
"""In map 0F 38, on MMX and XMM registers."""
SSE41: Final = "20-25 28-29 2b 30-35 37-41"
"""In map 0F 38 with 66."""
