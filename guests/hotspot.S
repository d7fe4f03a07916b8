.include "pykvm.inc"
GUEST hotspot, "most visits go to a small hot set, the others to a long tail", KIND_WORKLOAD, 4

# ARGUMENT0: how many pages are hot (the first ones).  ARGUMENT1: chance of a hot visit, in units of 2^-32.

BEGIN
visit:
    RANDOM
    mov rax, r12
    cmp r14d, [rbp + BLOCK_ARGUMENT1]
    cmovb rax, [rbp + BLOCK_ARGUMENT0]
    PICK
    VISIT
    NEXT visit
END
