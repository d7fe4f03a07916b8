"""The host's processor executes single instructions; expected values are the SDM's."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pykvm.errors import ClosedError, HostError, UsageError
from pykvm.observe import HostCase, HostCpu, HostOutcome
from pykvm.observe.arena import CODE, DATA, DATA_END, PAGE, READ_ONLY, changes
from pykvm.observe.cpuid import host_cpuid
from pykvm.x86.bits import Rflags
from pykvm.x86.cpuid import find
from pykvm.x86.exceptions import Vector
from pykvm.x86.fpu import FloatingPoint
from pykvm.x86.registers import Registers

STATUS = Rflags.CF | Rflags.PF | Rflags.AF | Rflags.ZF | Rflags.SF | Rflags.OF


@pytest.fixture(scope="module")
def cpu64() -> Iterator[HostCpu]:
    with HostCpu(64) as cpu:
        yield cpu


@pytest.fixture(scope="module")
def cpu32() -> Iterator[HostCpu]:
    with HostCpu(32) as cpu:
        yield cpu


def run(
    cpu: HostCpu,
    code: str,
    *,
    memory: dict[int, bytes] | None = None,
    floating: FloatingPoint | None = None,
    **registers: int,
) -> HostOutcome:
    registers.setdefault("rip", CODE)
    return cpu.execute(HostCase(bytes.fromhex(code), Registers(**registers), floating, memory or {}))


def test_add_sets_the_six_flags(cpu64: HostCpu) -> None:
    out = run(cpu64, "4801d8", rax=2**63, rbx=2**63)  # add rax, rbx
    assert (out.vector, out.registers.rax, out.registers.rip) == (None, 0, CODE + 3)
    assert out.registers.rflags & STATUS == Rflags.CF | Rflags.OF | Rflags.ZF | Rflags.PF


def test_the_case_sets_flags(cpu64: HostCpu) -> None:
    out = run(cpu64, "4883d000", rax=1, rflags=2 | Rflags.CF)  # adc rax, 0
    assert out.registers.rax == 2


def test_only_the_written_bytes_come_back(cpu64: HostCpu) -> None:
    out = run(cpu64, "8903", rax=0x11002233, rbx=DATA + 5, memory={DATA: b"before", DATA + 7: b"\x55"})
    assert out.memory == ((DATA + 5, b"\x33\x22\x00\x11"),)
    assert run(cpu64, "8b03", rbx=DATA + 5).registers.rax == 0  # and nothing of it is left


@pytest.mark.parametrize(
    ("code", "vector"),
    [("48f7f3", Vector.DE), ("0f0b", Vector.UD), ("f4", Vector.GP), ("0f20c0", Vector.GP), ("cc", Vector.BP)],
)
def test_exceptions(cpu64: HostCpu, code: str, vector: Vector) -> None:
    out = run(cpu64, code)
    assert out.vector == vector
    assert out.registers.rip == CODE + (vector == Vector.BP)
    assert out.memory == ()


@pytest.mark.parametrize("address", [0, DATA - 1, DATA_END, 0x7FFF_0000_0000])
def test_page_faults_name_their_address(cpu64: HostCpu, address: int) -> None:
    out = run(cpu64, "8a03", rbx=address)
    assert (out.vector, out.address) == (Vector.PF, address)


def test_the_last_page_is_read_only(cpu64: HostCpu) -> None:
    assert run(cpu64, "8a03", rbx=READ_ONLY).vector is None
    out = run(cpu64, "8803", rbx=READ_ONLY, rax=1)
    assert (out.vector, out.address, out.memory) == (Vector.PF, READ_ONLY, ())


def test_non_canonical_addresses_fault_otherwise(cpu64: HostCpu) -> None:
    assert run(cpu64, "8a03", rbx=1 << 63).vector == Vector.GP


def test_misaligned_access_with_ac(cpu64: HostCpu) -> None:
    assert run(cpu64, "8b03", rbx=DATA + 1, rflags=2 | Rflags.AC).vector == Vector.AC


def test_branches_go_anywhere_and_are_not_followed(cpu64: HostCpu) -> None:
    out = run(cpu64, "ffe3", rbx=0x1234)  # jmp rbx
    assert (out.vector, out.registers.rip) == (None, 0x1234)
    assert run(cpu64, "ebfe").registers.rip == CODE


def test_repeated_strings_run_to_their_end(cpu64: HostCpu) -> None:
    out = run(cpu64, "f3aa", rax=0x5A, rcx=300, rdi=DATA)
    assert (out.vector, out.registers.rcx, out.registers.rip) == (None, 0, CODE + 2)
    assert out.memory == ((DATA, b"\x5a" * 300),)


def test_a_repeated_string_stops_at_a_fault(cpu64: HostCpu) -> None:
    out = run(cpu64, "fdf3aa"[2:], rax=1, rcx=10, rdi=DATA + 3, rflags=2 | Rflags.DF)
    assert (out.vector, out.address, out.registers.rcx) == (Vector.PF, DATA - 1, 6)
    assert out.memory == ((DATA, b"\1\1\1\1"),)


def test_a_repeated_string_at_the_end_of_the_code_page(cpu64: HostCpu) -> None:
    out = run(cpu64, "f3aa", rax=1, rcx=2, rdi=DATA, rip=CODE + PAGE - 2)
    assert (out.vector, out.registers.rip, out.registers.rcx) == (None, CODE + PAGE, 0)


def test_code_that_passes_its_page_faults(cpu64: HostCpu) -> None:
    out = run(cpu64, "4801d8", rip=CODE + PAGE - 2)
    assert (out.vector, out.address) == (Vector.PF, CODE + PAGE)


def test_pushf_does_not_show_the_trap_flag(cpu64: HostCpu) -> None:
    out = run(cpu64, "9c", rsp=DATA + 64, rflags=2 | Rflags.CF)
    assert out.memory == ((DATA + 56, b"\x03\x02"),)


def test_a_load_of_ss_puts_off_the_trap_and_not_the_outcome(cpu64: HostCpu) -> None:
    out = run(cpu64, "8ed3", rbx=0x2B)  # mov ss, ebx
    assert (out.vector, out.registers.rip) == (None, CODE + 2)


def test_cpuid_is_the_host_s(cpu64: HostCpu) -> None:
    leaves = host_cpuid(cpu64)
    assert {find(leaves, 0), find(leaves, 1), find(leaves, 7)} & {None} == set()
    first = find(leaves, 0)
    assert first is not None
    vendor = b"".join(n.to_bytes(4, "little") for n in (first.ebx, first.edx, first.ecx)).decode()
    assert vendor in Path("/proc/cpuinfo").read_text()


def test_flags_that_an_instruction_sets_do_not_stay(cpu64: HostCpu) -> None:
    run(cpu64, "9d", rsp=DATA, memory={DATA: (2 | Rflags.ID | Rflags.NT).to_bytes(8, "little")})  # popf
    assert run(cpu64, "9c", rsp=DATA + 8).memory == ((DATA, b"\x02\x02"),)  # pushf


def test_sse_and_x87_state_goes_in_and_out(cpu64: HostCpu) -> None:
    xmm = tuple(bytes([number]) * 16 for number in range(16))
    stack = (b"\0" * 7 + b"\x80\xff\x3f" + bytes(6), *(bytes(16),) * 7)
    start = FloatingPoint(xmm=xmm, fpr=stack, ftwx=1, mxcsr=0x1FBF)
    out = run(cpu64, "660fefc1", floating=start)  # pxor xmm0, xmm1
    assert out.floating == replace(start, xmm=(b"\1" * 16, *xmm[1:]))


def test_unmasked_sse_exceptions(cpu64: HostCpu) -> None:
    out = run(cpu64, "0f5ec0", floating=FloatingPoint(mxcsr=0))  # divps xmm0, xmm0: 0 / 0
    assert out.vector == Vector.XM


def test_segment_bases(cpu64: HostCpu) -> None:
    case = HostCase(bytes.fromhex("65480303"), Registers(rip=CODE, rbx=8), None, {DATA + 8: b"\7"}, 0, DATA)
    assert cpu64.execute(case).registers.rax == 7  # add rax, gs:[rbx]


def test_32_bit_code(cpu32: HostCpu) -> None:
    out = run(cpu32, "40", rax=0x7FFFFFFF)  # inc eax; a REX prefix in 64-bit code
    assert (out.registers.rax, out.registers.rip) == (0x80000000, CODE + 1)
    assert run(cpu32, "37", rax=0xB).registers.rax == 0x101  # aaa
    assert run(cpu32, "ce", rflags=2 | Rflags.OF).vector == Vector.OF
    assert run(cpu32, "6203", rax=5, rbx=DATA).vector == Vector.BR
    assert run(cpu32, "06", rsp=DATA + 64).memory == ((DATA + 60, b"\x2b"),)  # push es


def test_64_bit_segments_are_not_those_of_32_bit_code(cpu64: HostCpu) -> None:
    assert run(cpu64, "37").vector == Vector.UD


@pytest.mark.parametrize(
    "code",
    ["0f05", "0f34", "cd80", "cd03", "66480f05", "2e650f34", "f0cd80", "cd", "0f01c1", "0f01d9", "0f01ef",
     "660faef0", "f20faef0", "0fae2b", "f30fc7f0", "0f01fa", "0f01fc"],
)  # fmt: skip
@pytest.mark.parametrize("bits", [32, 64])
def test_what_leaves_the_process_is_refused(bits: int, code: str, request: pytest.FixtureRequest) -> None:
    if bits == 32 and code == "66480f05":
        code = "660f05"  # 48 is DEC EAX there
    cpu: HostCpu = request.getfixturevalue(f"cpu{bits}")
    with pytest.raises(UsageError, match="must not execute"):
        run(cpu, code)


def test_fences_are_not_refused(cpu64: HostCpu) -> None:
    assert run(cpu64, "0faef0").vector is None


def test_the_child_itself_cannot_make_system_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second fence, seen by taking the first one away."""
    monkeypatch.setattr("pykvm.observe.host_cpu.refusal", lambda code, bits: None)
    with HostCpu(64) as cpu:
        first = cpu.pid
        with pytest.raises(Exception, match="SIGSYS"):
            run(cpu, "0f05", rax=39)  # getpid
        assert cpu.pid != first
        assert run(cpu, "90").vector is None


