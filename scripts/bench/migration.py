"""Live migration between two processes against C that copies the same memory through the same socket.

The guest runs meanwhile, in both cases.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from measure import Effort, Row, quartiles, ratio_row
from yardstick import YardstickError, checked, ffi

from pykvm.guest.workloads import WorkloadConfig, WorkloadGuest
from pykvm.kvm import KvmSystem
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.migrate import Channel, MigrationResult, send
from pykvm.migrate.channel import SOCKET_BUFFER
from pykvm.track import make_tracker

PEER = Path(__file__).with_name("migration_peer.py")
TIMEOUT = 60.0
MIB = 1 << 20
SIZE = 1 << 30
QUICK_SIZE = 256 << 20
TOUCHED = 256 * PAGE_SIZE
"""What the guest goes on writing to while it moves."""


@contextmanager
def receiver(kind: str, size: int) -> Iterator[socket.socket]:
    """A unix socket to a process that receives; it must end well."""
    near, far = socket.socketpair()
    for end in (near, far):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)  # what the migration would set
    command = [sys.executable, str(PEER), kind, str(far.fileno()), str(size)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with (
        near,
        subprocess.Popen(
            command, pass_fds=[far.fileno()], stdout=subprocess.PIPE, env=environment
        ) as process,
    ):
        far.close()
        try:
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise YardstickError(f"The receiving process ({kind}) did not start; its message is above.")
            yield near
            if process.wait(TIMEOUT):
                raise YardstickError(f"The receiving process ({kind}) failed; its message is above.")
        finally:
            process.kill()


@contextmanager
def running_guest(system: KvmSystem, config: WorkloadConfig) -> Iterator[tuple[WorkloadGuest, Any]]:
    """A guest that has written to all its pages once and goes on, and its tracker."""
    tracker = make_tracker("bitmap")
    with WorkloadGuest.create(system, config, prepare=tracker.prepare) as guest:
        guest.runner.start()
        deadline = time.monotonic() + TIMEOUT
        while not guest.report().passes:
            if time.monotonic() > deadline:
                raise YardstickError("The guest to migrate did not get through its first pass.")
            time.sleep(0.01)
        yield guest, tracker


def fill_holes(memory: GuestMemory) -> None:
    """Random contents for all pages that the guest has not touched, so that every page must travel."""
    block = np.random.default_rng(1).bytes(1 << 20)
    end = 0
    for start, length in [*memory.extents(), (memory.size, 0)]:
        for at in range(end, start, len(block)):
            memory.write(at, memoryview(block)[: min(len(block), start - at)])
        end = start + length


def migrate(guest: WorkloadGuest, tracker: Any, size: int) -> MigrationResult:
    with receiver("pykvm", size) as near:
        return send(guest, tracker, Channel(near, timeout=TIMEOUT))


def copy_in_c(memory: GuestMemory, yardstick: Any) -> float:
    """Nanoseconds per MiB to write all of the memory to a process that reads it."""
    with receiver("plain", memory.size) as near:
        view = ffi.from_buffer("char[]", memory.view())
        return checked(yardstick.yardstick_send(near.fileno(), view, memory.size)) * MIB / memory.size


def measure(yardstick: Any, effort: Effort) -> Iterator[Row]:
    size = QUICK_SIZE if effort.quick else SIZE
    config = WorkloadConfig("hotspot", memory=size, touch=TOUCHED)
    results: list[MigrationResult] = []
    pairs: list[tuple[float, float]] = []
    with KvmSystem() as system:
        for _ in range(effort.rounds(7, 3)):
            with running_guest(system, config) as (guest, tracker):
                fill_holes(guest.memory)
                # C goes first: a guest moves only once, and both are to share the CPUs with a running one.
                theirs = copy_in_c(guest.memory, yardstick)
                result = migrate(guest, tracker, size)
            results.append(result)
            sent = sum(item.pages for item in result.rounds) * PAGE_SIZE
            pairs.append((1e9 * sum(item.seconds for item in result.rounds) * MIB / sent, theirs))
    low, middle, high = quartiles([theirs / mine for mine, theirs in pairs])
    row = ratio_row("migration", f"migrate {size >> 20} MiB, unix socket", pairs, per="MiB")
    yield Row(
        item=row.item,
        name=row.name,
        value=middle,
        low=low,
        high=high,
        ours=row.ours,
        yardstick=row.yardstick,
        rounds=row.rounds,
        per=row.per,
        unit="of its rate",
        target=0.7,
        better="higher",
        details={
            "throughput_bytes_per_second": [result.throughput_bytes_per_second for result in results],
            "total_seconds": [result.total_seconds for result in results],
            "downtime_seconds": [result.downtime_seconds for result in results],
            "digest_seconds": [result.digest_seconds for result in results],
        },
    )


__all__ = ["measure"]
