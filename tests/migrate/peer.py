"""One side of a migration as a process of its own, to be killed: ``python -m tests.migrate.peer SIDE FD``."""

from __future__ import annotations

import json
import socket
import sys
import time

from pykvm.errors import PykvmError
from pykvm.guest.workloads import WorkloadConfig, WorkloadGuest
from pykvm.kvm import KvmSystem
from pykvm.migrate import Channel, Policy, receive, send
from pykvm.track import make_tracker
from tests.patience import patient

CONFIG = WorkloadConfig(memory=16 << 20)
POLICY = Policy(bandwidth=100 << 20, downtime_limit=0.05, max_rounds=2)
"""Slow enough that a kill at a random moment meets every phase."""
CHECK_SECONDS = 0.1


def main() -> int:
    side, descriptor = sys.argv[1:]
    channel = Channel(socket.socket(fileno=int(descriptor)), timeout=patient(30))
    try:
        with KvmSystem() as system:
            if side == "destination":
                with receive(system, channel, check_seconds=CHECK_SECONDS) as received:
                    print(json.dumps(received.result.to_json()))
                return 0
            tracker = make_tracker("bitmap")
            with WorkloadGuest.create(system, CONFIG, prepare=tracker.prepare) as guest:
                guest.runner.start()
                time.sleep(0.05)
                print(json.dumps(send(guest, tracker, channel, POLICY).to_json()))
            return 0
    except PykvmError as error:
        print(error, file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
