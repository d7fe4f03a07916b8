.include "pykvm.inc"
GUEST sequential, "visits every page in ascending order", KIND_WORKLOAD, 4

BEGIN
visit:
    VISIT
    inc rbx
    cmp rbx, r12
    jb 1f
    xor ebx, ebx
1:
    NEXT visit
END
