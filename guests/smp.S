.include "pykvm.inc"
GUEST smp, "like random, and all vCPUs count together with a locked add to one shared page", KIND_WORKLOAD, 5

# Each vCPU stamps pages of its own.  The count that it sees must grow: if the shared page were lost, it
# would fall back.

BEGIN
    push 0                              # the count seen last
visit:
    RANDOM
    mov rax, r12
    PICK
    VISIT
    mov rsi, [rbp + BLOCK_SHARED]
    mov edx, 1
    lock xadd [rsi], rdx
    mov rax, [rsp]
    cmp rdx, rax
    jae 1f
    call corruption
1:
    inc rdx
    mov [rsp], rdx
    NEXT visit
END
