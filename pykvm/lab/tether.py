"""Runs a program that dies with its parent, however the parent dies.

``python -m pykvm.lab.tether PARENT PROGRAM ARGUMENTS…`` asks the kernel for a SIGKILL when the parent ends
(prctl(2), PR_SET_PDEATHSIG) and becomes the program.  PARENT is the process that started it: if that is
gone already, the signal would never come.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Become the program; returns only if the parent is gone."""
    parent, program = int(arguments[0]), arguments[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() == parent:
        os.execvp(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1:])
