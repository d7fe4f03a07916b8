"""``pykvm lab``: the group of commands on labs."""

from __future__ import annotations

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
