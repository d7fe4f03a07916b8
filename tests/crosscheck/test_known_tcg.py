"""Bugs of QEMU's TCG explain what they do in its labs, and nothing anywhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest

from pykvm.crosscheck.instructions.case import FLAT, InstructionCase, Outcome
from pykvm.crosscheck.instructions.known import TABLE, explanation
from pykvm.x86.exceptions import Vector
from pykvm.x86.fpu import FloatingPoint
from pykvm.x86.registers import Registers

LAB = "PYKVM_LAB_EMULATOR"
PREFIX = "emulator: QEMU's TCG "
REGISTERS = Registers(rip=FLAT.code + 0x100, rflags=0x202, rsp=FLAT.data + 0x800)
FX = FloatingPoint()
DONE = Outcome(REGISTERS)
FX_DONE = Outcome(REGISTERS, floating=FX)
FAULT = Outcome(REGISTERS, vector=Vector.PF, error=6, address=0x5000)
EXPONENT = bytes(8) + b"\xff\xff" + bytes(6)
VALUE = b"\1" + bytes(15)


class Bug(NamedTuple):
    """A case in which TCG differs, and outcomes that the bug does not explain."""

    name: str
    case: InstructionCase
    model: Outcome
    tcg: Outcome
    others: tuple[Outcome, ...]


def case(code: str, floating: FloatingPoint | None = None, mode: int = 64) -> InstructionCase:
    return InstructionCase(mode, 3, bytes.fromhex(code), REGISTERS, floating=floating)


def refused(vector: Vector) -> Outcome:
    return Outcome(REGISTERS, vector=vector, error=0)


RAX = replace(DONE, registers=replace(REGISTERS, rax=1))
FX_RAX = replace(RAX, floating=FX)
TOP = replace(FX, fsw=0x3800)
BUGS = (
    Bug("x87", case("d9fa", FX), FX_DONE, replace(FX_DONE, floating=replace(FX, fsw=0x41)), (FX_RAX,)),
    Bug(
        "exponent",
        case("0ffcc1", FX),
        replace(FX_DONE, floating=replace(FX, fpr=(EXPONENT, *FX.fpr[1:]))),
        FX_DONE,
        (FX_RAX, replace(FX_DONE, floating=replace(FX, fpr=(VALUE, *FX.fpr[1:])))),
    ),
    Bug(
        "MMX state",
        case("0ffc07", FX),
        replace(FAULT, floating=TOP),
        replace(FAULT, floating=FX),
        (replace(FAULT, address=0x6000, floating=FX), FX_DONE),
    ),
    Bug(
        "MXCSR.DE",
        case("0f58c1", FX),
        replace(FX_DONE, floating=replace(FX, mxcsr=0x1F82)),
        replace(FX_DONE, floating=replace(FX, mxcsr=0x1F80)),
        (replace(FX_DONE, floating=replace(FX, ftwx=1), vector=Vector.UD), FX_RAX),
    ),
    Bug(
        "read-modify-write",
        case("0107"),
        FAULT,
        replace(FAULT, error=4),
        (replace(FAULT, error=2), replace(FAULT, error=4, address=0), replace(FAULT, error=7), DONE),
    ),
    Bug("check alignment", case("8b07"), refused(Vector.AC), DONE, ()),
    Bug(
        "unaligned",
        case("660ff307", FX),
        refused(Vector.GP),
        FX_DONE,
        (refused(Vector.UD), refused(Vector.SS)),
    ),
    Bug("near branches", case("660f8980000000"), DONE, replace(DONE, registers=Registers(rip=1)), ()),
    Bug(
        "read-modify-write",
        case("64 4d 83 a8 56 18 9c 13 20"),
        replace(FAULT, error=3, address=0x5FFC),
        replace(FAULT, error=0, address=0x6000),
        (replace(FAULT, error=0, address=0x7000), replace(FAULT, error=0, address=0x5F00)),
    ),
    Bug(
        "MMX state",
        case("0f2a5dec", FX),
        replace(FX_DONE, floating=TOP),
        FX_DONE,
        (FX_RAX,),
    ),
    Bug("MMX state", case("0f77", FX), FX_DONE, replace(FX_DONE, floating=TOP), (FX_RAX,)),
    Bug("SSE arithmetic", case("660f2e01", FX), refused(Vector.XM), FX_DONE, (refused(Vector.UD),)),
    Bug(
        "SSE arithmetic",
        case("f20f5dc5", FX),
        FX_DONE,
        replace(FX_DONE, floating=replace(FX, xmm=(VALUE, *FX.xmm[1:]))),
        (FX_RAX, refused(Vector.UD)),
    ),
    Bug("SSE arithmetic", case("f20f59c1", FX), refused(Vector.XM), FX_DONE, (refused(Vector.GP),)),
    Bug(
        "limits and rights",
        case("2e862a", mode=32),
        refused(Vector.GP),
        FAULT,
        (refused(Vector.SS), refused(Vector.UD)),
    ),
    Bug(
        "64-bit far",
        case("4d0fb2637a"),
        replace(refused(Vector.GP), error=0x28),
        replace(refused(Vector.GP), error=0xC560),
        (),
    ),
    Bug(
        "not canonical",
        case("c22100"),
        refused(Vector.GP),
        replace(refused(Vector.GP), registers=replace(REGISTERS, rsp=0x29)),
        (DONE,),
    ),
    Bug("MOVNTI", case("660fc338"), refused(Vector.UD), DONE, ()),
    Bug("CMPXCHG16B", case("66480fc74bc8"), refused(Vector.GP), refused(Vector.UD), (DONE,)),
)


@pytest.mark.parametrize("who", ["host", "kvm"])
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_named_in_its_lab(bug: Bug, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAB, "qemu-tcg")
    found = explanation(who, bug.case, bug.model, bug.tcg)
    assert found is not None
    assert found.name.startswith(PREFIX)
    assert bug.name in found.name


@pytest.mark.parametrize("emulator", ["", "bochs", "qemu-kvm"])
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_elsewhere_it_explains_nothing(bug: Bug, emulator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAB, emulator)
    for who in ("host", "kvm"):
        found = explanation(who, bug.case, bug.model, bug.tcg)
        assert found is None or found.who != "tcg"


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_it_explains_nothing_else(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAB, "qemu-tcg")
    for other in bug.others:
        assert explanation("kvm", bug.case, bug.model, other) is None, other
    plain = case("01d8")
    assert explanation("kvm", plain, DONE, RAX) is None


def test_every_bug_has_its_case() -> None:
    rules = [rule for rule in TABLE if rule.who == "tcg"]
    assert all(rule.name.startswith(PREFIX) for rule in rules)
    for rule in rules:
        assert any(bug.name in rule.name for bug in BUGS), rule.name


def test_in_labs_kvms_emulator_runs_only_intels_real_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """AAM's flags are a difference of KVM's emulator, which processors with VMX or SVM do not use for it."""
    flags = replace(DONE, registers=replace(REGISTERS, rflags=0x246))
    for emulator, mode, expected in (
        ("", 32, True),
        ("", 16, True),
        ("bochs", 32, False),
        ("bochs", 16, True),
        ("qemu-tcg", 16, False),
        ("qemu-tcg", 32, False),
    ):
        monkeypatch.setenv(LAB, emulator)
        assert (explanation("kvm", case("d40a", mode=mode), DONE, flags) is not None) == expected


def test_undefined_bits_of_lar_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAB, "qemu-tcg")
    lar = case("0f02d8")
    rights = replace(DONE, registers=replace(REGISTERS, rbx=0xCFFB00))
    found = explanation("kvm", lar, rights, replace(DONE, registers=replace(REGISTERS, rbx=0xC0FB00)))
    assert found is not None
    assert found.name == "undefined bits of LAR"
    wrong = replace(DONE, registers=replace(REGISTERS, rbx=0xC0FA00))
    assert explanation("host", lar, rights, wrong) is None
