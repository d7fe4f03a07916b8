"""Live migration that proves itself: a running guest moves to another process over a socket."""

from pykvm.migrate.address import Address
from pykvm.migrate.channel import Channel, Listener, connect, listen, pair
from pykvm.migrate.destination import Acceptance, ReceivedGuest, receive
from pykvm.migrate.policy import Policy
from pykvm.migrate.result import (
    GuestChecks,
    MigrationResult,
    Phase,
    Progress,
    ReceiveResult,
    RoundResult,
)
from pykvm.migrate.sabotage import KINDS as SABOTAGES
from pykvm.migrate.source import send

__all__ = [
    "SABOTAGES",
    "Acceptance",
    "Address",
    "Channel",
    "GuestChecks",
    "Listener",
    "MigrationResult",
    "Phase",
    "Policy",
    "Progress",
    "ReceiveResult",
    "ReceivedGuest",
    "RoundResult",
    "connect",
    "listen",
    "pair",
    "receive",
    "send",
]
