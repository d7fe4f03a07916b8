.include "pykvm.inc"
GUEST random, "visits pages at random, all with the same probability", KIND_WORKLOAD, 4

BEGIN
visit:
    RANDOM
    mov rax, r12
    PICK
    VISIT
    NEXT visit
END