def test_code_outside_its_page_is_refused(cpu64: HostCpu) -> None:
    with pytest.raises(UsageError, match="code is in the page"):
        run(cpu64, "90", rip=DATA)
    with pytest.raises(UsageError, match="not inside the arena"):
        run(cpu64, "90", memory={DATA_END - 1: b"ab"})


@pytest.mark.parametrize(
    ("name", "step"), [("binding.PTRACE_TRACEME", "ptrace"), ("_PR_SET_SECCOMP", "seccomp")]
)
def test_what_the_kernel_forbids_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, step: str
) -> None:
    monkeypatch.setattr(f"pykvm.observe.child.{name}", 0x7FFF)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match=rf"{step}.*leave the host out\.$"):
        HostCpu(64)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_dead_child_is_replaced() -> None:
    with HostCpu(64) as cpu:
        first = cpu.pid
        os.kill(first, signal.SIGKILL)
        assert run(cpu, "48ffc0", rax=1).registers.rax == 2
        assert cpu.pid != first
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)


def test_a_child_that_is_out_of_time_is_replaced() -> None:
    """RLIMIT_CPU sends SIGXCPU: what any signal that is no outcome of an instruction does."""
    with HostCpu(64) as cpu:
        first = cpu.pid
        os.kill(first, signal.SIGXCPU)
        assert run(cpu, "48ffc0", rax=1).registers.rax == 2
        assert cpu.pid != first


