"""Runs a program that dies with its parent, however the parent dies.

``tethered`` gives the command for it: this file, started by itself, asks the kernel for a SIGKILL when the
parent ends (prctl(2), PR_SET_PDEATHSIG) and becomes the program.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def tethered(command: Sequence[str]) -> tuple[str, ...]:
    """How this process starts ``command`` tethered to itself.

    The interpreter is isolated: a ``signal.py`` in the folder that pykvm was started in is not ours.
    """
    return (sys.executable, "-IS", __file__, str(os.getpid()), *command)


def main(arguments: list[str]) -> None:
    """Become the program; returns only if the parent, whose number comes first, is gone.

    Then its end would never be told.
    """
    parent, program = int(arguments[0]), arguments[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() == parent:
        os.execvp(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1:])
