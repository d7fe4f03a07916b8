.include "pykvm.inc"
.include "modes.inc"
GUEST protected32, "stores above 1 MiB without paging", KIND_PROTECTED32

    .code32
entry:
    STORE_AND_CHECK edi, 0x120000
