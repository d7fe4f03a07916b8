"""The mode tests: one tiny guest per CPU mode, to see whether a host can run it."""

from __future__ import annotations

from typing import Final

from pykvm.errors import CapabilityError, GuestError, PykvmError
from pykvm.guest import catalog
from pykvm.guest.boot import BootMode
from pykvm.guest.devices import DeviceBus
from pykvm.guest.images import load_image
from pykvm.guest.launch import BootExtras, LaunchedGuest, launch
from pykvm.guest.pc_devices import DebugExit
from pykvm.guest.protocol import LOAD_ADDRESS, Kind
from pykvm.machine import System
from pykvm.x86.cpuid import has_la57

MODES: Final = {
    "real": BootMode.REAL,
    "protected16": BootMode.PROTECTED16,
    "protected32": BootMode.PROTECTED32,
    "paged32": BootMode.PAGED32,
    "pae": BootMode.PAE,
    "long": BootMode.LONG,
    "la57": BootMode.LA57,
}
"""The names of the mode tests in the catalogue, and their modes."""

PATTERN: Final = 0xC0FFEE01
STORES: Final = 8
STEP: Final = 0x1004
_PHYSICAL: Final = 0x120000
_LINEAR: Final = {
    Kind.PAGED32: 0xC0000000,
    Kind.PAE: 0xC0000000,
    Kind.LONG: 0x700000000000,
    Kind.LA57: 0xF0000000000000,
}
_MAPPED: Final = 0x10000


def stores_at(name: str) -> int:
    """The gpa of a mode test's first store; STORES values follow, STEP bytes apart (guests/modes.inc)."""
    return 0x20000 if name == "real" else _PHYSICAL


def launch_mode_test(system: System, name: str, *, cpl: int = 0) -> LaunchedGuest:
    """The mode test ``name`` (a key of MODES), ready to run; it finishes with status 1, or 3 if its stores
    did not read back.  Raises CapabilityError where the host's CPUID lacks the mode, UsageError, KvmError."""
    guest = catalog.load(name)
    if MODES[name] is BootMode.LA57:
        with system.create_machine() as machine:
            if not has_la57(machine.supported_cpuid):
                raise CapabilityError("This host has no 5-level paging (CPUID leaf 7, ECX bit 16).")
    linear = _LINEAR.get(guest.header.kind)
    extras = BootExtras(mappings=[(linear, _PHYSICAL, _MAPPED)] if linear else ())
    image = load_image(guest.image, "flat", address=LOAD_ADDRESS, entry=guest.header.entry, mode=MODES[name])
    bus = DeviceBus()
    bus.attach_ports(DebugExit(), DebugExit.PORT)
    return launch(system, image, bus, memory=4 << 20, cpl=cpl, extras=extras)


def why_mode_fails(system: System, name: str, *, cpl: int = 0, timeout: float = 10.0) -> str | None:
    """None where the host runs the mode test of that name, else a sentence that says what happened."""
    try:
        with launch_mode_test(system, name, cpl=cpl) as guest:
            guest.runner.start()
            status = guest.runner.wait(timeout)
            if status is None:
                return f"The guest did not finish within {timeout:g} s."
            return None if status == 1 else "The guest read back something else than it had stored."
    except (GuestError, PykvmError) as error:
        return str(error)
