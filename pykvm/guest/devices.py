"""The bus between a guest's port and memory accesses and the devices that answer them.

A device is a small class that overrides what it needs of ``Device`` and is attached to ports or addresses.
Nobody's ports and addresses read as all ones and swallow writes, as on a PC.
"""

from __future__ import annotations

import threading
from collections import Counter

from pykvm.errors import UsageError
from pykvm.machine import Exit, IoIn, IoOut, MmioRead, MmioWrite, Vcpu

_PORTS = 1 << 16


class GuestFinished(Exception):
    """Raised by a device from its access methods: the guest is done, with this exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Device:
    """What a device may do; each method's default is that of an empty bus.

    Methods are called on the thread of the vCPU that made the access, several at once when several vCPUs
    do.  ``size`` is 1, 2 or 4 for ports, 1 to 8 for memory; a string instruction comes as single accesses.
    """

    def port_out(self, vcpu: Vcpu, port: int, size: int, value: int) -> None:
        """The guest wrote ``value`` to ``port``."""

    def port_in(self, vcpu: Vcpu, port: int, size: int) -> int:
        """The value that the guest reads; excess bits are cut off."""
        return (1 << size * 8) - 1

    def mmio_write(self, vcpu: Vcpu, gpa: int, data: bytes) -> None:
        """The guest stored ``data`` at ``gpa``."""

    def mmio_read(self, vcpu: Vcpu, gpa: int, size: int) -> bytes:
        """The ``size`` bytes that the guest loads from ``gpa``."""
        return b"\xff" * size


class DeviceBus:
    """Dispatches exits to devices: one dictionary look-up for a port, one per page for an address.

    With ``trace`` the accesses that nobody answers are counted in ``unknown``, and ``ports`` is every port,
    so that ``Vcpu.listen(bus.ports)`` lets them through; without it the machine answers them by itself.
    """

    def __init__(self, *, trace: bool = False) -> None:
        self.trace = trace
        self.unknown: Counter[str] = Counter()
        self._ports: dict[int, Device] = {}
        self._pages: dict[int, list[tuple[int, int, Device]]] = {}
        self._lock = threading.Lock()

    @property
    def ports(self) -> frozenset[int]:
        """The ports whose accesses must reach ``handle``."""
        return frozenset(range(_PORTS)) if self.trace else frozenset(self._ports)

    @property
    def unknown_ports(self) -> dict[int, int]:
        """Port number to count of the port accesses that nobody answered (only with ``trace``)."""
        result: Counter[int] = Counter()
        for name, count in self.unknown.items():
            kind, _, where = name.partition(" ")
            if kind in {"in", "out"}:
                result[int(where, 16)] += count
        return dict(result)

    def attach_ports(self, device: Device, first: int, count: int = 1) -> None:
        """Let ``device`` answer ports [first, first+count).  Raises UsageError where one is taken."""
        if first < 0 or count < 1 or first + count > _PORTS:
            raise UsageError(
                f"Ports {first:#x} to {first + count - 1:#x} do not exist; ports are 0 to 0xffff."
            )
        taken = [port for port in range(first, first + count) if port in self._ports]
        if taken:
            raise UsageError(f"Port {taken[0]:#x} already belongs to {type(self._ports[taken[0]]).__name__}.")
        self._ports |= dict.fromkeys(range(first, first + count), device)

    def attach_mmio(self, device: Device, gpa: int, size: int) -> None:
        """Let ``device`` answer [gpa, gpa+size), which must have no memslot.  UsageError on overlap."""
        if gpa < 0 or size < 1:
            raise UsageError(f"[{gpa:#x}, {gpa + size:#x}) is not an address range.")
        pages = range(gpa >> 12, (gpa + size - 1 >> 12) + 1)
        for page in pages:
            for start, end, other in self._pages.get(page, ()):
                if start < gpa + size and gpa < end:
                    raise UsageError(f"[{gpa:#x}, {gpa + size:#x}) overlaps {type(other).__name__}.")
        for page in pages:
            self._pages.setdefault(page, []).append((gpa, gpa + size, device))

    def handle(self, vcpu: Vcpu, exit: Exit) -> bool:
        """Answer a port or memory access; False if ``exit`` is something else.

        What devices raise comes through: GuestFinished ends the run, anything else fails it.
        """
        if isinstance(exit, IoOut):
            port, size, data, repeat = exit
            device = self._ports.get(port)
            if device is not None and repeat == 1:  # by far the most frequent exit
                device.port_out(vcpu, port, size, int.from_bytes(data, "little"))
            else:
                self._out(vcpu, exit)
        elif isinstance(exit, IoIn):
            self._in(vcpu, exit)
        elif isinstance(exit, MmioWrite):
            self._write(vcpu, exit)
        elif isinstance(exit, MmioRead):
            self._read(vcpu, exit)
        else:
            return False
        return True

    # --- inside ----------------------------------------------------------------------------------

    def _out(self, vcpu: Vcpu, exit: IoOut) -> None:
        size = exit.size
        for at in range(0, size * exit.repeat, size):
            self._out_one(vcpu, exit.port, size, exit.data[at : at + size])

    def _out_one(self, vcpu: Vcpu, port: int, size: int, data: bytes) -> None:
        device = self._ports.get(port)
        if device is not None:
            device.port_out(vcpu, port, size, int.from_bytes(data, "little"))
        elif self._reaches_a_device(port, size):
            for number in range(size):
                self._out_one(vcpu, port + number, 1, data[number : number + 1])
        else:
            self._note(f"out {port:#x}")

    def _in(self, vcpu: Vcpu, exit: IoIn) -> None:
        vcpu.reply(b"".join(self._in_one(vcpu, exit.port, exit.size) for _ in range(exit.repeat)))

    def _in_one(self, vcpu: Vcpu, port: int, size: int) -> bytes:
        device = self._ports.get(port)
        if device is not None:
            value = device.port_in(vcpu, port, size) & (1 << size * 8) - 1
            return value.to_bytes(size, "little")
        if self._reaches_a_device(port, size):
            return b"".join(self._in_one(vcpu, port + number, 1) for number in range(size))
        self._note(f"in {port:#x}")
        return b"\xff" * size

    def _reaches_a_device(self, port: int, size: int) -> bool:
        """Whether a wide access to a free port covers a device's port; a bus splits it into bytes."""
        return size > 1 and any(port + number in self._ports for number in range(1, size))

    def _write(self, vcpu: Vcpu, exit: MmioWrite) -> None:
        device = self._at(exit.gpa)
        if device is None:
            self._note(f"write {exit.gpa:#x}")
        else:
            device.mmio_write(vcpu, exit.gpa, exit.data)

    def _read(self, vcpu: Vcpu, exit: MmioRead) -> None:
        device = self._at(exit.gpa)
        if device is None:
            self._note(f"read {exit.gpa:#x}")
            vcpu.reply(b"\xff" * exit.size)
            return
        data = device.mmio_read(vcpu, exit.gpa, exit.size)
        if len(data) != exit.size:
            raise UsageError(
                f"{type(device).__name__}.mmio_read returned {len(data)} bytes for a read of {exit.size}."
            )
        vcpu.reply(data)

    def _at(self, gpa: int) -> Device | None:
        for start, end, device in self._pages.get(gpa >> 12, ()):
            if start <= gpa < end:
                return device
        return None

    def _note(self, name: str) -> None:
        if self.trace:
            with self._lock:
                self.unknown[name] += 1
