"""Options that several ``pykvm lab`` commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from pykvm.lab.kinds import KINDS

Command = Callable[..., Any]

DEFAULT_KIND = "amd-npt"


def kind_option(command: Command) -> Command:
    """--kvm, one kind."""
    return click.option(
        "--kvm",
        "kind_name",
        type=click.Choice(list(KINDS)),
        default=DEFAULT_KIND,
        show_default=True,
        help="The kind of KVM.",
    )(command)


def accel_option(command: Command) -> Command:
    """--accel."""
    return click.option(
        "--accel",
        type=click.Choice(["auto", "emulate", "kvm"]),
        default="auto",
        show_default=True,
        help="Emulate the lab's processor, or run it on this machine's KVM (nested virtualization); "
        "'auto' takes KVM where it can carry the kind.",
    )(command)
