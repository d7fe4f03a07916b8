.include "pykvm.inc"
.include "modes.inc"
GUEST real, "stores through a segment, below 1 MiB", KIND_REAL

    .code16
entry:
    mov ax, 0x2000                      # linear 0x20000
    mov ds, ax
    STORE_AND_CHECK edi, 0
