"""Exception vectors (SDM vol. 3, table 6-1)."""

from __future__ import annotations

from enum import IntEnum


class Vector(IntEnum):
    """Interrupt vectors 0 to 31 by mnemonic."""

    DE = 0
    DB = 1
    NMI = 2
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    MF = 16
    AC = 17
    MC = 18
    XM = 19
    VE = 20
    CP = 21

    @property
    def has_error_code(self) -> bool:
        """Whether delivery pushes an error code (SDM vol. 3, 6.13)."""
        return self in {
            Vector.DF,
            Vector.TS,
            Vector.NP,
            Vector.SS,
            Vector.GP,
            Vector.PF,
            Vector.AC,
            Vector.CP,
        }
