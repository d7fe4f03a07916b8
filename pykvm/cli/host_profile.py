"""Naming the KVM host whose MMU the model follows: ``--profile KIND[@ERA]``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from pykvm.backends import open_system
from pykvm.cli.session import Session
from pykvm.errors import HostError, KvmError, UsageError
from pykvm.kvm import KvmSystem
from pykvm.machine import System
from pykvm.probe import detect, read_evidence
from pykvm.profiles import DEVELOPMENT_HOST, Profile, profile

HOST = "auto"
"""The profile of the host that the command runs on."""


def named_profile() -> Callable[[str], Profile]:
    """``KIND`` or ``KIND@ERA``."""

    def kind_era(text: str) -> Profile:
        kind, at, era = text.partition("@")
        try:
            return profile(kind, era) if at else profile(kind)
        except UsageError as error:
            raise click.BadParameter(str(error)) from None

    return kind_era


def _named_or_host() -> Callable[[str], Profile]:
    named = named_profile()

    def kind_era_or_auto(text: str) -> Profile:
        return host_profile() if text == HOST else named(text)

    return kind_era_or_auto


def host_profile() -> Profile:
    """The profile of this host where a real KVM works, or else the first one that was known."""
    try:
        with KvmSystem() as system:
            return detect(system, read_evidence(), system.check_extension).profile
    except (HostError, KvmError):
        return profile(*DEVELOPMENT_HOST)


def profile_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--profile, for commands that run a guest; ``open_machines`` takes it."""
    return click.option(
        "--profile",
        "host",
        type=_named_or_host(),
        metavar="KIND[@ERA]",
        help="Run on the model with KVM's MMU of such a host, as amd-npt or pvm-shadow@6.18; auto: this one.",
    )(command)


def open_machines(session: Session, host: Profile | None) -> System:
    """The system for ``--backend`` and ``--profile``; a profile means the model.  Raises UsageError where
    real KVM was asked for, too."""
    if host is None:
        return open_system(session.backend)
    if session.backend == "kvm":
        raise UsageError("A real KVM has the profile of its host: leave out --profile or --backend kvm.")
    return open_system("model", profile=host)
