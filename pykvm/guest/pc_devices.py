"""The few devices of a PC that tiny guests and test kernels expect."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from pykvm.errors import UsageError
from pykvm.guest.devices import Device, GuestFinished
from pykvm.guest.protocol import DEBUG_EXIT_PORT, DEBUG_TEXT_PORT
from pykvm.machine import Vcpu

COM_PORTS: Final = {1: 0x3F8, 2: 0x2F8, 3: 0x3E8, 4: 0x2E8}

KEPT_OUTPUT: Final = 1 << 20
"""How many bytes of the last output a text device keeps at least; a guest may print for ever."""
KEPT_CODES: Final = 1 << 16
"""The same for POST codes."""

Sink = Callable[[bytes], None]


class TextSink(Device):
    """Collects what a guest prints, and passes it on as it comes to ``sink``."""

    def __init__(self, sink: Sink | None = None) -> None:
        self._sink = sink
        self._output = bytearray()

    @property
    def output(self) -> bytes:
        """What was printed: all of it, or the last mebibyte or more of a long output."""
        return bytes(self._output)

    def emit(self, data: bytes) -> None:
        self._output += data
        if len(self._output) > 2 * KEPT_OUTPUT:
            del self._output[:-KEPT_OUTPUT]
        if self._sink is not None:
            self._sink(data)


class DebugText(TextSink):
    """Port 0xe9: every byte written is a character; reads give 0xe9, which is how guests look for it."""

    def port_out(self, vcpu: Vcpu, port: int, size: int, value: int) -> None:
        self.emit(value.to_bytes(size, "little"))

    def port_in(self, vcpu: Vcpu, port: int, size: int) -> int:
        return DEBUG_TEXT_PORT


class Serial16550(TextSink):
    """A 16550 UART whose transmitter is always ready; eight ports (datasheet PC16550D, section 8).

    ``feed`` queues bytes for the guest to read.  Interrupts are not delivered: drivers must poll.
    """

    _IIR_NONE: Final = 0x01
    _IIR_FIFO: Final = 0xC0
    _LSR_DATA_READY: Final = 0x01
    _LSR_TRANSMITTER_EMPTY: Final = 0x60
    _LCR_DIVISOR_LATCH: Final = 0x80
    _MCR_LOOP: Final = 0x10
    _MSR_CONNECTED: Final = 0xB0

    def __init__(self, base: int = COM_PORTS[1], sink: Sink | None = None) -> None:
        super().__init__(sink)
        self.base = base
        self._input = bytearray()
        self._divisor = 0x0C  # 9600 baud
        self._registers = bytearray(8)

    def feed(self, data: bytes) -> None:
        """Let the guest receive these bytes."""
        self._input += data

    def port_out(self, vcpu: Vcpu, port: int, size: int, value: int) -> None:
        register, value = port - self.base, value & 0xFF
        latch = self._registers[3] & self._LCR_DIVISOR_LATCH
        if register == 0 and latch:
            self._divisor = self._divisor & 0xFF00 | value
        elif register == 1 and latch:
            self._divisor = self._divisor & 0x00FF | value << 8
        elif register == 0:
            if self._registers[4] & self._MCR_LOOP:
                self._input.append(value)
            else:
                self.emit(bytes([value]))
        elif register not in {5, 6}:  # LSR and MSR are read-only
            self._registers[register] = value  # register 2 is the FIFO control

    def port_in(self, vcpu: Vcpu, port: int, size: int) -> int:
        register = port - self.base
        latch = self._registers[3] & self._LCR_DIVISOR_LATCH
        if register == 0:
            return self._divisor & 0xFF if latch else self._receive()
        if register == 1 and latch:
            return self._divisor >> 8
        if register == 2:
            return self._IIR_NONE | (self._IIR_FIFO if self._registers[2] & 1 else 0)
        if register == 5:
            return self._LSR_TRANSMITTER_EMPTY | (self._LSR_DATA_READY if self._input else 0)
        if register == 6:
            return self._modem_status()
        return self._registers[register]

    def _receive(self) -> int:
        return self._input.pop(0) if self._input else 0

    def _modem_status(self) -> int:
        control = self._registers[4]
        if not control & self._MCR_LOOP:
            return self._MSR_CONNECTED
        # In loop mode the four outputs come back: RTS, DTR, OUT1, OUT2 as CTS, DSR, RI, DCD.
        return (control & 2) << 3 | (control & 1) << 5 | (control & 4) << 4 | (control & 8) << 4


class DebugExit(Device):
    """Port 0xf4 of test kernels: a write ends the run with status value * 2 + 1 (modulo 256)."""

    PORT: Final = DEBUG_EXIT_PORT

    def port_out(self, vcpu: Vcpu, port: int, size: int, value: int) -> None:
        raise GuestFinished((value * 2 + 1) & 0xFF)


class PostCode(Device):
    """Records the codes that firmware writes while it starts, on port 0x80 by default."""

    PORT: Final = 0x80

    def __init__(self, sink: Callable[[int], None] | None = None) -> None:
        self.codes: list[int] = []
        self._sink = sink

    def port_out(self, vcpu: Vcpu, port: int, size: int, value: int) -> None:
        self.codes.append(value)
        if len(self.codes) > 2 * KEPT_CODES:
            del self.codes[:-KEPT_CODES]
        if self._sink is not None:
            self._sink(value)

    def port_in(self, vcpu: Vcpu, port: int, size: int) -> int:
        return self.codes[-1] if self.codes else 0


class Cmos(Device):
    """CMOS memory and real-time clock: index on port 0x70, data on 0x71 (datasheet MC146818).

    The time is UTC in BCD, 24 hours; memory sizes are where a BIOS puts them.  ``now`` gives seconds since
    1970 (a test passes its own).  Bit 7 of the index masks the NMI and is ignored.
    """

    PORT: Final = 0x70

    def __init__(self, memory: int = 0, now: Callable[[], float] = time.time) -> None:
        if memory < 0:
            raise UsageError(f"A memory size of {memory} bytes is not possible.")
        self._now = now
        self._index = 0
        self._bytes = bytearray(128)
        above_1m = min(max(memory - (1 << 20), 0) >> 10, 0xFFFF)
        above_16m = min(max(memory - (16 << 20), 0) >> 16, 0xFFFF)
        self._put(0x15, min(memory >> 10, 640))
        for register in (0x17, 0x30):
            self._put(register, above_1m)
        self._put(0x34, above_16m)
        self._bytes[0x0A] = 0x26  # oscillator on, 1024 Hz
        self._bytes[0x0B] = 0x02  # 24 hours, BCD
        self._bytes[0x0D] = 0x80  # battery good

    def _put(self, register: int, value: int) -> None:
        self._bytes[register : register + 2] = value.to_bytes(2, "little")

    def port_out(self, vcpu: Vcpu, port: int, size: int, value: int) -> None:
        if port == self.PORT:
            self._index = value & 0x7F
        else:
            self._bytes[self._index] = value & 0xFF

    def port_in(self, vcpu: Vcpu, port: int, size: int) -> int:
        if port == self.PORT:
            return 0xFF
        clock = self._clock()
        return clock.get(self._index, self._bytes[self._index])

    def _clock(self) -> dict[int, int]:
        now = datetime.fromtimestamp(self._now(), UTC)
        fields = {
            0x00: now.second,
            0x02: now.minute,
            0x04: now.hour,
            0x06: now.isoweekday() % 7 + 1,
            0x07: now.day,
            0x08: now.month,
            0x09: now.year % 100,
            0x32: now.year // 100,
        }
        if self._bytes[0x0B] & 0x04:  # the guest asked for binary
            return fields
        return {register: value // 10 << 4 | value % 10 for register, value in fields.items()}


class KeyboardController(Device):
    """An 8042 with no keyboard: data on port 0x60, commands and status on 0x64 (IBM PC AT Technical
    Reference, keyboard controller).

    It answers its self-test and keeps its command byte; A20 is always on.  Resetting the processor, which is
    how kernels reboot, ends the run with status 0, as other resets do.
    """

    DATA: Final = 0x60
    COMMAND: Final = 0x64

    _OUTPUT_FULL: Final = 0x01
    _READ_COMMAND_BYTE, _WRITE_COMMAND_BYTE = 0x20, 0x60
    _READ_OUTPUT_PORT, _WRITE_OUTPUT_PORT = 0xD0, 0xD1
    _SELF_TEST, _INTERFACE_TEST, _RESET_PULSE = 0xAA, 0xAB, 0xFE
    _RESET_LINE: Final = 0x01  # of the output port: the processor is reset while it is low

    def __init__(self) -> None:
        self._answer: int | None = None
        self._wants_data: int | None = None
        self._command_byte = 0
        self._output_port = 0x03  # no reset, A20 on

    def port_in(self, vcpu: Vcpu, port: int, size: int) -> int:
        if port == self.COMMAND:
            return 0 if self._answer is None else self._OUTPUT_FULL
        answer, self._answer = self._answer, None
        return answer or 0

    def port_out(self, vcpu: Vcpu, port: int, size: int, value: int) -> None:
        value &= 0xFF
        if port == self.COMMAND:
            self._command(value)
        elif self._wants_data == self._WRITE_COMMAND_BYTE:
            self._command_byte = value
        elif self._wants_data == self._WRITE_OUTPUT_PORT:
            self._output_port = value
            if not value & self._RESET_LINE:
                raise GuestFinished(0)
        if port == self.DATA:
            self._wants_data = None

    def _command(self, command: int) -> None:
        answers = {
            self._SELF_TEST: 0x55,
            self._INTERFACE_TEST: 0x00,
            self._READ_COMMAND_BYTE: self._command_byte,
            self._READ_OUTPUT_PORT: self._output_port,
        }
        self._answer = answers.get(command, self._answer)
        takes_data = command in {self._WRITE_COMMAND_BYTE, self._WRITE_OUTPUT_PORT}
        self._wants_data = command if takes_data else None
        if command == self._RESET_PULSE:
            raise GuestFinished(0)
