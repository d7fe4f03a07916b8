.include "pykvm.inc"
.include "modes.inc"
GUEST la57, "stores to an address that only five levels of page tables can reach", KIND_LA57

    .code64
entry:
    STORE_AND_CHECK rdi, 0xf0000000000000
