.include "pykvm.inc"
GUEST strings, "fills, copies and compares with rep stos, movs, scas and cmps across page borders", KIND_WORKLOAD, 1536

# A unit is four pages: 4 KiB of pattern from 0x800 on (two pages) and a copy of it from 0x2400 on (two
# more).  A visit compares all of both, then writes the next pattern and copies it.

.equ PATTERN, 0x800
.equ COPY, 0x2400
.equ WORDS, 512

BEGIN
    cld
visit:
    mov rdx, rbx
    imul rdx, r13
    add rdx, r10                        # RDX: the unit

    push [r11 + rbx * 8]
    mov rax, [rsp]
    imul rax, r8
    add rax, rdx
    imul rax, r9
    cmp qword ptr [rsp], 0
    jne 1f
    xor eax, eax                        # before the first visit everything is 0
1:
    lea rdi, [rdx + PATTERN]
    mov ecx, WORDS
    repe scasq
    je 2f
    lea rsi, [rdi - 8]
    mov rcx, [rsp]
    call corruption
2:
    lea rdi, [rdx + COPY]
    mov ecx, WORDS
    repe scasq
    je 3f
    lea rsi, [rdi - 8]
    mov rcx, [rsp]
    call corruption
3:
    inc qword ptr [rsp]
    mov rax, [rsp]
    imul rax, r8
    add rax, rdx
    imul rax, r9
    lea rdi, [rdx + PATTERN]
    mov ecx, WORDS
    rep stosq
    lea rsi, [rdx + PATTERN]
    lea rdi, [rdx + COPY]
    mov ecx, WORDS
    rep movsq
    lea rsi, [rdx + PATTERN]
    lea rdi, [rdx + COPY]
    mov ecx, WORDS
    repe cmpsq
    je 4f
    sub rsi, 8
    mov rcx, [rsp]
    call corruption
4:
    pop [r11 + rbx * 8]
    inc qword ptr [rbp + BLOCK_VISITS]
    inc rbx
    cmp rbx, r12
    jb 5f
    xor ebx, ebx
5:
    NEXT visit
END
