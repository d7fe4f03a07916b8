"""Programs for tests.model.flow: tasks, debugging, privilege levels, virtual-8086 mode.

The code is in hexadecimal below its source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tests.model.flow import (
    CODE32,
    CODE64,
    CONFORMING,
    DATA,
    DATA32,
    FREE,
    LDT_SELECTOR,
    TSS2,
    TSS2_SELECTOR,
    TSS_SELECTOR,
    World,
    descriptor,
    gate,
    handler,
)

PRIVILEGE_WORLDS: Final[dict[str, Callable[[], World]]] = {
    # --- tasks
    # ljmp 0x70,0
    "jump to a tss": lambda: World(32).code("ea000000007000").task(),
    # lcall 0x70,0
    "call a tss": lambda: World(32).code("9a000000007000").task(),
    # mov eax,0x12345678; lcall 0x70,0; mov ebx,7; hlt
    "call a tss and return": lambda: World(32).code("b8785634129a000000007000bb07000000f4").task(code="cf"),
    # ljmp 0x80,0
    "jump through a task gate": lambda: (
        World(32).code("ea000000008000").task().define(FREE, gate(5, TSS2_SELECTOR, 0))
    ),
    # ljmp 0x50,0
    "jump to the running tss": lambda: World(32).code("ea000000005000"),
    # ljmp 0x80,0
    "jump to an absent tss": lambda: (
        World(32).code("ea000000008000").define(FREE, descriptor(9, base=TSS2, limit=0x67, s=0, p=0, flags=0))
    ),
    # ljmp 0x80,0
    "jump to a short tss": lambda: (
        World(32).code("ea000000008000").define(FREE, descriptor(9, base=TSS2, limit=0x66, s=0, flags=0))
    ),
    # ljmp 0x70,0
    "task with a null stack": lambda: World(32).code("ea000000007000").task(ss=0),
    # ljmp 0x70,0
    "task with absent code": lambda: (
        World(32).code("ea000000007000").task(cs=FREE).define(FREE, descriptor(0xA, p=0))
    ),
    # ljmp 0x70,0
    "task with data as code": lambda: World(32).code("ea000000007000").task(cs=DATA32),
    # ljmp 0x70,0
    "task with system segment in ds": lambda: World(32).code("ea000000007000").task(ds=TSS_SELECTOR),
    # ljmp 0x70,0
    "task with absent ds": lambda: (
        World(32).code("ea000000007000").task(ds=FREE).define(FREE, descriptor(2, p=0))
    ),
    # ljmp 0x70,0
    "task with an ldt": lambda: World(32).code("ea000000007000").task(ldt=LDT_SELECTOR),
    # ljmp 0x70,0
    "task with a bad ldt": lambda: World(32).code("ea000000007000").task(ldt=DATA32),
    # ud2
    "task gate for an exception": lambda: World(32).code("0f0b").task().gate(6, gate(5, TSS2_SELECTOR, 0)),
    # mov eax,0x1000; mov ds,ax
    "task gate with an error code": lambda: (
        World(32).code("b8001000008ed8").task().gate(13, gate(5, TSS2_SELECTOR, 0))
    ),
    # mov eax,0x12345678; lcall 0x80,0;
    "call a 16-bit tss": lambda: (
        World(32)
        .code("b8785634129a000000008000")
        .task16()
        .define(FREE, descriptor(1, base=TSS2, limit=0x2B, s=0, flags=0))
    ),
    # ljmp 0x70,0
    "task trap": lambda: World(32).code("ea000000007000").task().put(TSS2 + 0x64, "01"),
    # pushfd; or word ptr [esp],0x4000; popfd; iretd
    "return without a nested task": lambda: World(32).code("9c66810c2400409dcf"),
    # --- debugging
    # push 0x102; popf; nop; nop; hlt
    "single step": lambda: World(32).code("68020100009d9090f4"),
    # mov eax,0x10; push 0x102; popf; mov ss,ax; nop; nop; hlt
    "single step over mov ss": lambda: World(32).code("b81000000068020100009d8ed09090f4"),
    # .byte 0xf1
    "breakpoint instruction": lambda: World(32).code("f1"),
    # mov eax,0x8014; mov dr0,eax; mov eax,1; mov dr7,eax; nop; nop; nop; nop; nop; hlt
    "code breakpoint": lambda: World(32).code("b8148000000f23c0b8010000000f23f89090909090f4"),
    # mov eax,0x9000; mov dr0,eax; mov eax,0xd0001; mov dr7,eax; mov [0x9001],al; nop; hlt
    "data breakpoint": lambda: World(32).code("b8009000000f23c0b801000d000f23f8a20190000090f4"),
    # mov eax,0x2000; mov dr7,eax; mov eax,dr0; hlt
    "general detect": lambda: World(32).code("b8002000000f23f80f21c0f4"),
    # --- privilege levels
    # ud2
    "user invalid opcode": lambda: World(32, cpl=3).code("0f0b"),
    # int 0x80
    "user interrupt": lambda: World(32, cpl=3).code("cd80").handle(0x80, handler(0x80), dpl=3),
    # int 0x80
    "user interrupt by trap gate": lambda: (
        World(32, cpl=3).code("cd80").handle(0x80, handler(0x80), type_=0xF, dpl=3)
    ),
    # int 0x80
    "user interrupt without privilege": lambda: World(32, cpl=3).code("cd80"),
    # int3
    "user breakpoint without privilege": lambda: World(32, cpl=3).code("cc"),
    # int 0x80
    "user interrupt by 16-bit gate": lambda: (
        World(32, cpl=3).code("cd80").handle(0x80, handler(0x80), type_=6, dpl=3)
    ),
    # hlt
    "user halt": lambda: World(32, cpl=3).code("f4"),
    # mov eax,0x13; mov ds,ax
    "user load of kernel data": lambda: World(32, cpl=3).code("b8130000008ed8"),
    # push 0x3b; push 0xe000; push 0x7246; push 0x33; push 0x9000; iretd
    "return to user": lambda: World(32).code("6a3b6800e0000068467200006a336800900000cf").put(DATA, "0f0b"),
    # .byte 0x66,0xcf
    "return to user of 16 bits": lambda: (
        World(32).code("66cf").frame(0x9000, 0x33, 2, 0xE000, 0x3B, size=2).put(DATA, "0f0b")
    ),
    # push 0x10; push 0xe000; push 2; push 0x33; push 0x9000; iretd
    "return to user with kernel stack": lambda: World(32).code("6a106800e000006a026a336800900000cf"),
    # push 0; push 0xe000; push 2; push 0x33; push 0x9000; iretd
    "return to user with null stack": lambda: World(32).code("6a006800e000006a026a336800900000cf"),
    # push 0x83; push 0xe000; push 2; push 0x33; push 0x9000; iretd
    "return to user with absent stack": lambda: (
        World(32).code("68830000006800e000006a026a336800900000cf").define(FREE, descriptor(3, dpl=3, p=0))
    ),
    # push 0x3b; push 0xe000; push 0x11; push 0x22; push 0x33; push 0x9000; retf 8
    "far return to user": lambda: (
        World(32).code("6a3b6800e000006a116a226a336800900000ca0800").put(DATA, "0f0b")
    ),
    # push 0x3202; push 0x33; push 0x9000; iretd
    "user iret keeps if and iopl": lambda: (
        World(32, cpl=3).code("68023200006a336800900000cf").put(DATA, "0f0b")
    ),
    # push 1; push 2; lcall 0x83,0
    "call gate": lambda: (
        World(32, cpl=3)
        .code("6a016a029a000000008300")
        .define(FREE, gate(0xC, CODE32, DATA, dpl=3, count=2))
        .put(DATA, "f4")
    ),
    # push 1; push 2; lcall 0x83,0; ud2
    "call gate and return": lambda: (
        World(32, cpl=3)
        .code("6a016a029a0000000083000f0b")
        .define(FREE, gate(0xC, CODE32, DATA, dpl=3, count=2))
        .put(DATA, "ca0800")
    ),
    # push 1; push 2; lcall 0x83,0
    "call gate of 16 bits": lambda: (
        World(32, cpl=3)
        .code("6a016a029a000000008300")
        .define(FREE, gate(4, CODE32, DATA, dpl=3, count=4))
        .put(DATA, "f4")
    ),
    # lcall 0x80,0
    "call gate at the same level": lambda: (
        World(32).code("9a000000008000").define(FREE, gate(0xC, CODE32, DATA, count=4)).put(DATA, "f4")
    ),
    # lcall 0x80,0
    "call gate to conforming code": lambda: (
        World(32, cpl=3)
        .code("9a000000008000")
        .define(FREE, gate(0xC, CONFORMING, DATA, dpl=3))
        .put(DATA, "0f0b")
    ),
    # ljmp 0x80,0
    "jump through a call gate": lambda: (
        World(32).code("ea000000008000").define(FREE, gate(0xC, CODE32, DATA)).put(DATA, "f4")
    ),
    # ljmp 0x80,0
    "jump through a call gate to inner code": lambda: (
        World(32, cpl=3).code("ea000000008000").define(FREE, gate(0xC, CODE32, DATA, dpl=3))
    ),
    # lcall 0x80,0
    "call gate without privilege": lambda: (
        World(32, cpl=3).code("9a000000008000").define(FREE, gate(0xC, CODE32, DATA))
    ),
    # lcall 0x80,0
    "absent call gate": lambda: World(32).code("9a000000008000").define(FREE, gate(0xC, CODE32, DATA, p=0)),
    # lcall 0x80,0
    "call gate to null": lambda: World(32).code("9a000000008000").define(FREE, gate(0xC, 0, DATA)),
    # lcall 0x80,0
    "call gate to data": lambda: World(32).code("9a000000008000").define(FREE, gate(0xC, DATA32, DATA)),
    # lcall 0x80,0
    "call gate beyond the limit": lambda: (
        World(32).code("9a000000008000").define(FREE, gate(0xC, 0x20, 0x10000))
    ),
    # ud2
    "long user invalid opcode": lambda: World(64, cpl=3).code("0f0b"),
    # ud2
    "long user invalid opcode with ist": lambda: World(64, cpl=3).code("0f0b").handle(6, handler(6), count=1),
    # int 0x80
    "long user interrupt": lambda: World(64, cpl=3).code("cd80").handle(0x80, handler(0x80), dpl=3),
    # int3
    "long user breakpoint": lambda: World(64, cpl=3).code("cc").handle(3, handler(3), dpl=3),
    # int3
    "long user breakpoint without privilege": lambda: World(64, cpl=3).code("cc"),
    # push 0x3b; push 0xe000; push 0x202; push 0x43; push 0x9000; iretq
    "long return to user": lambda: (
        World(64).code("6a3b6800e0000068020200006a43680090000048cf").put(DATA, "0f0b")
    ),
    # push 0x3b; push 0xe000; push 0x202; push 0x33; push 0x9000; iretq
    "long return to 32-bit user": lambda: (
        World(64).code("6a3b6800e0000068020200006a33680090000048cf").put(DATA, "b8785634120f0b")
    ),
    # push 0x3b; push 0xe000; push 0x43; push 0x9000; lretq
    "long far return to user": lambda: World(64).code("6a3b6800e000006a43680090000048cb").put(DATA, "0f0b"),
    # lcall [0x9020]
    "long call gate": lambda: (
        World(64, cpl=3)
        .code("ff1c2520900000")
        .put(DATA + 32, "000000008300")
        .define(FREE, gate(0xC, CODE64, DATA, dpl=3, wide=True))
        .put(DATA, "f4")
    ),
    # lcall [0x9020]; ud2
    "long call gate and return": lambda: (
        World(64, cpl=3)
        .code("ff1c25209000000f0b")
        .put(DATA + 32, "000000008300")
        .define(FREE, gate(0xC, CODE64, DATA, dpl=3, wide=True))
        .put(DATA, "48cb")
    ),
    # lcall [0x9020]
    "long call gate to 32-bit code": lambda: (
        World(64)
        .code("ff1c2520900000")
        .put(DATA + 32, "000000008000")
        .define(FREE, gate(0xC, CODE32, DATA, wide=True))
    ),
    # ljmp [0x9010]
    "long user far jump to 32 bits": lambda: (
        World(64, cpl=3).code("ff2c2510900000").put(DATA, "b8785634120f0b").put(DATA + 16, "009000003300")
    ),
    # mov eax,0x3b; mov ds,ax; mov fs,ax; xor eax,eax; mov es,ax; mov gs,ax; ud2
    "long user segments": lambda: World(64, cpl=3).code("b83b0000008ed88ee031c08ec08ee80f0b"),
    # xor eax,eax; mov ss,ax
    "long user null ss": lambda: World(64, cpl=3).code("31c08ed0"),
    # mov eax,0x13; mov ds,ax
    "long user load of kernel data": lambda: World(64, cpl=3).code("b8130000008ed8"),
    # --- virtual-8086 mode
    # iretd
    "virtual-8086 invalid opcode": lambda: (
        World(32)
        .code("cf")
        .frame(0, 0x905, 0x20202, 0x100, 0x904, 0x903, 0x902, 0x901, 0x900)
        .put(0x9050, "8cd80f0b")
    ),
    # iretd
    "virtual-8086 interrupt": lambda: (
        World(32)
        .code("cf")
        .frame(0, 0x905, 0x23202, 0x100, 0x904, 0x903, 0x902, 0x901, 0x900)
        .put(0x9050, "cd21")
        .handle(0x21, handler(0x21), dpl=3)
    ),
    # iretd
    "virtual-8086 interrupt without iopl": lambda: (
        World(32)
        .code("cf")
        .frame(0, 0x905, 0x20202, 0x100, 0x904, 0x903, 0x902, 0x901, 0x900)
        .put(0x9050, "cd21")
        .handle(0x21, handler(0x21), dpl=3)
    ),
    # iretd
    "virtual-8086 and back": lambda: (
        World(32)
        .code("cf")
        .frame(0, 0x905, 0x20202, 0x100, 0x904, 0, 0, 0, 0)
        .put(0x9050, "0f0bb807000f0b")
        .put(handler(6), "83f007740583042402cff4")
    ),
    # push 0xaaaaaaaa; pop eax; push ds; hlt
    "push of a segment register": lambda: World(32).code("68aaaaaaaa581ef4"),
}
