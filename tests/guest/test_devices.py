"""The bus, and the PC's devices as their drivers see them."""

from __future__ import annotations

import pytest

from pykvm.errors import UsageError
from pykvm.guest.devices import Device, DeviceBus, GuestFinished
from pykvm.guest.pc_devices import (
    COM_PORTS,
    KEPT_CODES,
    KEPT_OUTPUT,
    Cmos,
    DebugExit,
    DebugText,
    KeyboardController,
    PostCode,
    Serial16550,
)
from pykvm.machine import Halted, IoIn, IoOut, MmioRead, MmioWrite


class Recorder(Device):
    """A user's own device."""

    def __init__(self, value: int = 0x1122334455667788) -> None:
        self.value = value
        self.seen: list[tuple[object, ...]] = []

    def port_out(self, vcpu, port, size, value):
        self.seen.append((port, size, value))

    def port_in(self, vcpu, port, size):
        self.seen.append((port, size))
        return self.value

    def mmio_write(self, vcpu, gpa, data):
        self.seen.append((gpa, data))

    def mmio_read(self, vcpu, gpa, size):
        self.seen.append((gpa, size))
        return self.value.to_bytes(8, "little")[:size]


@pytest.fixture
def vcpu(fake_vcpu):
    return fake_vcpu()


def read(bus, vcpu, port, size=1):
    assert bus.handle(vcpu, IoIn(port, size))
    return int.from_bytes(vcpu.replies.pop(), "little")


def write(bus, vcpu, port, value, size=1):
    assert bus.handle(vcpu, IoOut(port, size, value.to_bytes(size, "little")))


def test_port_accesses_reach_their_device(vcpu):
    bus, device = DeviceBus(), Recorder()
    bus.attach_ports(device, 0x100, 4)
    write(bus, vcpu, 0x103, 0xAB)
    write(bus, vcpu, 0x100, 0xDEADBEEF, size=4)
    assert read(bus, vcpu, 0x101, size=2) == 0x7788
    assert device.seen == [(0x103, 1, 0xAB), (0x100, 4, 0xDEADBEEF), (0x101, 2)]
    assert bus.ports == frozenset(range(0x100, 0x104))


def test_string_accesses_come_item_by_item(vcpu):
    bus, device = DeviceBus(), Recorder(value=0x55AA)
    bus.attach_ports(device, 0x100)
    bus.handle(vcpu, IoOut(0x100, 2, b"\x01\x00\x02\x00\x03\x00", 3))
    bus.handle(vcpu, IoIn(0x100, 2, 2))
    assert device.seen == [(0x100, 2, 1), (0x100, 2, 2), (0x100, 2, 3), (0x100, 2), (0x100, 2)]
    assert vcpu.replies == [b"\xaa\x55\xaa\x55"]


def test_wide_access_that_only_ends_in_a_device_is_split(vcpu):
    bus, device = DeviceBus(), Recorder(value=0x99)
    bus.attach_ports(device, 0x101)
    write(bus, vcpu, 0x100, 0xBBAA, size=2)
    assert device.seen == [(0x101, 1, 0xBB)]
    assert read(bus, vcpu, 0x100, size=2) == 0x99FF


@pytest.mark.parametrize("size", [1, 2, 4])
def test_unknown_ports_read_as_all_ones_and_are_counted_when_traced(vcpu, size):
    for trace in (False, True):
        bus = DeviceBus(trace=trace)
        assert read(bus, vcpu, 0x1234, size) == (1 << size * 8) - 1
        write(bus, vcpu, 0x1234, 0, size)
        assert bus.unknown_ports == ({0x1234: 2} if trace else {})
        assert len(bus.ports) == (65536 if trace else 0)


def test_memory_accesses(vcpu):
    bus, device = DeviceBus(trace=True), Recorder()
    bus.attach_mmio(device, 0xFEC00FF0, 0x20)  # over a page border
    bus.handle(vcpu, MmioWrite(0xFEC00FF0, b"\x01\x02"))
    bus.handle(vcpu, MmioRead(0xFEC0100F, 1))
    bus.handle(vcpu, MmioRead(0xFEC01010, 4))
    bus.handle(vcpu, MmioWrite(0xFEC00FEF, b"\x01"))
    assert device.seen == [(0xFEC00FF0, b"\x01\x02"), (0xFEC0100F, 1)]
    assert vcpu.replies == [b"\x88", b"\xff\xff\xff\xff"]
    assert bus.unknown == {"read 0xfec01010": 1, "write 0xfec00fef": 1}


def test_other_exits_are_not_the_bus_s_business(vcpu):
    assert not DeviceBus().handle(vcpu, Halted())


