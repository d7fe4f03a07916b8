"""The receiving process of the migration items: ``migration_peer.py plain|pykvm FD BYTES``.

Says "ready" on standard output once it is up, so that its start does not count.
"""

from __future__ import annotations

import socket
import sys

from yardstick import checked, ffi, load

from pykvm.kvm import KvmSystem
from pykvm.memory import GuestMemory
from pykvm.migrate import Acceptance, Channel, receive

TIMEOUT = 60.0


def ready() -> None:
    print("ready", flush=True)


def plain(fd: int, size: int) -> None:
    """Read the whole memory in C."""
    library = load()
    with GuestMemory(size) as memory:
        ready()
        checked(library.yardstick_receive(fd, ffi.from_buffer("char[]", memory.view()), size))


def pykvm(fd: int, size: int) -> None:
    """Receive a live migration."""
    with KvmSystem() as system:
        channel = Channel(socket.socket(fileno=fd), timeout=TIMEOUT)
        ready()
        receive(system, channel, acceptance=Acceptance(max_memory=size), check_seconds=0.0).close()


if __name__ == "__main__":
    {"plain": plain, "pykvm": pykvm}[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]))
