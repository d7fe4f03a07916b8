"""Programs for tests.model.flow: segment loads, far transfers and exceptions, one world each;
those on tasks, debugging and privilege levels are in flow_cases_privilege.

The code is in hexadecimal below its source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tests.model.flow import (
    CODE32,
    CODE32_USER,
    CONFORMING,
    DATA,
    DATA32,
    FREE,
    LDT,
    TSS2,
    World,
    descriptor,
    gate,
    handler,
)
from tests.model.flow_cases_privilege import PRIVILEGE_WORLDS

WORLDS: Final[dict[str, Callable[[], World]]] = {
    # --- segment loads
    # mov eax,0x10; mov ds,ax; mov es,ax; mov fs,ax; mov gs,ax; mov ss,ax; hlt
    "data segments": lambda: World(32).code("b8100000008ed88ec08ee08ee88ed0f4"),
    # mov eax,0x80; mov es,ax; mov eax,0x8b; mov fs,ax; ljmp 0x98,0x9000
    "accessed bits": lambda: (
        World(32)
        .code("b8800000008ec0b88b0000008ee0ea009000009800")
        .define(FREE, descriptor(2))
        .define(FREE + 8, descriptor(0xA, dpl=3))
        .define(FREE + 24, descriptor(0xA))
        .put(DATA, "f4")
    ),
    # xor eax,eax; mov ds,ax; mov al,3; mov es,ax; mov fs,ax; mov gs,ax; hlt
    "null data segments": lambda: World(32).code("31c08ed8b0038ec08ee08ee8f4"),
    # xor eax,eax; mov ds,ax; mov eax,[0x9000]; hlt
    "access through null": lambda: World(32).code("31c08ed8a100900000f4"),
    # xor eax,eax; mov ss,ax; hlt
    "null ss": lambda: World(32).code("31c08ed0f4"),
    # mov eax,0x50; mov ds,ax; hlt
    "system segment in ds": lambda: World(32).code("b8500000008ed8f4"),
    # mov eax,0x80; mov ds,ax; hlt
    "execute-only code in ds": lambda: World(32).code("b8800000008ed8f4").define(FREE, descriptor(8)),
    # mov eax,0x80; mov ds,ax; hlt
    "absent data in ds": lambda: World(32).code("b8800000008ed8f4").define(FREE, descriptor(2, p=0)),
    # mov eax,0x80; mov ss,ax; hlt
    "absent stack": lambda: World(32).code("b8800000008ed0f4").define(FREE, descriptor(2, p=0)),
    # mov eax,0x80; mov ss,ax; hlt
    "read-only stack": lambda: World(32).code("b8800000008ed0f4").define(FREE, descriptor(0)),
    # mov eax,0x13; mov ss,ax; hlt
    "stack with another rpl": lambda: World(32).code("b8130000008ed0f4"),
    # mov eax,0x38; mov ss,ax; hlt
    "stack with another dpl": lambda: World(32).code("b8380000008ed0f4"),
    # mov eax,0x1000; mov ds,ax; hlt
    "beyond the gdt": lambda: World(32).code("b8001000008ed8f4"),
    # mov eax,0x13; mov ds,ax; hlt
    "rpl above dpl": lambda: World(32).code("b8130000008ed8f4"),
    # mov eax,0xc; mov ds,ax; hlt
    "local descriptor": lambda: (
        World(32).code("b80c0000008ed8f4").put(LDT + 8, descriptor(2, base=0x12345, limit=0x1234, flags=4))
    ),
    # mov eax,0x84; mov ds,ax; hlt
    "beyond the ldt": lambda: World(32).code("b8840000008ed8f4"),
    # mov eax,8; .byte 0x8e,0xc8; hlt
    "mov to cs": lambda: World(32).code("b8080000008ec8f4"),
    # .byte 0x8e,0xf0; hlt
    "reserved segment register": lambda: World(32).code("8ef0f4"),
    # push 0x28; pop es; push 0x10; pop ss; push 0x3b; pop fs; push ds; push gs; hlt
    "pop segments": lambda: World(32).code("6a28076a10176a3b0fa11e0fa8f4"),
    # .byte 0x66,0x1e; .byte 0x66,0x0f,0xa0; .byte 0x66,0x07; hlt
    "push and pop 16 bits": lambda: World(32).code("661e660fa06607f4"),
    # push 0; pop ss; hlt
    "pop null ss": lambda: World(32).code("6a0017f4"),
    # les eax,[0x9000]; lss esp,[0x9000]; lfs cx,[0x9004]; hlt
    "far pointers": lambda: (
        World(32).code("c405009000000fb22500900000660fb40d04900000f4").put(DATA, "0070000010003b00")
    ),
    # mov eax,0x1234; lgs eax,[0x9000]; hlt
    "absent far pointer": lambda: (
        World(32)
        .code("b8341200000fb50500900000f4")
        .put(DATA, "007000008000")
        .define(FREE, descriptor(2, p=0))
    ),
    # mov eax,0x80; mov ds,ax; mov eax,[0x9000]; mov ebx,[0x8fff]; hlt
    "expand-down segment": lambda: (
        World(32)
        .code("b8800000008ed8a1009000008b1dff8f0000f4")
        .define(FREE, descriptor(6, limit=8))
        .put(DATA, "11223344")
    ),
    # mov eax,0x80; mov ds,ax; mov [0x9000],eax; hlt
    "write to read-only": lambda: World(32).code("b8800000008ed8a300900000f4").define(FREE, descriptor(0)),
    # mov eax,0x80; mov ds,ax; mov eax,[0xfd]; hlt
    "beyond the limit": lambda: (
        World(32).code("b8800000008ed8a1fd000000f4").define(FREE, descriptor(2, limit=0xFF, flags=4))
    ),
    # mov eax,0x80; mov ds,ax; mov eax,[0xfc]; hlt
    "at the limit": lambda: (
        World(32).code("b8800000008ed8a1fc000000f4").define(FREE, descriptor(2, limit=0xFF, flags=4))
    ),
    # mov eax,0x80; mov ss,ax; mov eax,[esp]; hlt
    "stack beyond its limit": lambda: (
        World(32).code("b8800000008ed08b0424f4").define(FREE, descriptor(2, limit=0xFF, flags=4))
    ),
    # --- system segments
    # xor eax,eax; lldt ax; sldt ebx; mov eax,0x60; lldt ax; sldt ecx; mov eax,0x70; ltr ax; str edx; hlt
    "ldtr and tr": lambda: World(32).code("31c00f00d00f00c3b8600000000f00d00f00c1b8700000000f00d80f00caf4"),
    # mov eax,0x50; ltr ax; hlt
    "busy tss in ltr": lambda: World(32).code("b8500000000f00d8f4"),
    # xor eax,eax; ltr ax; hlt
    "null in ltr": lambda: World(32).code("31c00f00d8f4"),
    # mov eax,0x70; lldt ax; hlt
    "tss in lldt": lambda: World(32).code("b8700000000f00d0f4"),
    # mov eax,0x80; lldt ax; hlt
    "absent ldt": lambda: World(32).code("b8800000000f00d0f4").define(FREE, descriptor(2, s=0, p=0)),
    # mov eax,0x80; ltr ax; hlt
    "absent tss": lambda: World(32).code("b8800000000f00d8f4").define(FREE, descriptor(9, s=0, p=0)),
    # mov eax,0x84; ltr ax; hlt
    "local tss": lambda: World(32).code("b8840000000f00d8f4"),
    # mov eax,0x80; ltr ax; mov eax,0x90; lldt ax; str ebx; sldt ecx; hlt
    "long ltr and lldt": lambda: (
        World(64)
        .code("b8800000000f00d8b8900000000f00d00f00cb0f00c1f4")
        .define(FREE, descriptor(9, base=TSS2, limit=0x67, s=0, flags=0))
        .define(FREE + 16, descriptor(2, base=LDT, limit=7, s=0, flags=0) + b"\x00\x80\xff\xff")
    ),
    # --- far transfers
    # ljmp 8,0x9000;
    "far jump": lambda: World(32).code("ea009000000800").put(DATA, "f4"),
    # ljmp 0x20,0x9000;
    "far jump to 16 bits": lambda: World(32).code("ea009000002000").put(DATA, "b8341266b878563412f4"),
    # ljmp 0x4b,0x9000;
    "far jump to conforming code": lambda: World(32).code("ea009000004b00").put(DATA, "f4"),
    # ljmp 0x10,0x9000
    "far jump to data": lambda: World(32).code("ea009000001000"),
    # ljmp 3,0x9000
    "far jump to null": lambda: World(32).code("ea009000000300"),
    # ljmp 0x80,0x9000
    "far jump to absent code": lambda: World(32).code("ea009000008000").define(FREE, descriptor(0xA, p=0)),
    # ljmp 0x20,0x10000
    "far jump beyond the limit": lambda: World(32).code("ea000001002000"),
    # ljmp 0xb,0x9000
    "far jump to inner rpl": lambda: World(32).code("ea009000000b00"),
    # ljmp 0x33,0x9000
    "far jump to user code": lambda: World(32).code("ea009000003300"),
    # ljmp [0x9000]
    "far jump through memory": lambda: (
        World(32).code("ff2d00900000").put(DATA, "10900000080000000000000000000000f4")
    ),
    # lcall 8,0x9000; mov ebx,1; hlt
    "far call and return": lambda: World(32).code("9a009000000800bb01000000f4").put(DATA, "8b04248b4c2404cb"),
    # push 1; push 2; lcall 8,0x9000; mov ebx,1; hlt
    "far call and release": lambda: World(32).code("6a016a029a009000000800bb01000000f4").put(DATA, "ca0800"),
    # .byte 0x66,0x9a,0x00,0x90,0x20,0x00; hlt
    "far call of 16 bits": lambda: World(32).code("669a00902000f4").put(DATA, "cb"),
    # lcall [0x9000]; hlt
    "far call through memory": lambda: (
        World(32).code("ff1d00900000f4").put(DATA, "10900000080000000000000000000000cb")
    ),
    # push 0; push 0x9000; retf
    "far return to null": lambda: World(32).code("6a006800900000cb"),
    # push 0x10; push 0x9000; retf
    "far return to data": lambda: World(32).code("6a106800900000cb"),
    # push 0x33; push 0x9000; retf
    "far return to inner rpl": lambda: World(32).code("6a336800900000cb"),
    # push 0x80; push 0x9000; retf
    "far return to absent code": lambda: (
        World(32).code("68800000006800900000cb").define(FREE, descriptor(0xA, p=0))
    ),
    # push 0x20; push 0x10000; retf
    "far return beyond the limit": lambda: World(32).code("6a206800000100cb"),
    # push 8; push 0x9000; lretq
    "long far return to 32 bits": lambda: World(64).code("6a08680090000048cb").put(DATA, "b878563412f4"),
    # ljmp [0x9010]
    "long far jump to 32 bits": lambda: (
        World(64).code("ff2c2510900000").put(DATA, "b878563412f4").put(DATA + 16, "009000000800")
    ),
    # ljmp [0x9020]
    "long far jump back": lambda: (
        World(64)
        .code("ff2c2520900000")
        .put(DATA, "ea109000001800")
        .put(DATA + 16, "48c7c0fffffffff4")
        .put(DATA + 32, "009000000800")
    ),
    # ljmp [0x9020]
    "long far jump to wide and long": lambda: (
        World(64)
        .code("ff2c2520900000")
        .put(DATA + 32, "009000008000")
        .define(FREE, descriptor(0xA, flags=0xE))
    ),
    # lcall [0x9020]; hlt
    "long far call": lambda: (
        World(64).code("ff1c2520900000f4").put(DATA, "cb").put(DATA + 32, "009000001800")
    ),
    # --- exceptions
    # ud2
    "invalid opcode": lambda: World(32).code("0f0b"),
    # xor ecx,ecx; div ecx
    "divide error": lambda: World(32).code("31c9f7f1"),
    # mov eax,0x20; mov es,ax; mov es:[0],al; hlt
    "general protection": lambda: World(32).code("b8200000008ec026a200000000f4"),
    # push 0x40ad7; popf; ud2
    "invalid opcode with flags": lambda: World(32).code("68d70a04009d0f0b"),
    # sti; ud2
    "invalid opcode by trap gate": lambda: World(32).code("fb0f0b").handle(6, handler(6), type_=0xF),
    # ud2
    "invalid opcode by 16-bit gate": lambda: World(32).code("0f0b").handle(6, handler(6), type_=6),
    # ud2
    "gate to conforming code": lambda: World(32).code("0f0b").handle(6, handler(6), selector=CONFORMING),
    # ud2
    "absent gate": lambda: World(32).code("0f0b").gate(6, gate(0xE, CODE32, handler(6), p=0)),
    # ud2
    "no gate": lambda: World(32).code("0f0b").gate(6, bytes(8)),
    # ud2
    "gate to null": lambda: World(32).code("0f0b").handle(6, handler(6), selector=0),
    # ud2
    "gate to data": lambda: World(32).code("0f0b").handle(6, handler(6), selector=DATA32),
    # ud2
    "gate to absent code": lambda: (
        World(32).code("0f0b").handle(6, handler(6), selector=FREE).define(FREE, descriptor(0xA, p=0))
    ),
    # ud2
    "gate to user code": lambda: World(32).code("0f0b").handle(6, handler(6), selector=CODE32_USER),
    # mov eax,0x1000; mov ds,ax
    "double fault": lambda: World(32).code("b8001000008ed8").gate(13, bytes(8)),
    # mov ax,1; int 0x21; mov bx,2; hlt
    "interrupt and return": lambda: (
        World(16).code("b80100cd21bb0200f4").handle(0x21, DATA).put(DATA, "b90300cf")
    ),
    # pushfd; push 0; pushw 0; push 0; pushw 0x9000; iretd
    "interrupt with 32-bit return": lambda: World(16).code("669c6a006a006a0068009066cf").put(DATA, "f4"),
    # sti; std; ud2
    "real invalid opcode": lambda: World(16).code("fbfd0f0b"),
    # xor cx,cx; div cx
    "real divide error": lambda: World(16).code("31c9f7f1"),
    # mov al,0x7f; add al,1; into; hlt
    "real overflow trap": lambda: World(16).code("b07f0401cef4"),
    # int3
    "real breakpoint": lambda: World(16).code("cc"),
    # ljmp 0x100,0x8000
    "real far jump": lambda: World(16).code("ea00800001").put(0x9000, "f4"),
    # lcall 0x100,0x8000; mov bx,1; hlt
    "real far call and return": lambda: World(16).code("9a00800001bb0100f4").put(0x9000, "cb"),
    # .byte 0x66; .byte 0xea,0x00,0x80,0,0,0,1;
    "real far jump of 32 bits": lambda: World(16).code("66ea008000000001").put(0x9000, "f4"),
    # .byte 0x66; .byte 0xea,0,0,1,0,0,1;
    "real far jump beyond the limit": lambda: World(16).code("66ea000001000001"),
    # mov ax,0x900; mov ds,ax; mov es,ax; push 0x1234; pop fs; mov gs,ax; mov bx,[0]; hlt
    "real segments": lambda: World(16).code("b800098ed88ec06834120fa18ee88b1e0000f4").put(DATA, "3412"),
    # mov ax,0x700; mov ss,ax; mov sp,0x100; push 0x1234; hlt
    "real stack": lambda: World(16).code("b800078ed0bc0001683412f4"),
    # les ax,[0x9000]; lds bx,[0x9000]; hlt
    "real far pointers": lambda: World(16).code("c4060090c51e0090f4").put(DATA, "34120090"),
    # mov ax,[0xffff]; hlt
    "real beyond the limit": lambda: World(16).code("a1fffff4"),
    # mov sp,1; push ax; hlt
    "real stack wrap": lambda: World(16).code("bc010050f4"),
    # pushw 0x7fd7; push 0; push 0x9000; iret
    "real iret flags": lambda: World(16).code("68d77f6a00680090cf").put(DATA, "f4"),
    # lidt [0x9000]; ud2
    "real invalid opcode beyond the ivt": lambda: World(16).code("0f011e00900f0b").put(DATA, "170000000000"),
    # mov eax,cr0; or al,1; mov cr0,eax; ljmp 8,0x9000
    "to protected mode": lambda: (
        World(16).code("0f20c00c010f22c0ea00900800").put(DATA, "b8100000008ed88ed0f4")
    ),
    # mov cr0,eax; mov es,bx; mov cr0,edi; mov esi,0x20100; mov eax,es:[esi]; mov es,di; mov ecx,es:[esi]; hlt
    "unreal mode": lambda: (
        World(16)
        .code("0f22c08ec30f22c766be000102002667668b068ec72667668b0ef4")
        .define(FREE, descriptor(3))
        .put(0x20100, "44332211")
        .set(rax=0x11, rbx=FREE, rdi=0x10)
    ),
    # ud2
    "long invalid opcode": lambda: World(64).code("0f0b"),
    # ud2
    "long with ist": lambda: World(64).code("0f0b").handle(6, handler(6), count=1),
    # push 1; ud2
    "long aligned": lambda: World(64).code("6a010f0b"),
    # ud2
    "long gate to 32-bit code": lambda: World(64).code("0f0b").handle(6, handler(6), selector=CODE32),
    # mov rax,0x800000000000; mov rax,[rax]; hlt
    "long general protection": lambda: World(64).code("48b80000000000800000488b00f4"),
    # mov rsp,0x800000000000; pop rax; hlt
    "long stack fault": lambda: World(64).code("48bc000000000080000058f4"),
    # mov eax,[0x200000]; hlt
    "long page fault": lambda: World(64).code("8b042500002000f4"),
    # mov [0x200ffe],eax; hlt
    "long page fault on write": lambda: World(64).code("890425fe0f2000f4"),
    # mov rbx,rsp; push 0; push rbx; pushfq; push 0x18; push 0x9000; iretq
    "long return": lambda: World(64).code("4889e36a00539c6a18680090000048cf").put(DATA, "f4"),
    # push 0x10; push 0x7000; pushfq; push 8; push 0x9000; iretq
    "long return to compatibility mode": lambda: (
        World(64).code("6a1068007000009c6a08680090000048cf").put(DATA, "b878563412f4")
    ),
    # push 0; push 0x7000; pushfq; push 8; push 0x9000; iretq
    "long return to 32 bits with null stack": lambda: World(64).code("6a0068007000009c6a08680090000048cf"),
    # mov rax,0x800000000000; push 0; push 0x7000; pushfq; push 0x18; push rax; iretq
    "long return not canonical": lambda: World(64).code("48b800000000008000006a0068007000009c6a185048cf"),
    # ud2; mov ebx,5; hlt
    "long return and back": lambda: World(64).code("0f0bbb05000000f4").put(handler(6), "488304240248cf"),
    # xor eax,eax; mov ds,ax; mov ss,ax; mov es,ax; mov fs,ax; mov gs,ax; push rax; hlt
    "long null segments": lambda: World(64).code("31c08ed88ed08ec08ee08ee850f4"),
    # mov eax,3; mov ss,ax; hlt
    "long null ss with rpl": lambda: World(64).code("b8030000008ed0f4"),
    # mov eax,0x80; mov fs,ax; mov eax,fs:[0x10]; hlt
    "long fs base": lambda: (
        World(64)
        .code("b8800000008ee0648b042510000000f4")
        .define(FREE, descriptor(2, base=0x9000))
        .put(DATA + 16, "44332211")
    ),
    # push 8; push 0x9000; lretq
    "compatibility data segments": lambda: (
        World(64)
        .code("6a08680090000048cb")
        .put(DATA, "b8800000008ed8a1000000008b1d00010000f4")
        .define(FREE, descriptor(2, base=0x9100, limit=0xFF, flags=4))
        .put(0x9100, "44332211")
    ),
    # push 8; push 0x9000; lretq
    "compatibility invalid opcode": lambda: World(64).code("6a08680090000048cb").put(DATA, "bc047000000f0b"),
    # wrmsr; inc ecx; mov ax,0x9000; xor edx,edx; wrmsr; mov cl,0x84; mov ax,0x400; wrmsr; std; syscall
    "syscall": lambda: (
        World(64)
        .code("0f30ffc166b8009031d20f30b18466b800040f30fd0f05")
        .put(DATA, "f4")
        .set(rcx=0xC0000081, rdx=0x2B0018)
    ),
    # wrmsr; inc ecx; mov ax,0x6000; wrmsr; inc ecx; mov ax,0x9000; wrmsr; sti; sysenter
    "sysenter": lambda: (
        World(32).code("0f304166b800600f304166b800900f30fb0f34").put(DATA, "f4").set(rcx=0x174, rax=8)
    ),
    # sysenter
    "sysenter without selector": lambda: World(32).code("0f34"),
} | PRIVILEGE_WORLDS
