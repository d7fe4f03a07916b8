.include "pykvm.inc"
.include "modes.inc"
GUEST long, "stores through four levels of page tables", KIND_LONG

    .code64
entry:
    STORE_AND_CHECK rdi, 0x700000000000
