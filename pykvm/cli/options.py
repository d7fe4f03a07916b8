"""Options that several commands share: which guest, how its writes are tracked, how it is migrated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pykvm.cli.parameters import duration_type, number_type, rate_type, size_type
from pykvm.guest.workloads import WorkloadConfig
from pykvm.memory import PAGE_SIZE
from pykvm.migrate import SABOTAGES
from pykvm.track import HOST_TRACKERS, TRACKERS, Tracker, make_tracker

Command = Callable[..., Any]
_LARGE_PAGE = 2 << 20


def guest_options(command: Command) -> Command:
    """--memory, --vcpus, --cpl, --touch and --seed; ``guest_config`` takes them."""
    for option in (
        click.option(
            "--seed",
            type=number_type(0, 2**63 - 1),
            default="1",
            show_default=True,
            help="Decides every address and value that the guest uses.",
        ),
        click.option(
            "--touch",
            type=size_type(),
            default="0",
            show_default=True,
            help="Memory to work on, spread over all of it; 0 means all.",
        ),
        click.option(
            "--cpl",
            type=click.Choice(["0", "3"]),
            default="3",
            show_default=True,
            help="Privilege level of the guest; hosts that emulate level 0 run it slowly.",
        ),
        click.option(
            "--vcpus",
            type=click.IntRange(1, 64),
            default=1,
            show_default=True,
            help="Number of vCPUs, each with a share of the memory.",
        ),
        click.option(
            "--memory",
            type=size_type(minimum=_LARGE_PAGE, multiple=_LARGE_PAGE),
            default="256M",
            show_default=True,
            help="Guest memory, a multiple of 2M up to 1T.",
        ),
    ):
        command = option(command)
    return command


def guest_config(workload: str, options: dict[str, Any]) -> WorkloadConfig:
    """The configuration that ``guest_options`` ask for; takes their keys out of ``options``."""
    return WorkloadConfig(
        workload=workload,
        memory=options.pop("memory"),
        vcpus=options.pop("vcpus"),
        cpl=int(options.pop("cpl")),
        seed=options.pop("seed"),
        touch=options.pop("touch"),
    )


def tracker_options(command: Command) -> Command:
    """--tracker, --ring-entries and --clear-chunk; ``tracker_of`` takes them."""
    for option in (
        click.option(
            "--clear-chunk",
            type=size_type(minimum=64 * PAGE_SIZE, multiple=64 * PAGE_SIZE),
            help="Tracker 'manual': memory that one KVM_CLEAR_DIRTY_LOG re-protects; default all.",
        ),
        click.option(
            "--ring-entries",
            type=number_type(1, 1 << 20),
            default="4096",
            show_default=True,
            help="Tracker 'ring': entries of each vCPU's ring, a power of two.",
        ),
        click.option(
            "--tracker",
            type=click.Choice((*TRACKERS, *HOST_TRACKERS)),
            default="bitmap",
            show_default=True,
            help="How to learn what the guest wrote; the last two see the host's devices, too.",
        ),
    ):
        command = option(command)
    return command


def tracker_of(options: dict[str, Any]) -> Tracker:
    """The tracker that ``tracker_options`` ask for; takes their keys out of ``options``."""
    chunk: int | None = options.pop("clear_chunk")
    return make_tracker(
        options.pop("tracker"),
        ring_entries=options.pop("ring_entries"),
        clear_chunk=chunk // PAGE_SIZE if chunk else None,
    )


def policy_options(command: Command) -> Command:
    """--bandwidth, --downtime-limit, --max-rounds, --warm-up, --attempts, --sabotage, --report."""
    for option in (
        click.option(
            "--report",
            "report_path",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Write a self-contained HTML page about the migration to this file.",
        ),
        click.option(
            "--sabotage",
            type=click.Choice(SABOTAGES),
            help="Drop a page on purpose; the proof must then fail and name it (status 10).",
        ),
        click.option(
            "--attempts",
            type=click.IntRange(1, 100),
            default=1,
            show_default=True,
            help="Try this often if a migration fails before the switch-over; the guest runs on in between.",
        ),
        click.option(
            "--warm-up",
            type=duration_type(),
            default="1s",
            show_default=True,
            help="Let the guest run for this long before the migration begins.",
        ),
        click.option(
            "--max-rounds",
            type=number_type(1, 100_000),
            default="30",
            show_default=True,
            help="Pause the guest after this many rounds, however much is left to send.",
        ),
        click.option(
            "--downtime-limit",
            type=duration_type(),
            default="300ms",
            show_default=True,
            help="Pause the guest once what is left is estimated to take no longer than this.",
        ),
        click.option(
            "--bandwidth",
            type=rate_type(),
            default="0",
            show_default=True,
            help="Most bytes per second on the wire, such as 100M; 0 means no limit.",
        ),
    ):
        command = option(command)
    return command