@pytest.mark.parametrize(
    ("first", "count"), [(0x100, 1), (0xFF, 2), (0x103, 9), (-1, 1), (0xFFFF, 2), (5, 0)]
)
def test_ports_that_are_taken_or_do_not_exist(first, count):
    bus = DeviceBus()
    bus.attach_ports(Recorder(), 0x100, 4)
    with pytest.raises(UsageError):
        bus.attach_ports(Recorder(), first, count)
    assert len(bus.ports) == 4


@pytest.mark.parametrize(
    ("gpa", "size"), [(0x1000, 1), (0xFFF, 2), (0x2FFF, 0x10), (0, 0x10000), (-1, 1), (0, 0)]
)
def test_addresses_that_are_taken(gpa, size):
    bus = DeviceBus()
    bus.attach_mmio(Recorder(), 0x1000, 0x2000)
    with pytest.raises(UsageError):
        bus.attach_mmio(Recorder(), gpa, size)


def test_a_device_that_answers_with_the_wrong_length_is_told_off(vcpu):
    class Wrong(Device):
        def mmio_read(self, vcpu, gpa, size):
            return b"\0"

    bus = DeviceBus()
    bus.attach_mmio(Wrong(), 0x1000, 0x1000)
    with pytest.raises(UsageError, match="Wrong"):
        bus.handle(vcpu, MmioRead(0x1000, 4))


@pytest.mark.parametrize(("value", "status"), [(0, 1), (1, 3), (0x10, 0x21), (0x7F, 0xFF)])
def test_debug_exit_status(vcpu, value, status):
    bus = DeviceBus()
    bus.attach_ports(DebugExit(), 0xF4)
    with pytest.raises(GuestFinished) as end:
        write(bus, vcpu, 0xF4, value)
    assert end.value.status == status


def test_debug_text(vcpu):
    parts: list[bytes] = []
    device, bus = DebugText(parts.append), DeviceBus()
    bus.attach_ports(device, 0xE9)
    assert read(bus, vcpu, 0xE9) == 0xE9
    bus.handle(vcpu, IoOut(0xE9, 1, b"hello", 5))
    assert device.output == b"".join(parts) == b"hello"


def test_post_codes(vcpu):
    device, bus = PostCode(), DeviceBus()
    bus.attach_ports(device, 0x84)
    assert read(bus, vcpu, 0x84) == 0
    for code in (1, 2, 0xFF):
        write(bus, vcpu, 0x84, code)
    assert device.codes == [1, 2, 0xFF]
    assert read(bus, vcpu, 0x84) == 0xFF


class Uart:
    """What a driver does with a 16550, by register number."""

    def __init__(self, vcpu, com=1):
        self.bus, self.vcpu, self.base = DeviceBus(), vcpu, COM_PORTS[com]
        self.device = Serial16550(self.base)
        self.bus.attach_ports(self.device, self.base, 8)

    def get(self, register):
        return read(self.bus, self.vcpu, self.base + register)

    def put(self, register, value):
        write(self.bus, self.vcpu, self.base + register, value)


@pytest.fixture(params=[1, 2, 3, 4])
def uart(request, vcpu):
    return Uart(vcpu, request.param)


def test_serial_prints_when_the_line_status_says_ready(uart):
    for character in b"printk\n":
        assert uart.get(5) & 0x60 == 0x60  # transmitter and holding register empty
        uart.put(0, character)
    assert uart.device.output == b"printk\n"


def test_serial_divisor_latch_hides_data_and_interrupt_registers(uart):
    uart.put(1, 0x05)
    uart.put(3, 0x83)
    uart.put(0, 0x01)
    uart.put(1, 0x02)
    assert (uart.get(0), uart.get(1), uart.get(3)) == (0x01, 0x02, 0x83)
    uart.put(3, 0x03)
    assert uart.get(1) == 0x05
    assert uart.device.output == b""


def test_serial_interrupt_identification_tells_the_fifo(uart):
    assert uart.get(2) == 0x01  # no interrupt pending
    uart.put(2, 0x07)
    assert uart.get(2) == 0xC1  # FIFOs on: a 16550A


def test_serial_receives_what_is_fed(uart):
    assert uart.get(5) & 1 == 0
    uart.device.feed(b"ok")
    received = []
    while uart.get(5) & 1:
        received.append(uart.get(0))
    assert bytes(received) == b"ok"
    assert uart.get(0) == 0


def test_serial_loop_back_finds_the_chip(uart):
    uart.put(4, 0x1E)  # loop, OUT2, OUT1, RTS: the probe of autodetecting drivers
    assert uart.get(6) & 0xF0 == 0xD0
    uart.put(0, 0x5A)
    assert uart.get(0) == 0x5A
    assert uart.device.output == b""
    uart.put(4, 0)
    assert uart.get(6) & 0xB0 == 0xB0


