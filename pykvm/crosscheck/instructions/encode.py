"""Encoding a form with random prefixes and operands (SDM vol. 2, chapter 2)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from pykvm.crosscheck.instructions import values
from pykvm.crosscheck.instructions.guest import STOP

if TYPE_CHECKING:
    from pykvm.crosscheck.instructions.generate import _Draft

_SEGMENTS: Final = (0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65)
_ANY: Final = (*_SEGMENTS, 0x66, 0x67, 0xF2, 0xF3, 0xF0)
_FS, _GS = 0x64, 0x65
_LEGACY_BASES: Final = ((3, 6), (3, 7), (5, 6), (5, 7), (6,), (7,), (5,), (3,))
"""Registers of 16-bit addresses by ModR/M.rm (SDM vol. 2, table 2-1): BX SI, BX DI, BP SI, …"""
_NO_INDEX, _SIB, _NO_BASE = 4, 4, 5


class Encoder:
    """One encoding; afterwards ``target`` is where its memory operand points, ``register`` the other kind."""

    def __init__(self, draft: _Draft) -> None:
        self._draft = draft
        self._random = draft.random
        self.form = draft.form
        self.mode = draft.mode
        self.target: int | None = None
        self.register: int | None = None
        self.field = 0
        """The register that ModR/M.reg names."""
        self.kind = "-"
        self._prefixes, self._rex = self._choose_prefixes()
        wide = bool(self._rex & 8)
        narrow = 0x66 in self._prefixes
        self.operand_size = 8 if wide else (4 if narrow else 2) if self.mode == 16 else 2 if narrow else 4
        other = 0x67 in self._prefixes
        self.address_size = {64: (8, 4), 32: (4, 2), 16: (2, 4)}[self.mode][other]
        self._relative_at: int | None = None

    def _choose_prefixes(self) -> tuple[bytes, int]:
        random, words = self._random, self.form.words
        chosen: list[int] = []
        if "byte" not in words and self.form.prefix is None and random.random() < 0.25:
            chosen.append(0x66)
        if random.random() < 0.08:
            chosen.append(0x67)
        if random.random() < 0.1:
            chosen.append(random.choice(_SEGMENTS))
        if random.random() < 0.06 and self.form.vex is None:
            chosen.append(0xF0)
        if random.random() < (0.6 if "string" in words else 0.02):
            chosen.append(random.choice((0xF2, 0xF3)))
        if self.form.prefix is not None:
            chosen.append(self.form.prefix)
        random.shuffle(chosen)
        if random.random() < 0.03:
            chosen = [random.choice(_ANY) for _ in range(random.randrange(1, 9))] + chosen
        rex = 0
        if self.mode == 64 and self.form.vex is None and random.random() < 0.6:
            rex = 0x40 | random.getrandbits(4)
        return bytes(chosen), rex

    def encode(self) -> bytes:
        """The instruction's bytes.  Sets the draft's registers so that its memory operand has a meaning."""
        form = self.form
        modrm = self._modrm() if form.modrm else b""
        tail = self._immediates()
        if form.vex is not None:
            head = self._prefixes + self._vex() + form.opcode
        else:
            rex = bytes([self._rex]) if self._rex else b""
            head = self._prefixes + rex + form.opcode
        if self._relative_at is not None:
            self._fix_relative(len(head) + len(modrm) + len(tail))
            modrm = self._relative_modrm + modrm[1 + 4 :]
        return head + modrm + tail

    # --- ModR/M --------------------------------------------------------------------------------------------

    def _modrm(self) -> bytes:
        random, form = self._random, self.form
        field = form.extension if form.extension is not None else random.randrange(8)
        rex = self._rex
        if form.vex is not None:
            rex = self._rex = random.getrandbits(4) if self.mode == 64 else random.choice((0, 8))
        self.field = field | (8 if rex & 4 and form.extension is None else 0)
        memory = "reg" not in form.words and ("mem" in form.words or random.random() < 0.5)
        self.kind = "mem" if memory else "reg"
        if not memory:
            rm = random.randrange(8)
            self.register = rm | (8 if rex & 1 else 0)
            return bytes([0xC0 | field << 3 | rm])
        self.target = values.address(random, self.mode)
        return self._short(field) if self.address_size == 2 else self._long(field)

    def _segment_base(self) -> int:
        """Of FS and GS in 64-bit code: the last override of those counts."""
        last = next((prefix for prefix in reversed(self._prefixes) if prefix in {_FS, _GS}), None)
        return {_FS: self._draft.fs_base, _GS: self._draft.gs_base}.get(last or 0, 0)

    def _short(self, field: int) -> bytes:
        """16-bit addressing."""
        random, registers = self._random, self._draft.registers
        assert self.target is not None
        rm, mod = random.randrange(8), random.randrange(3)
        if mod == 0 and rm == 6:
            return bytes([field << 3 | rm]) + struct.pack("<H", self.target & 0xFFFF)
        bits = 8 * mod
        displacement = random.getrandbits(bits) if bits else 0
        signed = displacement - 256 if mod == 1 and displacement > 127 else displacement
        base, *index = _LEGACY_BASES[rm]
        rest = self.target - signed - sum(registers[number] for number in index)
        registers[base] = registers[base] & ~0xFFFF | rest & 0xFFFF
        return bytes([mod << 6 | field << 3 | rm]) + displacement.to_bytes(mod, "little")

    def _long(self, field: int) -> bytes:
        """32- and 64-bit addressing."""
        random = self._random
        assert self.target is not None
        target = self.target - self._segment_base()
        rm, mod = random.randrange(8), random.randrange(3)
        if mod == 0 and rm == _NO_BASE:
            if self.mode == 64:
                self._relative_at, self._relative_modrm = target, bytes([field << 3 | rm])
                return bytes(5)
            return bytes([field << 3 | rm]) + struct.pack("<I", target & 0xFFFFFFFF)
        base: int | None = rm | (8 if self._rex & 1 else 0)
        index, scale, sib = None, 1, b""
        if rm == _SIB:
            number, shift, low = random.randrange(8), random.randrange(4), random.randrange(8)
            sib = bytes([shift << 6 | number << 3 | low])
            index = number | (8 if self._rex & 2 else 0)
            index = None if index == _NO_INDEX else index
            scale = 1 << shift
            base = low | (8 if self._rex & 1 else 0)
            if mod == 0 and low == _NO_BASE:
                base = None
        width = {0: 0, 1: 1, 2: 4}[mod] if base is not None else 4
        displacement = self._registers(target, base, index, scale, width)
        head = bytes([mod << 6 | field << 3 | rm])
        return head + sib + (displacement % (1 << 8 * width)).to_bytes(width, "little")

    def _registers(self, target: int, base: int | None, index: int | None, scale: int, width: int) -> int:
        """Give base and index values that add up to the target; the displacement."""
        random, registers = self._random, self._draft.registers
        top = 1 << 8 * self.address_size
        if index is not None and (base is None or random.random() < 0.7):
            registers[index] = random.randrange(32)
        scaled = registers[index] * scale if index is not None else 0
        if base is None:
            return (target - scaled + 2**31) % 2**32 - 2**31
        displacement = random.getrandbits(8 * width) - (1 << 8 * width - 1) if width else 0
        if base == index:
            registers[base] = (target - displacement) // (scale + 1) % top
        else:
            registers[base] = (target - scaled - displacement) % top
        if self.address_size == 4 and self.mode == 64:
            registers[base] |= random.getrandbits(32) << 32
        return displacement

    def _fix_relative(self, length: int) -> None:
        assert self._relative_at is not None
        displacement = (self._relative_at - self._draft.rip - length + 2**31) % 2**32 - 2**31
        self._relative_modrm += struct.pack("<i", displacement)

    def _vex(self) -> bytes:
        """The three-byte VEX prefix (SDM vol. 2, 2.3.5); L is 0 but for some that must raise #UD."""
        assert self.form.vex is not None
        inverted = (~(self._rex & 7) & 7) << 5
        vector = self._random.getrandbits(4)
        wide = self._rex >> 3 & 1
        self.operand_size = 8 if wide and self.mode == 64 else 4
        long = self._random.random() < 0.03
        return bytes([0xC4, inverted | 2, wide << 7 | (vector ^ 15) << 3 | long << 2 | self.form.vex])

    # --- immediates --------------------------------------------------------------------------------------

    def _immediates(self) -> bytes:
        random, form, words = self._random, self.form, self.form.words
        parts = []
        if "iw" in words:
            small = random.random() < 0.7
            parts.append((random.getrandbits(6) if small else random.getrandbits(16)).to_bytes(2, "little"))
        if form.name == "int" and random.random() < 0.999:
            # KVM's emulator hangs in vectors from 80H on (docs/kvm-findings.md), which takes long.
            parts.append(bytes([random.randrange(0x80)]))
        elif "ib" in words:
            parts.append(
                bytes(
                    [random.choice((0, 1, 7, 8, 0x1F, 0x20, 0x3F, 0x7F, 0x80, 0xFF, random.getrandbits(8)))]
                )
            )
        if "iz" in words:
            parts.append(self._number(min(self.operand_size, 4)))
        if "iv" in words:
            parts.append(self._number(self.operand_size))
        if "moffs" in words:
            self.target = values.address(random, self.mode)
            offset = (self.target - self._segment_base()) % (1 << 8 * self.address_size)
            parts.append(offset.to_bytes(self.address_size, "little"))
            self.kind = "mem"
        if "ptr" in words:
            parts.append(self._draft._pointer(self.operand_size))
        if "jb" in words:
            # Not back into its own bytes: the traced child would stop there, and a machine go on.
            parts.append(bytes([random.randrange(0xF0)]))
        if "jz" in words:
            size = min(self.operand_size, 4)
            near = random.choice((random.randrange(2048), random.randrange(-2048, -15)))
            if random.random() < 0.2:
                near = random.getrandbits(31)
            parts.append((near % (1 << 8 * size)).to_bytes(size, "little"))
            if self.mode == 64 and size == 2:
                # Intel processors ignore the prefix and read four bytes; others stop at the next one.
                parts.append(bytes([STOP, STOP]))
        return b"".join(parts)

    def _number(self, size: int) -> bytes:
        return (values.number(self._random) % (1 << 8 * size)).to_bytes(size, "little")
