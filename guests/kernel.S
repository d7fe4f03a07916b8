.include "pykvm.inc"

# A multiboot kernel with descriptor tables, handlers, page tables and a task at CPL 3 of its own.  It goes from
# flat 32-bit code over both kinds of 32-bit paging to long mode, and in each of these takes exceptions, maps
# pages on demand in its page-fault handler, and serves a user's INT 0x80.  A line to the serial port says what
# worked; status 0 if all did, 1 after the first thing that did not.
#
# Flat, with addresses in its header, since one ELF file cannot hold 32- and 64-bit code for a multiboot loader.

.equ MAGIC, 0x1badb002
.equ FLAGS, 0x10003                     # modules on page borders, memory information, addresses below
.equ LOADER_MAGIC, 0x2badb002
.equ COM1, 0x3f8
.equ LINE_STATUS, 5
.equ TRANSMITTER_EMPTY, 0x20

.equ CALLS, 100                         # of the user
.equ PAGES, 64                          # mapped on demand
.equ DEMAND, 0x40000000                 # from here on
.equ EXIT, -1                           # the system call that ends the user

# --- memory behind the image ------------------------------------------------------------------------------

.equ WORK, 0x110000
.equ ROOT, WORK                         # page tables: of 32 bits, then PAE, then long mode
.equ POINTERS, WORK + 0x1000
.equ DIRECTORY, WORK + 0x2000           # four of them with PAE
.equ DEMAND_TABLE, WORK + 0x6000
.equ IDT, WORK + 0x7000
.equ TSS, WORK + 0x8000
.equ TSS64, WORK + 0x8800
.equ COUNTERS, WORK + 0x9000            # exceptions by vector, then:
.equ LAST_ERROR, COUNTERS + 0x100
.equ ENTRY_SIZE, COUNTERS + 0x104
.equ KERNEL_STACK, WORK + 0xb000        # of the kernel itself
.equ TRAP_STACK, WORK + 0xc000          # where the TSS sends traps of the user
.equ USER_STACK, WORK + 0xd000
.equ WORK_END, WORK + 0x10000
.equ POOL, 0x200000                     # the pages to map

.equ CODE32, 8
.equ DATA, 0x10
.equ USER32, 0x1b
.equ DATA3, 0x23
.equ CODE64, 0x28
.equ USER64, 0x33
.equ TASK, 0x38
.equ TASK64, 0x40

.equ PRESENT, 1
.equ WRITABLE, 2
.equ USER, 4
.equ LARGE, 0x80

    .text
multiboot_header:
    .long MAGIC, FLAGS, -(MAGIC + FLAGS)
    .long multiboot_header, multiboot_header, 0, WORK_END, entry
    .balign 16

GUEST kernel, "a kernel with tables, handlers and a user of its own, from 32 bits to long mode", KIND_MULTIBOOT

# --- checks -----------------------------------------------------------------------------------------------

.macro EQUAL operands:vararg
    cmp \operands
    jne failed
.endm

.macro SAY text
    jmp .Lbehind\@
.Ltext\@:
    .asciz "\text\n"
.Lbehind\@:
    mov esi, offset .Ltext\@
    call say
.endm

# The instruction must raise the exception with this error code; the handler goes on behind it.
.macro FAULTS vector, error, instruction:vararg
    mov ebp, offset .Lafter\@
    mov ecx, [COUNTERS + \vector * 4]
    inc ecx
    \instruction
.Lafter\@:
    EQUAL [COUNTERS + \vector * 4], ecx
    EQUAL dword ptr [LAST_ERROR], \error
.endm

# What is the same in every mode; the code is assembled for each.
.macro TAKE_EXCEPTIONS
    xor edx, edx
    FAULTS 0, 0, div edx
    FAULTS 3, 0, int3
    FAULTS 6, 0, ud2
    mov eax, 0x7778
    FAULTS 13, 0x7778, mov fs, eax
.endm

.macro TOUCH_PAGES size, wide
    mov dword ptr [ENTRY_SIZE], \size
    mov edi, DEMAND_TABLE
    xor eax, eax
    mov ecx, 0x400
    rep stosd
    mov \wide, cr3
    mov cr3, \wide
    mov dword ptr [COUNTERS + 14 * 4], 0
    mov edi, DEMAND
    mov ecx, PAGES
1:
    mov [edi], edi                      # faults, is mapped, and is repeated
    add edi, 0x1000
    dec ecx
    jnz 1b
    EQUAL dword ptr [COUNTERS + 14 * 4], PAGES
    EQUAL dword ptr [LAST_ERROR], 2
    mov edi, DEMAND
    mov ebx, POOL
2:
    EQUAL [ebx], edi
    add edi, 0x1000
    add ebx, 0x1000
    cmp edi, DEMAND + PAGES * 0x1000
    jb 2b
    EQUAL dword ptr [COUNTERS + 14 * 4], PAGES
