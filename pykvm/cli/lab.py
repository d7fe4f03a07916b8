"""``pykvm lab``: the group of commands on labs."""

from __future__ import annotations

import signal
from functools import partial
from types import FrameType
from typing import NoReturn

import click

from pykvm.cli.lazy import LazyGroup


@click.command(
    name="lab",
    cls=LazyGroup,
    modules={
        "list": "lab_list",
        "prepare": "lab_prepare",
        "run": "lab_run",
        "test": "lab_test",
        "matrix": "lab_matrix",
        "clean": "lab_clean",
    },
)
def command() -> None:
    """Run anything on real KVM hosts of many kinds, emulated on this machine.

    A lab is a Debian kernel with its own KVM under an emulator: AMD's under QEMU, Intel's under Bochs. It
    needs neither root nor virtualization, and everything it fetches stays in one folder (PYKVM_LAB_CACHE).
    See docs/labs.md.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup's choice stays
            signal.signal(number, _leave)
            click.get_current_context().call_on_close(partial(signal.signal, number, signal.SIG_DFL))


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Clean up as at Ctrl-C; the status is the one that a shell gives to a process ended by the signal."""
    raise SystemExit(128 + number)
