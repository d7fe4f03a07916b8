"""Which instructions mark the page that they name (hosts.md E): real KVM, the model, and a table agree.

The page's entry has A set and D clear, so that a read marks nothing.
"""

from __future__ import annotations

import pytest

from pykvm.crosscheck import steps as plan
from pykvm.crosscheck.compare import Agreement
from pykvm.crosscheck.mass import judge, traces
from pykvm.crosscheck.scenario import Scenario
from pykvm.kvm import KvmSystem
from pykvm.machine import IoOut
from pykvm.model.system import ModelSystem
from tests.crosscheck.samples import DATA, PORT, guest, page, scenario

OUT = b"\xe6\x10"
WRITES = {
    "mov [rdi], rax": "488907",
    "mov byte [rdi], 0": "c60700",
    "movabs [DATA + 0x2000], al": "a2 00200800 00000000",
    "movnti [rdi], rax": "480fc307",
    "stosb": "aa",
    "movsb from its own page": "4889fe a4",
    "push to it": "488da780000000 50",
    "call with its stack there": "488da780000000 e800000000",
    "pop [rdi]": "50 8f07",
    "enter with its stack there": "488da780000000 c8000000",
    "xchg [rdi], rax": "488707",
    "xadd [rdi], rax": "480fc107",
    "bts [rdi], rax": "480fab07",
    "lock btr qword [rdi], 0": "f0480fba3700",
    "or byte [rdi], 0": "800f00",
    "lock or byte [rdi], 0": "f0800f00",
    "and byte [rdi], -1": "8027ff",
    "inc byte [rdi]": "fe07",
    "not byte [rdi]": "f617",
    "rol byte [rdi], 0": "c00700",
    "shl byte [rdi], cl with cl = 0": "31c9 d227",
    "shld [rdi], eax, 0": "0fa40700",
    "sete [rdi]": "0f9407",
    "a failing cmpxchg": "48c7c0ffffffff 0fb10f",
    "a failing lock cmpxchg": "48c7c0ffffffff f00fb10f",
    "a failing cmpxchg8b": "48c7c0ffffffff 0fc70f",
    "a failing lock cmpxchg16b": "48c7c0ffffffff f0480fc70f",
    "movups [rdi], xmm0": "0f1107",
    "movaps [rdi], xmm0": "0f2907",
    "movntdq [rdi], xmm0": "660fe707",
    "movq [rdi], mm0": "0f7f07",
    "maskmovdqu with an empty mask": "660fefc9 660ff7c1",
    "fxsave [rdi]": "0fae07",
    "fnstcw [rdi]": "d93f",
    "fnstsw [rdi]": "dd3f",
    "fnstenv [rdi]": "d937",
    "fstp tbyte [rdi]": "d9ee db3f",
    "stmxcsr [rdi]": "0fae1f",
    "sgdt [rdi]": "0f0107",
    "smsw [rdi]": "0f0127",
    "str [rdi]": "0f000f",
}
READS = {
    "mov rax, [rdi]": "488b07",
    "bt [rdi], rax": "480fa307",
    "test [rdi], rax": "488507",
    "cmp [rdi], rax": "483907",
    "push [rdi]": "ff37",
    "lodsb": "4889fe ac",
    "scasb": "ae",
    "rep stosb with rcx = 0": "31c9 f3aa",
    "rep movsb with rcx = 0": "31c9 f3a4",
    "lea rax, [rdi]": "488d07",
    "nop [rdi]": "0f1f07",
    "prefetcht0 [rdi]": "0f180f",
    "prefetchw [rdi]": "0f0d0f",
    "clflush [rdi]": "0fae3f",
    "movups xmm0, [rdi]": "0f1007",
    "ldmxcsr from the stack and a load": "488b07",
    "fld qword [rdi]": "dd07",
    "bts beyond the page": "b800800000 0fab07",
    "a store over its end": "48c7c7ff0f0800 aa",
}
"""What does not mark page 2; two of them write to other pages."""
TARGET = 2


def made(code: str, cpl: int) -> Scenario:
    """RDI is the address of data page 2; RAX 0x41, all else zero."""
    program = b"\xbf" + page(TARGET).to_bytes(4, "little") + bytes.fromhex(code) + OUT
    return scenario(code, guest("long", cpl, program), plan.Run(), plan.Collect(0), plan.Collect(1))


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("name", [*WRITES, *READS])
def test_kvm_and_the_model_mark_the_same_pages(
    system: KvmSystem, model: ModelSystem, name: str, cpl: int
) -> None:
    example = made((WRITES | READS)[name], cpl)
    theirs, ours = traces(example, system, model)
    assert ours.steps[0].exits[0] == IoOut(
        PORT, 1, ours.steps[0].vcpus[0].registers.rax.to_bytes(8, "little")[:1]
    )
    marked = (1, DATA // 4096 + TARGET) in (ours.steps[2].dirty or ())
    assert marked == (name in WRITES)
    result = judge(theirs, ours)
    assert isinstance(result, Agreement), str(result)
    # At CPL 0 KVM's emulator lacks some of them where it has to interpret; CPL 3 is native everywhere.
    assert result.steps == 3 or cpl == 0, result.note
