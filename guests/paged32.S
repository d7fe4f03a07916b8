.include "pykvm.inc"
.include "modes.inc"
GUEST paged32, "stores through two levels of page tables", KIND_PAGED32

    .code32
entry:
    STORE_AND_CHECK edi, 0xc0000000
