"""Which code is worth translating, and whether what was translated still holds."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from pykvm.model.cpu.flags import RF
from pykvm.model.cpu.instruction import CS
from pykvm.model.cpu.translator.emitter import Mode, SegmentKind
from pykvm.model.cpu.translator.trace import Block, translate
from pykvm.model.cpu.translator.views import Views

if TYPE_CHECKING:
    from pykvm.model.cpu.processor import Processor

_HOT: Final = 16
_REWRITES: Final = 4
"""Code that changed so often is left to the interpreter."""
_BLOCKS_KEPT: Final = 1 << 13
_RIPS_COUNTED: Final = 1 << 17
_MODES_KEPT: Final = 1 << 10
_TOP: Final = 0xFFFFFFFF

Key = tuple[int, int, int]
"""Number of the mode, RIP, frame."""


class Translator:
    """The translated code of one processor.

    ``_ready`` holds what was found valid since the last event that could have changed code, mode or fetch
    translations; the frames of all its code are watched.
    """

    def __init__(self, cpu: Processor) -> None:
        self._cpu = cpu
        self._known: dict[Key, Block] = {}
        self._rewritten: Counter[Key] = Counter()
        self._ready: dict[int, Block] = {}
        self._plain: set[int] = set()
        self._heat: dict[int, int] = {}
        self.hot = _HOT
        """Executions by the interpreter after which code is translated."""
        self._epoch = -1
        self._modes: dict[Mode, int] = {}
        self._recent_modes: dict[tuple[object, ...], Mode] = {}
        self._renew()

    def run(self, limit: int) -> int:
        """Execute up to ``limit`` instructions of translated code: how many; then it is the interpreter's
        turn for at least one."""
        cpu = self._cpu
        if cpu.epoch != self._epoch:
            self._renew()
        ready, views, left = self._ready, self._views, limit
        while True:
            block = ready.get(cpu.rip) or self._find(cpu.rip)
            if block is None or block.length > left:
                break
            resume = cpu.rflags & RF
            if resume:
                cpu.rflags ^= RF  # the first instruction clears it
            done = block.run(cpu, left, views)
            if not done:
                cpu.rflags |= resume
                break
            left -= done
            if views.exit_due:
                break
        done = limit - left
        cpu.instructions += done
        cpu.translated += done
        return done

    def exit_due(self) -> bool:
        """Whether the last instruction that was executed came out with an exit."""
        due, self._views.exit_due = self._views.exit_due, False
        return due

    def _find(self, rip: int) -> Block | None:
        """The block at ``rip``, translated now if it has become hot."""
        heat = self._heat.get(rip, 0)
        if heat < self.hot:
            if len(self._heat) >= _RIPS_COUNTED:
                self._heat.clear()
            self._heat[rip] = heat + 1
            return None
        if rip in self._plain:
            return None
        found = self._look_up(rip)
        if found is not None:
            self._ready[rip] = found
        return found

    def _look_up(self, rip: int) -> Block | None:
        cpu = self._cpu
        base, first, last, _, _ = cpu.windows[CS]
        linear = base + rip if cpu.bits64 else base + rip & _TOP
        page = cpu.translations.fetch.get(linear >> 12)
        ram = None if page is None else cpu.bus.ram(page >> 12)
        if page is None or ram is None or not first <= rip <= last:
            return None
        frame = page >> 12
        if cpu.holds_tables(frame):
            # Walks that set A and D bits do not tell anybody.
            return None
        key = self._mode_number, rip, frame
        known = self._known.get(key)
        if known is not None:
            if ram[known.first : known.last] == known.code:
                cpu.bus.watch(frame)
                return known
            del self._known[key]
            self._rewritten[key] += 1
            self._heat[rip] = 0
            return None
        if self._rewritten[key] >= _REWRITES:
            return None
        return self._translate(key, ram, linear & 0xFFF)

    def _translate(self, key: Key, ram: memoryview, offset: int) -> Block | None:
        cpu = self._cpu
        _, rip, frame = key
        block = translate(cpu.decoder, self._mode, ram, rip, offset)
        if block is None:
            self._plain.add(rip)
        else:
            cpu.bus.watch(frame)
            if len(self._known) >= _BLOCKS_KEPT:
                self._known.clear()
                self._rewritten.clear()
            self._known[key] = block
        return block

    # --- what follows from the processor's state ----------------------------------------------------------

    def _renew(self) -> None:
        """Mode, translations or memory changed."""
        self._epoch = self._cpu.epoch
        self._ready.clear()
        self._plain.clear()
        cpu = self._cpu
        state = (cpu.bits, cpu.stack_size, cpu.canonical_shift, *cpu.windows)
        mode = self._recent_modes.get(state)
        if mode is None:
            if len(self._recent_modes) >= _MODES_KEPT:
                self._recent_modes.clear()
            mode = self._recent_modes[state] = self._present_mode()
        self._mode = mode
        self._mode_number = self._modes.setdefault(self._mode, len(self._modes))
        self._views = self._present_views()

    def _present_mode(self) -> Mode:
        cpu = self._cpu
        code = cpu.windows[CS]
        return Mode(
            bits=cpu.bits,
            stack_size=cpu.stack_size,
            canonical_shift=cpu.canonical_shift,
            code_base=code.base,
            code_first=code.first,
            code_last=code.last,
            segments=tuple(
                SegmentKind(
                    (base, first, last) == (0, 0, 0xFFFFFFFFFFFFFFFF if cpu.bits64 else _TOP),
                    readable,
                    writable,
                )
                for base, first, last, readable, writable in cpu.windows
            ),
        )

    def _present_views(self) -> Views:
        translations = self._cpu.translations
        if translations.views is None:
            translations.views = Views(self._cpu, translations)
        return translations.views
