"""Which instructions mark a page dirty at CPL 3 (docs/reference/hosts.md E)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pykvm.errors import PykvmError
from pykvm.machine.emulation import QEMU_TCG, emulator
from tests.mmu_rig import DATA, DATA_PT, DONE, FRESH, PAGE, SHADOW, STORE, Host, Rig, hosts

pytestmark = hosts(*SHADOW)
VA = DATA << 12
OTHER = DATA + 8
"""A page to read from, mapped."""
DATA_CODE = 0x1FF0
"""The end of the code page."""
NEEDS_XSAVE = ("xsave of all", "xsave of nothing", "xsaveopt", "vmaskmovps with a zero mask")

WRITES = {
    "mov": "488907",  # mov [rdi], rax
    "push": "488d670850",  # lea rsp, [rdi + 8]; push rax
    "call": "488d6708e800000000",  # lea rsp, [rdi + 8]; call 1f; 1:
    "stosq": "48ab",
    "movsq": "48a5",
    "xchg": "488707",  # xchg [rdi], rax
    "xadd": "480fc107",  # xadd [rdi], rax
    "bts": "480fba2f05",  # bts qword ptr [rdi], 5
    "or with 0": "48830f00",  # or qword ptr [rdi], 0
    "lock or with 0": "f048830f00",  # lock or qword ptr [rdi], 0
    "inc": "48ff07",  # inc qword ptr [rdi]
    "rol by 0": "48c10700",  # rol qword ptr [rdi], 0
    "shl by CL = 0": "48d327",  # shl qword ptr [rdi], cl
    "setcc": "0f9207",  # setc byte ptr [rdi]
    "pop to memory": "488d268f07",  # lea rsp, [rsi]; pop qword ptr [rdi]
    "enter": "488d6708c8000000",  # lea rsp, [rdi + 8]; enter 0, 0
    "sgdt": "0f0107",  # sgdt [rdi]
    "smsw": "0f0127",  # smsw word ptr [rdi]
    "stmxcsr": "0fae1f",  # stmxcsr [rdi]
    "fxsave": "0fae07",  # fxsave [rdi]
    "xsave of all": "b80700000031d20fae27",  # mov eax, 7; xor edx, edx; xsave [rdi]
    "xsave of nothing": "31c031d20fae27",  # xor eax, eax; xor edx, edx; xsave [rdi]
    "xsaveopt": "b80700000031d20fae37",  # mov eax, 7; xor edx, edx; xsaveopt [rdi]
    "fnstenv": "d937",  # fnstenv [rdi]
    "movups": "0f1107",  # movups [rdi], xmm0
    "movntps": "0f2b07",  # movntps [rdi], xmm0
    "movntdq": "660fe707",  # movntdq [rdi], xmm0
    "movnti": "480fc307",  # movnti [rdi], rax
    "movntq": "0fe707",  # movntq [rdi], mm0
    "maskmovdqu with a zero mask": "660fefc9660ff7c1",  # pxor xmm1, xmm1; maskmovdqu xmm0, xmm1
    "cmpxchg that succeeds": "31c0480fb10f",  # xor eax, eax; cmpxchg [rdi], rcx
    "cmpxchg that fails": "b001480fb10f",  # mov al, 1; cmpxchg [rdi], rcx
    "lock cmpxchg that fails": "b001f0480fb10f",
    "cmpxchg8b that fails": "b0010fc70f",  # mov al, 1; cmpxchg8b [rdi]
    "lock cmpxchg8b that fails": "b001f00fc70f",
    "cmpxchg16b that fails": "b001480fc70f",  # mov al, 1; cmpxchg16b [rdi]
    "lock cmpxchg16b that fails": "b001f0480fc70f",
}
READS = {
    "mov": "488b07",  # mov rax, [rdi]
    "bt": "480fba2705",  # bt qword ptr [rdi], 5
    "test": "488507",  # test [rdi], rax
    "cmp": "483907",  # cmp [rdi], rax
    "lodsq": "488d3748ad",  # lea rsi, [rdi]; lodsq
    "movups": "0f1007",  # movups xmm0, [rdi]
    "clflush": "0fae3f",  # clflush [rdi]
}
NEITHER = {
    "rep stosq of nothing": "31c9f348ab",  # xor ecx, ecx; rep stosq
    "vmaskmovps with a zero mask": "c5f1efc9c4e2712e07",  # vpxor xmm1, xmm1, xmm1, then with it
    "prefetcht0": "0f180f",  # prefetcht0 [rdi]
    "prefetchw": "0f0d0f",  # prefetchw [rdi]
    "lea": "488d07",  # lea rax, [rdi]
    "nop with an operand": "0f1f07",  # nop dword ptr [rdi]
}


@pytest.fixture
def rig(shadow: Host) -> Iterator[Rig]:
    """DATA with A and D clear, its page table shadowed."""
    with Rig(shadow, leaf=FRESH, pages=0x2200) as made:
        made.prime(OTHER)
        yield made


def execute(rig: Rig, name: str, code: str) -> None:
    if name.startswith("v") and not rig.host.kvm:
        pytest.xfail("The model's processor has no AVX.")
    if name in NEEDS_XSAVE:
        if not rig.host.profile.emulates_all_but_user and name.startswith("v"):
            pytest.skip("AVX needs XCR0 here, which the rig does not set.")
        try:
            rig.enter(rig.vcpu, cr4=0x40620)  # OSXSAVE
        except PykvmError:
            pytest.skip("The guest has no XSAVE.")
    assert rig.run(bytes.fromhex(code), rdi=VA, rsi=OTHER << 12).fault is None


@pytest.mark.parametrize("name", WRITES)
def test_marks(rig: Rig, name: str) -> None:
    """E, Dirty: the page, and its table for A and D, even where what is stored was there before."""
    if name.startswith("maskmov") and emulator() == QEMU_TCG and rig.host.kvm:
        pytest.skip("QEMU's TCG writes nothing for a zero mask, and does not fault.")
    execute(rig, name, WRITES[name])
    assert rig.dirty() == [DATA_PT, DATA]
    assert rig.leaf(DATA) == 0x67


@pytest.mark.parametrize("name", READS)
def test_reads(rig: Rig, name: str) -> None:
    """E, Not, unless D is set: A is set, which dirties the table.  CLFLUSH is a read access."""
    if name == "clflush" and emulator() == QEMU_TCG and rig.host.kvm:
        pytest.skip("QEMU's TCG does nothing for CLFLUSH.")
    execute(rig, name, READS[name])
    assert rig.dirty() == [DATA_PT]
    assert rig.leaf(DATA) == 0x27


@pytest.mark.parametrize("name", READS)
def test_reads_where_d_is_set(shadow: Host, name: str) -> None:
    """E and B.0: loads, bt, test, cmp, clflush dirty the page where the entry has D already."""
    if name == "clflush" and emulator() == QEMU_TCG and shadow.kvm:
        pytest.skip("QEMU's TCG does nothing for CLFLUSH.")
    with Rig(shadow, leaf=FRESH, pages=0x2200, entries={(DATA_PT, 0): VA | PAGE}) as rig:
        rig.prime(OTHER)
        execute(rig, name, READS[name])
        assert rig.dirty() == [DATA]


def test_a_return_address_where_d_is_set(shadow: Host) -> None:
    """B.0: RET reads its stack."""
    with Rig(shadow, leaf=FRESH, pages=0x2200, entries={(DATA_PT, 0): VA | PAGE}) as rig:
        rig.prime(OTHER)
        rig.memory.write(VA, DATA_CODE.to_bytes(8, "little"))
        rig.memory.write(DATA_CODE, DONE)
        rig.run(b"\xc3", rsp=VA)
        assert rig.dirty() == [DATA]


@pytest.mark.parametrize("name", NEITHER)
def test_neither_reads_nor_writes(rig: Rig, name: str) -> None:
    """E: no access at all."""
    execute(rig, name, NEITHER[name])
    assert rig.dirty() == []
    assert rig.leaf(DATA) == FRESH


def test_a_bit_offset_beyond_the_page(rig: Rig) -> None:
    """E: bts with such an offset dirties the other page only."""
    rig.run(b"\x48\x0f\xab\x07", rdi=VA, rax=0x8005)  # bts [rdi], rax
    assert rig.dirty() == [DATA_PT, DATA + 1]
    assert rig.leaf(DATA) == FRESH


@pytest.mark.parametrize(("flags", "code"), [(0x05, 7), (0, 6)], ids=["read-only", "not present"])
def test_a_store_into_a_second_page_that_faults(shadow: Host, flags: int, code: int) -> None:
    """E: the first page is dirty and its entry has A and D, although nothing was written."""
    entries = {(DATA_PT, 1): flags and (DATA + 1) << 12 | flags}
    with Rig(shadow, leaf=FRESH, entries=entries) as rig:
        rig.prime(OTHER)
        seen = rig.run(STORE[8], rdi=VA + 0xFFC, rax=0x2222222222222222)
        assert seen.fault == (14, code)
        assert {DATA_PT, DATA} <= set(rig.dirty())
        assert DATA + 1 not in rig.dirty()
        assert rig.leaf(DATA) == 0x67
        assert rig.memory.read(VA + 0xFFC, 4) == bytes(4)


def test_at_cpl_0_the_emulator_writes_the_first_part(shadow: Host) -> None:
    """E: where KVM emulates CPL 0, memory has 22222222 before the #PF."""
    if not shadow.profile.emulates_all_but_user:
        pytest.skip("CPL 0 runs natively here.")
    with Rig(shadow, leaf=FRESH, entries={(DATA_PT, 1): 0}, cpl=0) as rig:
        rig.prime()
        seen = rig.run(STORE[8], rdi=VA + 0xFFC, rax=0x2222222222222222)
        assert seen.fault == (14, 2)
        assert rig.memory.read(VA + 0xFFC, 4) == b"\x22" * 4
        assert {DATA_PT, DATA} <= set(rig.dirty())
