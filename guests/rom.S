.include "pykvm.inc"
GUEST rom, "prints a line from the reset vector at the top of the first 4 GiB", KIND_ROM

# The last page of the segment that CS has after reset: base 0xffff0000, offsets 0xf000 to 0xffff.

    .code16
entry:
    mov al, 1
    out 0x80, al                        # POST code
    lea si, text
1:
    mov al, cs:[si]
    test al, al
    jz 2f
    out DEBUG_TEXT_PORT, al
    inc si
    jmp 1b
2:
    out DEBUG_EXIT_PORT, al
3:
    jmp 3b

text:
    .asciz "Hello from the reset vector.\n"

    .org 0xff0, 0xff
    jmp entry
    .org 0x1000, 0xff