.endm

# The page-fault handler: map the page at CR2, which the table of demand has no entry for yet.
.macro MAP_PAGE wide
    mov \wide, cr2
    sub eax, DEMAND
    shr eax, 12
    cmp eax, PAGES
    jae failed
    mov ecx, eax
    shl ecx, 12
    add ecx, POOL + PRESENT + WRITABLE + USER
    mul dword ptr [ENTRY_SIZE]
    mov [eax + DEMAND_TABLE], ecx
.endm

.macro STUBS name, common
    .balign 16
\name:
    .set vector, 0
    .rept 32
    .balign 16
    .if ((0x60227d00 >> vector) & 1) == 0
    push 0                              # vectors 8, 10-14, 17, 21, 29 and 30 come with an error code
    .endif
    push vector
    jmp \common
    .set vector, vector + 1
    .endr
.endm

# At CPL 3: system calls, and exceptions on the way.
.macro USER_PROGRAM
    mov eax, DATA3
    mov ds, eax
    xor ebx, ebx
1:
    mov eax, ebx
    int 0x80                            # EAX * 3 + 1
    lea ecx, [ebx + ebx * 2 + 1]
    EQUAL eax, ecx
    inc ebx
    cmp ebx, CALLS
    jb 1b
    FAULTS 13, 0, hlt
    FAULTS 3, 0, int3
    mov eax, EXIT
    int 0x80
    jmp failed
.endm

# --- 32-bit code ------------------------------------------------------------------------------------------

    .code32
entry:
    cli
    cld
    mov esp, KERNEL_STACK
    cmp eax, LOADER_MAGIC
    jne failed
    mov edi, WORK
    xor eax, eax
    mov ecx, (KERNEL_STACK - 0x1000 - WORK) / 4
    rep stosd
    lgdt [gdt_pointer]
    ljmp CODE32, offset 1f
1:
    mov eax, DATA
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov ebx, offset stubs32
    xor edi, edi
2:
    mov ecx, 0x8e00
    call set_gate32
    add ebx, 16
    inc edi
    cmp edi, 32
    jb 2b
    mov edi, 3                          # INT3 is for everybody
    mov ebx, offset stubs32 + 3 * 16
    mov ecx, 0xee00
    call set_gate32
    mov edi, 0x80
    mov ebx, offset system_call32
    call set_gate32
    lidt [idt_pointer32]
    mov dword ptr [TSS + 4], TRAP_STACK
    mov dword ptr [TSS + 8], DATA
    mov word ptr [TSS + 0x66], 0x68
    mov eax, TASK
    ltr ax
    TAKE_EXCEPTIONS
    call run_user32
    SAY "protected mode: exceptions, user"

    mov dword ptr [DIRECTORY], PRESENT+WRITABLE+USER+LARGE      # 4 MiB pages, identity
    mov dword ptr [DIRECTORY + (DEMAND >> 22) * 4], DEMAND_TABLE + PRESENT+WRITABLE+USER
    mov eax, 0x10                       # PSE
    mov cr4, eax
    mov eax, DIRECTORY
    call paging_on
    TAKE_EXCEPTIONS
    TOUCH_PAGES 4, eax
    call run_user32
    SAY "32-bit paging: exceptions, pages on demand, user"

    call paging_off
    mov dword ptr [POINTERS], DIRECTORY + PRESENT
    mov dword ptr [POINTERS + 8], DIRECTORY + 0x1000 + PRESENT
    mov dword ptr [DIRECTORY + 8], 0x200000 + PRESENT+WRITABLE+USER+LARGE  # 2 MiB pages
    mov dword ptr [DIRECTORY + 0x1000], DEMAND_TABLE + PRESENT+WRITABLE+USER
    mov eax, 0x20                       # PAE
    mov cr4, eax
    mov eax, POINTERS
    call paging_on
    TAKE_EXCEPTIONS
    TOUCH_PAGES 8, eax
    call run_user32
    SAY "PAE paging: exceptions, pages on demand, user"

    call paging_off
    mov dword ptr [ROOT], POINTERS + PRESENT+WRITABLE+USER
    mov dword ptr [POINTERS], DIRECTORY + PRESENT+WRITABLE+USER
    mov dword ptr [POINTERS + 8], DIRECTORY + 0x1000 + PRESENT+WRITABLE+USER
    mov ecx, 0xc0000080                 # EFER.LME
    xor edx, edx
    mov eax, 0x100
    wrmsr
    mov eax, ROOT
    call paging_on
    ljmp CODE64, offset long_mode

paging_on:
    mov cr3, eax
    mov eax, cr0
    or eax, 0x80010000
    mov cr0, eax
    ret

paging_off:
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    ret

