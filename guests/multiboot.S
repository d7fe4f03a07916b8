.include "pykvm.inc"

# A 32-bit ELF file (the multiboot specification, version 0.6.96): prints its command line to the first
# serial port and ends with status 0, or 1 if its loader is not a multiboot one.

.equ MAGIC, 0x1badb002
.equ FLAGS, 3                           # modules on page borders, memory information
.equ LOADER_MAGIC, 0x2badb002
.equ INFO_CMDLINE, 16
.equ COM1, 0x3f8
.equ LINE_STATUS, 5
.equ TRANSMITTER_EMPTY, 0x20

    .text
    .long MAGIC, FLAGS, -(MAGIC + FLAGS)
    .balign 16

GUEST multiboot, "prints its command line to the serial port", KIND_MULTIBOOT

    .code32
entry:
    mov ecx, 1                          # the exit status
    cmp eax, LOADER_MAGIC
    jne 3f
    mov esi, [ebx + INFO_CMDLINE]
1:
    mov dx, COM1 + LINE_STATUS
    in al, dx
    test al, TRANSMITTER_EMPTY
    jz 1b
    lodsb
    test al, al
    jz 2f
    mov dx, COM1
    out dx, al
    jmp 1b
2:
    mov dx, COM1
    mov al, '\n'
    out dx, al
    xor ecx, ecx
3:
    mov eax, ecx
    out DEBUG_EXIT_PORT, al
4:
    jmp 4b