def test_nothing_is_left_behind() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    pids = set()
    for _ in range(10):
        with HostCpu(64) as cpu:
            during = descriptors()
            for _ in range(100):
                run(cpu, "90")
            assert descriptors() == during
            pids.add(cpu.pid)
            assert os.listdir(f"/proc/{cpu.pid}/fd") == []
    assert descriptors() == before
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    cpu.close()
    with pytest.raises(ClosedError):
        run(cpu, "90")


def test_an_abandoned_child_is_collected() -> None:
    cpu = HostCpu(64)
    pid = cpu.pid
    cpu._arena.close()
    del cpu
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_other_threads_need_their_own() -> None:
    results: list[object] = []

    def work() -> None:
        try:
            run(cpu, "90")
        except UsageError as error:
            results.append(error)
        with HostCpu(64) as own:
            results.append(run(own, "48ffc0", rax=1).registers.rax)

    with HostCpu(64) as cpu:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert run(cpu, "90").vector is None
    assert isinstance(results[0], UsageError)
    assert results[1] == 2


def test_changes_are_the_longest_runs() -> None:
    assert changes(b"abcdef", b"abcdef", 0) == ()
    assert changes(b"abcdef", b"XYcdeZ", 100) == ((100, b"XY"), (105, b"Z"))
