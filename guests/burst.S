.include "pykvm.inc"
GUEST burst, "bursts of visits at random, with quiet phases between them", KIND_WORKLOAD, 4

# ARGUMENT0: visits in a burst.  ARGUMENT1: turns of the pause loop in a quiet phase.

BEGIN
burst:
    push qword ptr [rbp + BLOCK_ARGUMENT0]
visit:
    RANDOM
    mov rax, r12
    PICK
    VISIT
    dec qword ptr [rsp]
    jnz 1f
    pop rax
    QUIET [rbp + BLOCK_ARGUMENT1]
    push qword ptr [rbp + BLOCK_ARGUMENT0]
1:
    NEXT visit
END
