"""What a processor can do, read from its CPUID leaves (SDM vol. 2, CPUID; APM vol. 3, appendix E)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

from pykvm.x86.cpuid import CpuidEntry, find, physical_address_bits

_AMD = (0x68747541, 0x69746E65, 0x444D4163)  # EBX, EDX, ECX of leaf 0: "AuthenticAMD"
_HYGON = (0x6F677948, 0x656E6975, 0x6E65476E)

_BITS = {
    # name: (leaf, subleaf, register, bit)
    "pse": (1, 0, "edx", 3),
    "pae": (1, 0, "edx", 6),
    "cx8": (1, 0, "edx", 8),
    "sep": (1, 0, "edx", 11),
    "pge": (1, 0, "edx", 13),
    "pse36": (1, 0, "edx", 17),
    "mmx": (1, 0, "edx", 23),
    "fxsr": (1, 0, "edx", 24),
    "sse": (1, 0, "edx", 25),
    "sse2": (1, 0, "edx", 26),
    "sse3": (1, 0, "ecx", 0),
    "pclmulqdq": (1, 0, "ecx", 1),
    "monitor": (1, 0, "ecx", 3),
    "ssse3": (1, 0, "ecx", 9),
    "cx16": (1, 0, "ecx", 13),
    "pcid": (1, 0, "ecx", 17),
    "sse41": (1, 0, "ecx", 19),
    "sse42": (1, 0, "ecx", 20),
    "x2apic": (1, 0, "ecx", 21),
    "movbe": (1, 0, "ecx", 22),
    "popcnt": (1, 0, "ecx", 23),
    "xsave": (1, 0, "ecx", 26),
    "rdrand": (1, 0, "ecx", 30),
    "fsgsbase": (7, 0, "ebx", 0),
    "tsc_adjust": (7, 0, "ebx", 1),
    "bmi1": (7, 0, "ebx", 3),
    "smep": (7, 0, "ebx", 7),
    "bmi2": (7, 0, "ebx", 8),
    "invpcid": (7, 0, "ebx", 10),
    "rdseed": (7, 0, "ebx", 18),
    "adx": (7, 0, "ebx", 19),
    "smap": (7, 0, "ebx", 20),
    "umip": (7, 0, "ecx", 2),
    "pku": (7, 0, "ecx", 3),
    "la57": (7, 0, "ecx", 16),
    "rdpid": (7, 0, "ecx", 22),
    "pks": (7, 0, "ecx", 31),
    "spec_ctrl": (7, 0, "edx", 26),
    "xsaveopt": (0xD, 1, "eax", 0),
    "xsavec": (0xD, 1, "eax", 1),
    "xgetbv1": (0xD, 1, "eax", 2),
    "xsaves": (0xD, 1, "eax", 3),
    "lahf_lm": (0x80000001, 0, "ecx", 0),
    "abm": (0x80000001, 0, "ecx", 5),
    "sse4a": (0x80000001, 0, "ecx", 6),
    "misalignsse": (0x80000001, 0, "ecx", 7),
    "syscall": (0x80000001, 0, "edx", 11),
    "nx": (0x80000001, 0, "edx", 20),
    "pages_1g": (0x80000001, 0, "edx", 26),
    "rdtscp": (0x80000001, 0, "edx", 27),
    "lm": (0x80000001, 0, "edx", 29),
    "amd_ibrs": (0x80000008, 0, "ebx", 14),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Each field is a CPUID bit by its usual name; ``amd`` the vendor whose deviations are followed."""

    amd: bool
    physical_bits: int
    pse: bool
    pae: bool
    cx8: bool
    sep: bool
    pge: bool
    pse36: bool
    mmx: bool
    fxsr: bool
    sse: bool
    sse2: bool
    sse3: bool
    pclmulqdq: bool
    monitor: bool
    ssse3: bool
    cx16: bool
    pcid: bool
    sse41: bool
    sse42: bool
    x2apic: bool
    movbe: bool
    popcnt: bool
    xsave: bool
    rdrand: bool
    fsgsbase: bool
    tsc_adjust: bool
    bmi1: bool
    smep: bool
    bmi2: bool
    invpcid: bool
    rdseed: bool
    adx: bool
    smap: bool
    umip: bool
    pku: bool
    la57: bool
    rdpid: bool
    pks: bool
    spec_ctrl: bool
    xsaveopt: bool
    xsavec: bool
    xgetbv1: bool
    xsaves: bool
    lahf_lm: bool
    abm: bool
    sse4a: bool
    misalignsse: bool
    syscall: bool
    nx: bool
    pages_1g: bool
    rdtscp: bool
    lm: bool
    amd_ibrs: bool

    @staticmethod
    def of(entries: Iterable[CpuidEntry]) -> Features:
        """From the leaves; what is absent is not there."""
        return _features_of(tuple(entries))

    @classmethod
    def _read(cls, leaves: tuple[CpuidEntry, ...]) -> Self:
        def has(leaf: int, index: int, register: str, bit: int) -> bool:
            entry = find(leaves, leaf, index)
            return bool(entry and getattr(entry, register) >> bit & 1)

        first = find(leaves, 0)
        vendor = (first.ebx, first.edx, first.ecx) if first else ()
        return cls(
            amd=vendor in (_AMD, _HYGON),
            physical_bits=physical_address_bits(leaves),
            **{name: has(*where) for name, where in _BITS.items()},
        )

    @property
    def tsc_aux(self) -> bool:
        """Whether IA32_TSC_AUX exists: RDTSCP or RDPID reads it."""
        return self.rdtscp or self.rdpid

    @property
    def speculation_control(self) -> bool:
        """Whether IA32_SPEC_CTRL and IA32_PRED_CMD exist."""
        return self.spec_ctrl or self.amd_ibrs


@lru_cache(maxsize=64)
def _features_of(leaves: tuple[CpuidEntry, ...]) -> Features:
    return Features._read(leaves)
