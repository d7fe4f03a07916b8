.include "pykvm.inc"
GUEST stride, "visits pages a fixed distance apart, all of them in the end", KIND_WORKLOAD, 4

# ARGUMENT0: the distance in pages, below and without common divisor with the number of pages.

BEGIN
visit:
    VISIT
    add rbx, [rbp + BLOCK_ARGUMENT0]
    cmp rbx, r12
    jb 1f
    sub rbx, r12
1:
    NEXT visit
END
