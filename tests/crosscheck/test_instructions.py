"""Single instructions on model, KVM and the host: agreement, and that disagreement would be found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from pykvm.crosscheck.instructions.bench import Bench, Kind, processor
from pykvm.crosscheck.instructions.campaign import ROOMS, Campaign, Report
from pykvm.crosscheck.instructions.case import FLAT, REAL, Executor, InstructionCase, Outcome
from pykvm.crosscheck.instructions.compare import difference
from pykvm.crosscheck.instructions.coverage import markdown
from pykvm.crosscheck.instructions.forms import FORMS
from pykvm.crosscheck.instructions.generate import Generated, Generator, forms_of
from pykvm.crosscheck.instructions.host import HostExecutor
from pykvm.crosscheck.instructions.known import TABLE
from pykvm.crosscheck.instructions.machine import MachineExecutor, changes_special_registers
from pykvm.crosscheck.instructions.rule import opcode_of
from pykvm.crosscheck.instructions.shrink import shrink
from pykvm.crosscheck.instructions.strategies import cases
from pykvm.errors import PykvmError, UsageError
from pykvm.kvm import KvmSystem
from pykvm.machine import System
from pykvm.model.cpu import decode
from pykvm.model.cpu.semantics import TABLE as SEMANTICS
from pykvm.model.oracle import InstructionOracle
from pykvm.model.system import ModelSystem
from pykvm.x86.bits import Rflags
from pykvm.x86.exceptions import Vector
from pykvm.x86.fpu import FloatingPoint
from pykvm.x86.registers import Registers

ADD = bytes.fromhex("01d8")
"""add eax, ebx"""
INTERESTING = int(Rflags.FIXED | Rflags.IF)


@pytest.fixture
def model() -> Iterator[ModelSystem]:
    with ModelSystem() as system:
        yield system


def flat(code: str, cpl: int = 3, mode: int = 64, **registers: int) -> InstructionCase:
    registers = {"rip": FLAT.code + 0x100, "rflags": INTERESTING, "rsp": FLAT.data + 0x800} | registers
    return InstructionCase(mode, cpl, bytes.fromhex(code), Registers(**registers))


def campaign(systems: list[System], rooms: tuple[tuple[int, int], ...], count: int, seed: int = 1) -> Report:
    cpuid = processor(systems[0])
    return Campaign(systems, InstructionOracle(cpuid), cpuid, seed=seed, rooms=rooms).run(cases=count)


# --- agreement ---------------------------------------------------------------------------------------


def test_the_model_agrees_with_the_host(model: ModelSystem) -> None:
    report = campaign([model], ((64, 3), (32, 3)), 800)
    assert [str(each.verdict) + each.text for each in report.disagreements] == []
    for room in report.rooms:
        assert room.executors == ("model", "host")
        assert room.verdicts[Kind.AGREE] > 0.9 * room.cases
        assert not room.missing


@pytest.mark.kvm
def test_model_host_and_kvm_agree(model: ModelSystem, system: KvmSystem) -> None:
    report = campaign([model, system], ROOMS, 300, seed=2)
    assert [str(each.verdict) + each.text for each in report.disagreements] == []
    assert report.unexplained == 0
    assert report.cases == 300 * len(ROOMS)


@pytest.mark.parametrize(("mode", "cpl"), ROOMS)
def test_every_form_of_a_mode_runs_on_the_model(model: ModelSystem, mode: int, cpl: int) -> None:
    executor = MachineExecutor(model, mode, cpl, processor(model))
    try:
        generator = Generator(mode, cpl, 3)
        for form in generator.forms:
            made = generator.make(form)
            assert executor.execute(made.case).failure in {"", "Halted", "shutdown"}, (form.id, made.case)
    finally:
        executor.close()


# --- what a broken model shows -------------------------------------------------------------------------


def test_broken_semantics_are_found_and_shrunk(model: ModelSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ADD that forgets the carry out of its lowest byte is not taken for a right one."""
    right = SEMANTICS["add"]

    def wrong(cpu, insn):  # type: ignore[no-untyped-def]
        right.execute(cpu, insn)
        if insn.operands[0].size == 4:
            cpu.rflags ^= Rflags.CF if cpu.regs[0] & 0x80 else 0

    cpuid = processor(model)
    oracle = InstructionOracle(cpuid)
    monkeypatch.setattr(decode, "decoder", decode.Decoder)  # those that are shared know instructions already
    monkeypatch.setitem(SEMANTICS, "add", replace(right, execute=wrong))
    with Bench(64, 3, [model], oracle, cpuid) as bench:
        generator = Generator(64, 3, 4)
        form = next(form for form in FORMS if form.opcode == b"\x01")
        found = None
        for _ in range(200):
            case = generator.make(form).case
            if bench.judge(case).kind is Kind.MODEL:
                found = shrink(case, lambda smaller: bench.judge(smaller).kind is Kind.MODEL)
                break
        assert found is not None
        assert len(found.code) <= len(case.code)
        assert found.memory == {} or len(found.memory) < 3
        nonzero = [
            name for name in ("rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10") if getattr(found.registers, name)
        ]
        assert len(nonzero) <= 2
        assert "CF" in str(bench.judge(found))