# IDT entry EDI: handler EBX, access << 8 in ECX.
set_gate32:
    mov eax, CODE32 << 16
    mov ax, bx
    mov [IDT + edi * 8], eax
    mov eax, ebx
    mov ax, cx
    mov [IDT + edi * 8 + 4], eax
    ret

run_user32:
    pushad
    mov [TSS + 4], esp                  # the user's exit comes back to here
    push DATA3
    push USER_STACK
    push 0x3002                         # IOPL 3
    push USER32
    push offset user
    iretd

system_call32:
    cmp eax, EXIT
    je 1f
    lea eax, [eax + eax * 2 + 1]
    iretd
1:
    mov eax, DATA
    mov ds, eax
    mov es, eax
    add esp, 20
    popad
    ret

    STUBS stubs32, exception32

exception32:
    push eax
    mov eax, [esp + 8]
    mov [LAST_ERROR], eax
    mov eax, [esp + 4]
    inc dword ptr [COUNTERS + eax * 4]
    cmp eax, 14
    je 1f
    mov [esp + 12], ebp
    jmp 2f
1:
    push ecx
    push edx
    MAP_PAGE eax
    pop edx
    pop ecx
2:
    pop eax
    add esp, 8
    iretd

user:
    USER_PROGRAM

# --- 64-bit code ------------------------------------------------------------------------------------------

    .code64
long_mode:
    mov ebx, offset stubs64
    xor edi, edi
1:
    mov ecx, 0x8e00
    call set_gate64
    add ebx, 16
    inc edi
    cmp edi, 32
    jb 1b
    mov edi, 3
    mov ebx, offset stubs64 + 3 * 16
    mov ecx, 0xee00
    call set_gate64
    mov edi, 0x80
    mov ebx, offset system_call64
    call set_gate64
    lidt [idt_pointer64]
    mov dword ptr [TSS64 + 0x64], 0x680000
    mov eax, TASK64
    ltr ax
    TAKE_EXCEPTIONS
    TOUCH_PAGES 8, rax
    mov [TSS64 + 4], rsp                # 64-bit code keeps nothing below it
    push DATA3
    push USER_STACK
    push 0x3002
    push USER64
    push offset user64
    iretq
back_from_user64:
    SAY "long mode: exceptions, pages on demand, user"
    mov al, 0
    out DEBUG_EXIT_PORT, al
1:
    hlt
    jmp 1b

set_gate64:
    mov eax, edi
    shl eax, 4
    mov [rax + IDT], bx
    mov word ptr [rax + IDT + 2], CODE64
    mov [rax + IDT + 4], cx
    mov edx, ebx
    shr edx, 16
    mov [rax + IDT + 6], edx
    mov dword ptr [rax + IDT + 10], 0
    ret

system_call64:
    cmp eax, EXIT
    je 1f
    lea eax, [rax + rax * 2 + 1]
    iretq
1:
    add rsp, 40
    jmp back_from_user64

    STUBS stubs64, exception64

exception64:
    push rax
    mov eax, [rsp + 16]
    mov [LAST_ERROR], eax
    mov eax, [rsp + 8]
    inc dword ptr [COUNTERS + rax * 4]
    cmp eax, 14
    je 1f
    mov [rsp + 24], rbp
    jmp 2f
1:
    push rcx
    push rdx
    MAP_PAGE rax
    pop rdx
    pop rcx
2:
    pop rax
    add rsp, 16
    iretq

user64:
    USER_PROGRAM

# --- the same bytes for 32 and 64 bits --------------------------------------------------------------------

# Print the string at ESI.
say:
    lodsb
    test al, al
    jz 2f
    mov bl, al
    mov dx, COM1 + LINE_STATUS
1:
    in al, dx
    test al, TRANSMITTER_EMPTY
    jz 1b
    mov dx, COM1
    mov al, bl
    out dx, al
    jmp say
2:
    ret

failed:
    mov al, 1
    out DEBUG_EXIT_PORT, al
1:
    hlt
    jmp 1b

# --- descriptors ------------------------------------------------------------------------------------------

    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9a000000ffff            # CODE32
    .quad 0x00cf92000000ffff            # DATA
    .quad 0x00cffa000000ffff            # USER32
    .quad 0x00cff2000000ffff            # DATA3
    .quad 0x00af9a000000ffff            # CODE64
    .quad 0x00affa000000ffff            # USER64
    .short 0x67, TSS & 0xffff
    .long 0x8900 + (TSS >> 16)
    .short 0x67, TSS64 & 0xffff
    .long 0x8900 + (TSS64 >> 16), 0, 0
gdt_end:

gdt_pointer:
    .short gdt_end - gdt - 1
    .long gdt
idt_pointer32:
    .short 0x81 * 8 - 1
    .long IDT
idt_pointer64:
    .short 0x81 * 16 - 1
    .quad IDT
