"""Guest pages as arrays of integers, by linear page number, for one kind of access context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from pykvm.model.cpu.access import Translations
    from pykvm.model.cpu.processor import Processor

_FORMATS: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}
_PAGES_KEPT: Final = 1 << 16
_OFFSET: Final = 0xFFF


class Leave(Exception):
    """The interpreter must execute this instruction; nothing of it has happened yet."""


def leave() -> None:
    """Raises Leave."""
    raise Leave


class ReadPages(dict[int, memoryview]):
    """Pages that may be read, as arrays of one element size.  Only what the processor has translated already
    comes in, so nothing here walks page tables."""

    def __init__(self, cpu: Processor, translations: Translations, size: int) -> None:
        self._bus = cpu.bus
        self._translated = translations.read
        self._format = _FORMATS[size]

    def __missing__(self, page: int) -> memoryview:
        frame = self._translated.get(page)
        ram = None if frame is None else self._bus.ram(frame >> 12)
        if ram is None:
            raise Leave
        if len(self) >= _PAGES_KEPT:
            self.clear()
        view: memoryview = ram.cast(self._format)  # type: ignore[call-overload]
        self[page] = view
        return view


class WritePages(dict[int, memoryview]):
    """Pages that may be written.  Asking for one marks it dirty: ask when nothing else can go wrong."""

    def __init__(self, cpu: Processor, translations: Translations, size: int) -> None:
        self._cpu = cpu
        self._bus = cpu.bus
        self._translated = translations.write
        self._format = _FORMATS[size]

    def __missing__(self, page: int) -> memoryview:
        frame = self._translated.get(page)
        ram = None if frame is None else self._bus.writable(frame >> 12)
        if ram is None or self._cpu.exits:
            # An exit, since the dirty ring is full, is due after the store: the interpreter makes it.
            raise Leave
        if len(self) >= _PAGES_KEPT:
            self.clear()
        view: memoryview = ram.cast(self._format)  # type: ignore[call-overload]
        self[page] = view
        return view


class Views:
    """All arrays of one access context."""

    def __init__(self, cpu: Processor, translations: Translations) -> None:
        self.read1, self.read2, self.read4, self.read8 = (
            ReadPages(cpu, translations, size) for size in (1, 2, 4, 8)
        )
        self.write1, self.write2, self.write4, self.write8 = (
            WritePages(cpu, translations, size) for size in (1, 2, 4, 8)
        )
        self._all: tuple[dict[int, memoryview], ...] = (
            self.read1, self.read2, self.read4, self.read8,
            self.write1, self.write2, self.write4, self.write8,
        )  # fmt: skip

        self._cpu = cpu
        self._translations = translations
        self.exit_due = False
        """An instruction of translated code was completed with an exit: it is the last one for now."""

    def host_page(self, page: int) -> int:
        """Where the bytes behind a linear page are in the host: the same for all slots that share them.

        Raises Leave.
        """
        address: int = np.frombuffer(self.read1[page], dtype=np.uint8).__array_interface__["data"][0]
        return address

    def allow_writes(self, page: int) -> bool:
        """Have the page in ``write1``, dirty; true where that makes an exit due.  Raises Leave."""
        if page in self.write1:
            return False
        frame = self._translations.write.get(page)
        ram = None if frame is None else self._cpu.bus.writable(frame >> 12)
        if ram is None:
            raise Leave
        self.write1[page] = ram
        self.exit_due = bool(self._cpu.exits)
        return self.exit_due

    def clear(self) -> None:
        """Ask the bus again before each access."""
        for pages in self._all:
            pages.clear()

    def drop(self, page: int) -> None:
        """Forget one linear page."""
        for pages in self._all:
            pages.pop(page, None)

    def load(self, address: int, size: int) -> int:
        """An unaligned load within one page."""
        offset = address & _OFFSET
        if offset + size > _OFFSET + 1:
            raise Leave
        return int.from_bytes(self.read1[address >> 12][offset : offset + size], "little")

    def store(self, address: int, size: int, value: int) -> None:
        """An unaligned store within one page."""
        offset = address & _OFFSET
        if offset + size > _OFFSET + 1:
            raise Leave
        self.write1[address >> 12][offset : offset + size] = value.to_bytes(size, "little")
