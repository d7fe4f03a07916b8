"""Pausing never leaves an access half done: a saved state is complete and no part is lost or repeated."""

from __future__ import annotations

import time

from pykvm.guest.boot import BootMode
from pykvm.guest.devices import Device, DeviceBus
from pykvm.guest.images import load_image
from pykvm.guest.launch import launch
from pykvm.machine import System, Vcpu
from tests.patience import patient

MMIO = 0x40000000
# mov eax, cr4; or eax, 0x200 (OSFXSR); mov cr4, eax; again: movups [MMIO], xmm0; jmp again
CODE = bytes.fromhex("0f20e0 0d00020000 0f22e0 0f110500000040 ebf7")
PAUSES = 200


class Recorder(Device):
    """Notes the addresses written; a slow device, so that pauses often fall between two parts."""

    def __init__(self) -> None:
        self.addresses: list[int] = []

    def mmio_write(self, vcpu: Vcpu, gpa: int, data: bytes) -> None:
        self.addresses.append(gpa)
        time.sleep(50e-6)


def test_a_store_in_two_parts_survives_pauses_and_saved_states(system: System) -> None:
    """16 bytes to a device are two exits (docs/reference/hosts.md C.3)."""
    bus = DeviceBus()
    device = Recorder()
    bus.attach_mmio(device, MMIO, 16)
    image = load_image(CODE, "flat", address=0x8000, mode=BootMode.PROTECTED32)
    with launch(system, image, bus) as guest:
        guest.runner.start()
        for _ in range(PAUSES):
            seen, deadline = len(device.addresses), time.monotonic() + patient(10)
            while len(device.addresses) == seen and time.monotonic() < deadline:
                time.sleep(0.0005)
            guest.runner.pause()
            guest.machine.vcpus[0].save_state()
            guest.runner.resume()
        guest.runner.stop()
    assert len(device.addresses) >= PAUSES
    assert set(device.addresses[::2]) == {MMIO}
    assert set(device.addresses[1::2]) == {MMIO + 8}
