.include "pykvm.inc"
.include "modes.inc"
GUEST pae, "stores through three levels of page tables", KIND_PAE

    .code32
entry:
    STORE_AND_CHECK edi, 0xc0000000
