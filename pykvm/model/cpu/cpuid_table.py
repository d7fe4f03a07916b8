"""The CPUID of the reference processor: exactly what it implements (SDM vol. 2, CPUID, tables 3-8 on)."""

from __future__ import annotations

from typing import Final

from pykvm.model.cpu.xstate import IMPLEMENTED, LEGACY_AND_HEADER, PKRU_NUMBER
from pykvm.x86.cpuid import CpuidEntry

PHYSICAL_BITS: Final = 46
LINEAR_BITS: Final = 57
_SUBLEAVES: Final = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
_VENDOR: Final = b"GenuineIntel"
_SIGNATURE: Final = 0x606A6  # family 6, model 6Ah, stepping 6: has what is offered below
_BRAND: Final = b"pykvm reference processor"
_PKRU_OFFSET: Final = 2688
_PKRU_BYTES: Final = 8
_CLFLUSH_LINE: Final = 8 << 8  # in units of 8 bytes
_ONE_PROCESSOR: Final = 1 << 16

_LEAF1_EDX: Final = {
    "FPU": 0, "DE": 2, "PSE": 3, "TSC": 4, "MSR": 5, "PAE": 6, "MCE": 7, "CX8": 8, "APIC": 9, "SEP": 11,
    "MTRR": 12, "PGE": 13, "MCA": 14, "CMOV": 15, "PAT": 16, "PSE36": 17, "CLFSH": 19, "MMX": 23,
    "FXSR": 24, "SSE": 25, "SSE2": 26,
}  # fmt: skip
_LEAF1_ECX: Final = {
    "SSE3": 0, "PCLMULQDQ": 1, "SSSE3": 9, "CX16": 13, "PCID": 17, "SSE4.1": 19, "SSE4.2": 20, "MOVBE": 22,
    "POPCNT": 23, "XSAVE": 26,
}  # fmt: skip
_LEAF7_EBX: Final = {
    "FSGSBASE": 0, "TSC_ADJUST": 1, "BMI1": 3, "SMEP": 7, "BMI2": 8, "ERMS": 9, "INVPCID": 10,
    "FCS and FDS are zero": 13, "ADX": 19, "SMAP": 20,
}  # fmt: skip
_LEAF7_ECX: Final = {"UMIP": 2, "PKU": 3, "LA57": 16, "RDPID": 22, "PKS": 31}
_LEAFD1_EAX: Final = {"XSAVEOPT": 0, "XSAVEC": 1, "XGETBV1": 2, "XSAVES": 3}
_EXTENDED1_ECX: Final = {"LAHF": 0, "LZCNT": 5, "PREFETCHW": 8}
_EXTENDED1_EDX: Final = {"SYSCALL": 11, "NX": 20, "1G pages": 26, "RDTSCP": 27, "LM": 29}


def _bits(names: dict[str, int]) -> int:
    return sum(1 << bit for bit in names.values())


def _words(text: bytes) -> list[int]:
    return [int.from_bytes(text[at : at + 4], "little") for at in range(0, len(text), 4)]


def supported_cpuid() -> tuple[CpuidEntry, ...]:
    """The leaves for one processor with APIC id 0, as KVM_GET_SUPPORTED_CPUID gives a host's."""
    vendor = _words(_VENDOR)
    brand = _words(_BRAND.ljust(48, b"\0"))
    return (
        CpuidEntry(0, 0, 0, 0xD, vendor[0], vendor[2], vendor[1]),
        CpuidEntry(1, 0, 0, _SIGNATURE, _CLFLUSH_LINE | _ONE_PROCESSOR, _bits(_LEAF1_ECX), _bits(_LEAF1_EDX)),
        CpuidEntry(2, 0, 0, 1, 0, 0, 0),
        CpuidEntry(7, 0, _SUBLEAVES, 0, _bits(_LEAF7_EBX), _bits(_LEAF7_ECX), 0),
        CpuidEntry(0xB, 0, _SUBLEAVES, 0, 1, 0x100, 0),
        CpuidEntry(0xB, 1, _SUBLEAVES, 0, 1, 0x201, 0),
        CpuidEntry(0xD, 0, _SUBLEAVES, IMPLEMENTED, LEGACY_AND_HEADER, _PKRU_OFFSET + _PKRU_BYTES, 0),
        CpuidEntry(0xD, 1, _SUBLEAVES, _bits(_LEAFD1_EAX), LEGACY_AND_HEADER, 0, 0),
        CpuidEntry(0xD, PKRU_NUMBER, _SUBLEAVES, _PKRU_BYTES, _PKRU_OFFSET, 0, 0),
        CpuidEntry(0x80000000, 0, 0, 0x80000008, 0, 0, 0),
        CpuidEntry(0x80000001, 0, 0, 0, 0, _bits(_EXTENDED1_ECX), _bits(_EXTENDED1_EDX)),
        *(CpuidEntry(0x80000002 + n, 0, 0, *brand[4 * n : 4 * n + 4]) for n in range(3)),
        CpuidEntry(0x80000008, 0, 0, PHYSICAL_BITS | LINEAR_BITS << 8, 0, 0, 0),
    )
