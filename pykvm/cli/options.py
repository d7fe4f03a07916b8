"""Options that several commands share: which guest, and how its writes are tracked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from pykvm.cli.parameters import number_type, size_type
from pykvm.guest.workloads import WorkloadConfig
from pykvm.memory import PAGE_SIZE
from pykvm.track import TRACKERS, Tracker, make_tracker

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
            type=click.Choice(TRACKERS),
            default="bitmap",
            show_default=True,
            help="How to learn what the guest wrote.",
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
