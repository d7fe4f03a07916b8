"""Named bits of control registers, flags, page-table entries and page-fault error codes (SDM vol. 3)."""

from __future__ import annotations

from enum import IntFlag


class Cr0(IntFlag):
    """CR0 (SDM vol. 3, 2.5)."""

    PE = 1 << 0
    MP = 1 << 1
    EM = 1 << 2
    TS = 1 << 3
    ET = 1 << 4
    NE = 1 << 5
    WP = 1 << 16
    AM = 1 << 18
    NW = 1 << 29
    CD = 1 << 30
    PG = 1 << 31


class Cr4(IntFlag):
    """CR4 (SDM vol. 3, 2.5)."""

    VME = 1 << 0
    PVI = 1 << 1
    TSD = 1 << 2
    DE = 1 << 3
    PSE = 1 << 4
    PAE = 1 << 5
    MCE = 1 << 6
    PGE = 1 << 7
    PCE = 1 << 8
    OSFXSR = 1 << 9
    OSXMMEXCPT = 1 << 10
    UMIP = 1 << 11
    LA57 = 1 << 12
    VMXE = 1 << 13
    SMXE = 1 << 14
    FSGSBASE = 1 << 16
    PCIDE = 1 << 17
    OSXSAVE = 1 << 18
    SMEP = 1 << 20
    SMAP = 1 << 21
    PKE = 1 << 22
    CET = 1 << 23
    PKS = 1 << 24


class Efer(IntFlag):
    """IA32_EFER, MSR 0xC0000080 (SDM vol. 3, 2.2.1; SVME: APM vol. 2, 3.1.7)."""

    SCE = 1 << 0
    LME = 1 << 8
    LMA = 1 << 10
    NXE = 1 << 11
    SVME = 1 << 12


class Rflags(IntFlag):
    """RFLAGS (SDM vol. 1, 3.4.3); IOPL is the two-bit field 13:12."""

    CF = 1 << 0
    FIXED = 1 << 1
    PF = 1 << 2
    AF = 1 << 4
    ZF = 1 << 6
    SF = 1 << 7
    TF = 1 << 8
    IF = 1 << 9
    DF = 1 << 10
    OF = 1 << 11
    IOPL3 = 3 << 12
    NT = 1 << 14
    RF = 1 << 16
    VM = 1 << 17
    AC = 1 << 18
    VIF = 1 << 19
    VIP = 1 << 20
    ID = 1 << 21


class Pte(IntFlag):
    """Bits of paging-structure entries (SDM vol. 3, 4.5.4, tables 4-15 to 4-20)."""

    P = 1 << 0
    RW = 1 << 1
    US = 1 << 2
    PWT = 1 << 3
    PCD = 1 << 4
    A = 1 << 5
    D = 1 << 6
    PS = 1 << 7
    G = 1 << 8
    NX = 1 << 63


class PageFault(IntFlag):
    """Page-fault error code (SDM vol. 3, 4.7)."""

    P = 1 << 0
    WR = 1 << 1
    US = 1 << 2
    RSVD = 1 << 3
    ID = 1 << 4
    PK = 1 << 5
    SS = 1 << 6


PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
