.include "pykvm.inc"
.include "modes.inc"
GUEST protected16, "stores above 1 MiB with 32-bit addresses from 16-bit code", KIND_PROTECTED16

    .code16
entry:
    STORE_AND_CHECK edi, 0x120000