def test_serial_scratch_and_read_only_registers(uart):
    uart.put(7, 0xA5)
    uart.put(5, 0)
    uart.put(6, 0)
    assert uart.get(7) == 0xA5
    assert uart.get(5) & 0x60 == 0x60


@pytest.fixture
def cmos(vcpu):
    # 2026-02-03 04:05:06 UTC, a Tuesday.
    device, bus = Cmos(memory=64 << 20, now=lambda: 1770091506.0), DeviceBus()
    bus.attach_ports(device, 0x70, 2)

    def get(register):
        write(bus, vcpu, 0x70, register)
        return read(bus, vcpu, 0x71)

    def put(register, value):
        write(bus, vcpu, 0x70, register)
        write(bus, vcpu, 0x71, value)

    return get, put


def test_cmos_clock_in_bcd_and_binary(cmos):
    get, put = cmos
    registers = [0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32]
    assert [get(register) for register in registers] == [0x06, 0x05, 0x04, 0x03, 0x03, 0x02, 0x26, 0x20]
    assert get(0x80) == 0x06  # bit 7 masks the NMI
    put(0x0B, 0x06)
    assert [get(register) for register in registers] == [6, 5, 4, 3, 3, 2, 26, 20]


def test_cmos_status_memory_sizes_and_storage(cmos):
    get, put = cmos
    assert get(0x0A) & 0x80 == 0  # no update in progress
    assert get(0x0D) & 0x80 == 0x80  # battery good
    assert get(0x15) | get(0x16) << 8 == 640
    assert get(0x17) | get(0x18) << 8 == 63 * 1024
    assert get(0x34) | get(0x35) << 8 == 48 * 16
    put(0x40, 0x99)
    assert get(0x40) == 0x99


def test_a_guest_that_prints_for_ever_does_not_fill_the_host(vcpu):
    seen = bytearray()
    text, post = DebugText(seen.extend), PostCode()
    chunk = bytes(range(256))
    for _ in range(3 * KEPT_OUTPUT // 256):
        text.emit(chunk)
    assert KEPT_OUTPUT <= len(text.output) <= 2 * KEPT_OUTPUT
    assert text.output.endswith(chunk)
    assert len(seen) == 3 * KEPT_OUTPUT
    for code in range(3 * KEPT_CODES):
        post.port_out(vcpu, 0x80, 1, code)
    assert KEPT_CODES <= len(post.codes) <= 2 * KEPT_CODES
    assert post.codes[-1] == 3 * KEPT_CODES - 1


# --- keyboard controller --------------------------------------------------------------------------------


def keyboard():
    device, bus = KeyboardController(), DeviceBus()
    bus.attach_ports(device, device.DATA)
    bus.attach_ports(device, device.COMMAND)
    return bus


def test_keyboard_controller_is_ready_and_silent(vcpu):
    """Drivers wait until bit 1 of the status is clear, and read data only while bit 0 is set."""
    bus = keyboard()
    assert read(bus, vcpu, 0x64) == 0
    assert read(bus, vcpu, 0x60) == 0


@pytest.mark.parametrize(("command", "answer"), [(0xAA, 0x55), (0xAB, 0), (0x20, 0), (0xD0, 3)])
def test_keyboard_controller_answers_once(vcpu, command, answer):
    bus = keyboard()
    write(bus, vcpu, 0x64, command)
    assert read(bus, vcpu, 0x64) == 1
    assert read(bus, vcpu, 0x60) == answer
    assert read(bus, vcpu, 0x64) == 0


def test_keyboard_controller_keeps_its_command_byte(vcpu):
    bus = keyboard()
    write(bus, vcpu, 0x60, 0x11)  # to the keyboard that is not there
    write(bus, vcpu, 0x64, 0x60)
    write(bus, vcpu, 0x60, 0x47)
    write(bus, vcpu, 0x60, 0x99)
    write(bus, vcpu, 0x64, 0x20)
    assert read(bus, vcpu, 0x60) == 0x47


def test_keyboard_controller_resets_the_processor(vcpu):
    bus = keyboard()
    with pytest.raises(GuestFinished) as end:
        write(bus, vcpu, 0x64, 0xFE)
    assert end.value.status == 0
    write(bus, vcpu, 0x64, 0xD1)
    write(bus, vcpu, 0x60, 0x03)
    write(bus, vcpu, 0x64, 0xD1)
    with pytest.raises(GuestFinished):
        write(bus, vcpu, 0x60, 0x02)