def test_a_crash_of_the_model_is_its_outcome(model: ModelSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(cpu, insn):  # type: ignore[no-untyped-def]
        raise ZeroDivisionError("in the model")

    monkeypatch.setattr(decode, "decoder", decode.Decoder)  # those that are shared know instructions already
    monkeypatch.setitem(SEMANTICS, "add", replace(SEMANTICS["add"], execute=crash))
    cpuid = processor(model)
    with Bench(64, 3, [model], InstructionOracle(cpuid), cpuid) as bench:
        verdict = bench.judge(flat("01d8"))
        assert verdict.kind is Kind.MODEL
        assert "ZeroDivisionError" in str(verdict)
        assert bench.judge(flat("29d8")).kind is Kind.AGREE


def test_an_instruction_without_semantics_is_missing(
    model: ModelSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "decoder", decode.Decoder)  # those that are shared know instructions already
    monkeypatch.delitem(SEMANTICS, "bswap")
    cpuid = processor(model)
    with Bench(64, 3, [model], InstructionOracle(cpuid), cpuid) as bench:
        assert bench.judge(flat("0fc8")).kind is Kind.MISSING


# --- executors -------------------------------------------------------------------------------------------


def outcomes(model: ModelSystem, case: InstructionCase) -> list[Outcome]:
    """On the model, the host (at CPL 3) and KVM (where there is one), in this order."""
    with ExitStack() as stack:
        made: list[Executor] = [MachineExecutor(model, case.mode, case.cpl, processor(model))]
        if case.cpl == 3:
            made.append(HostExecutor(case.mode))
        with suppress(PykvmError):
            system = stack.enter_context(KvmSystem())
            made.append(MachineExecutor(system, case.mode, case.cpl))
        for each in made:
            stack.callback(each.close)
        return [each.execute(case) for each in made]


def test_results_by_the_sdm_on_every_executor(model: ModelSystem) -> None:
    for out in outcomes(model, flat("01d8", rax=0xFFFFFFFF, rbx=1)):
        assert (out.registers.rax, out.vector) == (0, None)
        assert out.registers.rip == FLAT.code + 0x102
        assert out.registers.rflags & (Rflags.CF | Rflags.ZF) == Rflags.CF | Rflags.ZF


def test_page_faults_on_every_executor(model: ModelSystem) -> None:
    for out in outcomes(model, flat("8903", rbx=FLAT.end)):  # mov [rbx], eax
        assert (out.vector, out.address) == (Vector.PF, FLAT.end)
        assert out.error in {None, 6}
        assert out.registers.rip == FLAT.code + 0x100
    for out in outcomes(model, flat("8903", rbx=FLAT.read_only)):
        assert out.error in {None, 7}


def test_branches_end_where_they_lead(model: ModelSystem) -> None:
    for target in (FLAT.code + 0x800, FLAT.data, 0x1234):
        for out in outcomes(model, flat("ffe3", rbx=target)):  # jmp rbx
            assert (out.vector, out.registers.rip) == (None, target)


def test_floating_point_state_on_every_executor(model: ModelSystem) -> None:
    start = FloatingPoint(xmm=(b"\x0f" * 16, b"\xf0" * 16, *(bytes(16),) * 14), mxcsr=0x1FBF)
    case = replace(flat("0f57c1"), floating=start)  # xorps xmm0, xmm1
    for out in outcomes(model, case):
        assert out.floating is not None
        assert out.floating.xmm[:2] == (b"\xff" * 16, b"\xf0" * 16)
        assert out.floating.mxcsr == 0x1FBF


def test_floating_point_state_survives_a_fault(model: ModelSystem) -> None:
    start = FloatingPoint(xmm=(b"\x0f" * 16,) * 8 + (bytes(16),) * 8)
    for mode in (64, 32):
        case = replace(flat("0f1003", mode=mode), floating=start)  # movups xmm0, [rbx]
        for out in outcomes(model, case)[:2]:
            assert out.vector == Vector.PF
            assert out.floating is not None
            assert out.floating.xmm == start.xmm


def test_real_mode_exceptions_leave_memory_alone(model: ModelSystem) -> None:
    registers = Registers(rip=0x100, rsp=0x800, rflags=INTERESTING)
    case = InstructionCase(16, 0, b"\xf7\xf3", registers, {REAL.stack + 0x7FA: b"\x11" * 6})  # div bx
    for out in outcomes(model, case):
        assert out.vector == Vector.DE
        assert (out.registers.rip, out.registers.rsp) == (0x100, 0x800)
        assert out.memory == ()


def test_a_jump_to_itself_is_unfinished(model: ModelSystem) -> None:
    executor = MachineExecutor(model, 64, 3, processor(model))
    try:
        assert executor.execute(flat("ebfe")).failure == "unfinished"
        assert executor.execute(flat("90")).failure == ""
    finally:
        executor.close()


def test_a_case_does_not_see_the_one_before_it(model: ModelSystem) -> None:
    executor = MachineExecutor(model, 32, 3, processor(model))
    try:
        first = executor.execute(flat("1e", mode=32))  # push ds
        executor.execute(flat("8ed8", mode=32))  # mov ds, eax: a null selector
        assert executor.execute(flat("1e", mode=32)) == first
    finally:
        executor.close()


@pytest.mark.parametrize("code", ["8ed8", "1f", "0fa1", "0f22c0", "0f01c1", "ff18", "cf", "65ff2b", "0f"])
def test_instructions_that_load_segments_are_known(code: str) -> None:
    assert changes_special_registers(flat(code))


@pytest.mark.parametrize("code", ["01d8", "f3a4", "0fb6c0", "660fefc1", "4889d8", "0fae03"])
def test_others_do_not_cost_the_time(code: str) -> None:
    assert not changes_special_registers(flat(code))


def test_without_ptrace_the_host_is_left_out(model: ModelSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pykvm.observe.child.binding.PTRACE_TRACEME", 0x7FFF)
    cpuid = tuple(model.supported_cpuid)
    assert processor(model) == cpuid
    with Bench(64, 3, [model], InstructionOracle(cpuid), cpuid) as bench:
        assert bench.names == ("model",)
        assert "ptrace" in bench.left_out[0]
        assert bench.judge(flat("01d8")).kind is Kind.ALONE


def test_alone_at_cpl_0_the_twin_at_cpl_3_is_asked(model: ModelSystem) -> None:
    cpuid = processor(model)
    with Bench(64, 0, [model], InstructionOracle(cpuid), cpuid) as bench:
        assert bench.judge(flat("01d8", cpl=0)).kind is Kind.AGREE
        assert bench.judge(flat("0f20c0", cpl=0)).kind is Kind.ALONE  # mov rax, cr0: privileged


# --- comparing ---------------------------------------------------------------------------------------------


def test_every_part_of_an_outcome_is_compared() -> None:
    base = Outcome(Registers(rflags=2), floating=FloatingPoint())
    for other, word in [
        (replace(base, registers=Registers(rflags=2, r9=1)), "r9"),
        (replace(base, registers=Registers(rflags=3)), "CF"),
        (replace(base, memory=((FLAT.data, b"\1"),)), "memory"),
        (replace(base, vector=6), "#UD"),
        (replace(base, failure="shutdown"), "shutdown"),
        (replace(base, floating=FloatingPoint(mxcsr=0)), "mxcsr"),
        (replace(base, floating=FloatingPoint(xmm=(b"\1" * 16,) * 16)), "xmm[0]"),
    ]:
        found = difference(base, other)
        assert found is not None
        assert word in found
    assert difference(base, base) is None
    fault = replace(base, vector=14, error=4, address=8)
    assert difference(fault, replace(fault, error=6)) is not None
    assert difference(fault, replace(fault, address=9)) is not None
    assert difference(fault, replace(fault, error=None)) is None


def test_undefined_flags_do_not_count() -> None:
    one, other = Outcome(Registers(rflags=2)), Outcome(Registers(rflags=2 | Rflags.AF))
    assert difference(one, other) is not None
    assert difference(one, other, undefined=int(Rflags.AF)) is None


def test_known_differences_do_not_hide_plain_wrong_results() -> None:
    """A rule that matched a wrong sum would match everything."""
    case = flat("01d8")
    right, wrong = Outcome(Registers(rax=3)), Outcome(Registers(rax=4))
    for mode, cpl in ROOMS:
        other = replace(case, mode=mode, cpl=cpl)
        if mode == 16:
            other = replace(other, registers=replace(case.registers, rip=0x100))
        for rule in TABLE:
            assert not rule.applies(other, opcode_of(other), right, wrong), rule.name


# --- generating --------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_cases() -> None:
    one, other = Generator(64, 3, 7), Generator(64, 3, 7)
    assert [one.next() for _ in range(300)] == [other.next() for _ in range(300)]
    assert Generator(64, 3, 8).next() != Generator(64, 3, 7).next()


@pytest.mark.parametrize(("mode", "cpl"), ROOMS)
def test_one_sweep_hits_every_form_with_valid_cases(mode: int, cpl: int) -> None:
    generator = Generator(mode, cpl, 1)
    made = [generator.make(form) for form in generator.forms]
    assert {each.form for each in made} == set(forms_of(mode, cpl))
    for each in made:
        each.case.check()
        assert InstructionCase.from_json(json.loads(json.dumps(each.case.to_json()))) == each.case


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(made=cases(32, 3))
def test_hypothesis_makes_the_same_kind_of_cases(made: Generated) -> None:
    made.case.check()
    assert (made.case.mode, made.case.cpl) == (32, 3)


@pytest.mark.parametrize(
    "change",
    [{"kind": "scenario"}, {"mode": 48}, {"cpl": 1}, {"code": ""}, {"code": "xy"}, {"memory": {"0x0": "00"}},
     {"registers": {"rip": "0x0"}}, {"registers": {"rzz": "0x1"}}, {"floating": {"xmm": 3}},
     {"floating": {"xmm": ["00" * 16] * 15}}, {"floating": {"fpr": ["00" * 15] * 8}},
     {"floating": {"fpr": "0x1"}}, {"floating": {"fsw": "0x10000"}}, {"floating": {"mxcsr": ["00"]}},
     {"floating": {"mxcsr": "0x10000"}}, {"fs_base": "-0x1"}, {"gs_base": hex(1 << 64)}, {"code": "90" * 65},
     {"registers": {"rip": hex(FLAT.code), "rax": hex(1 << 64)}}],
)  # fmt: skip
def test_what_is_no_case_is_refused(change: dict[str, object]) -> None:
    document = flat("90").to_json() | change
    with pytest.raises(UsageError):
        InstructionCase.from_json(document)


def test_the_coverage_table_has_a_row_for_every_form(model: ModelSystem) -> None:
    report = campaign([model], ((64, 3),), 100)
    rows = markdown(report).splitlines()[6:]
    assert len(rows) == len({form.id for form in FORMS})
    assert sum(int(row.split("|")[3].split()[0]) for row in rows if row.split("|")[3].strip() != "-") == 100
