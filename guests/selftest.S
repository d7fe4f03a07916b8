.include "pykvm.inc"
.include "selftest.inc"
.equ LAST_STAGE, 26

GUEST selftest, "tests a processor by itself from the reset vector, a POST code a stage", KIND_ROM

# 64 KiB at the top of the first 4 GiB, which a PC shows below 1 MiB, too.  Each stage compares what the
# processor does with what the SDM says, starts and ends in real mode, and needs none of the others.  Ends
# with status 0 by the debug-exit port, or with the number of the stage that failed; the check's number
# within the stage is then on CHECK_PORT.  A stage whose bit is 0 in the word read from STAGES_PORT is left
# out; nobody there reads as all ones.

    .code16
entry:
    cli
    cld
    xor ax, ax
    mov ds, ax
    mov dx, STAGES_PORT
    in eax, dx
    mov [STAGES], eax
    mov byte ptr [STAGE], 0
next_stage:
    call real_mode_as_after_reset
    inc byte ptr [STAGE]
    movzx eax, byte ptr [STAGE]
    cmp al, LAST_STAGE
    ja passed
    bt dword ptr [STAGES], eax
    jnc next_stage
    mov dx, STAGES_PORT
    out dx, al
    out POST_PORT, al
    add ax, ax
    mov bx, ax
    call cs:[stages + bx - 2]
    jmp next_stage

passed:
    mov al, 0xff
    out POST_PORT, al
    mov al, 0

# EAX: the check's number << 8 | the stage.  These bytes mean the same in code of all sizes.
failed_with_status:
    out DEBUG_EXIT_PORT, al
1:
    hlt
    jmp 1b
failed:
    mov bl, al
    mov al, ah
    out CHECK_PORT, al
    mov al, bl
    jmp failed_with_status

stages:
    .short conditions, arithmetic, multiply, shifts, bits, decimal, strings
    .short far_transfers, stack, nested_frames, interrupts, traps
    .short protected_mode, segment_loads, limits, selectors, far_code, rings
    .short tasks, virtual_8086, paging, large_pages, physical_address_extension
    .short long_mode, long_gates, fast_calls
    .if LAST_STAGE - (. - stages) / 2
    .error "LAST_STAGE is not the number of stages"
    .endif

.include "selftest_tables.inc"
.include "selftest_integer.inc"
.include "selftest_real.inc"
.include "selftest_protected.inc"
.include "selftest_rings.inc"
.include "selftest_tasks.inc"
.include "selftest_paging.inc"
.include "selftest_long.inc"
.include "selftest_fast.inc"

    .org 0xfff0, 0xff
    .code16
    ljmp ROM_SEGMENT, offset entry
    .org 0x10000, 0xff
