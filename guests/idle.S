.include "pykvm.inc"
GUEST idle, "mostly pauses, and visits a page at random now and then", KIND_WORKLOAD, 4

# ARGUMENT1: turns of the pause loop between two visits.

BEGIN
visit:
    RANDOM
    mov rax, r12
    PICK
    VISIT
    QUIET [rbp + BLOCK_ARGUMENT1]
    NEXT visit
END
