"""Random programs: loops over instructions with and without templates, on pointers to all kinds of pages."""

from __future__ import annotations

from random import Random

from tests.model.duo import ABSENT_PAGE, CODE, DATA, PT, READ_ONLY_PAGE, SIZE

ALU = [base + form for base in range(0, 0x40, 8) for form in range(4)]
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
POINTERS = (RBX, RSI, RDI)
PLACES = (
    [DATA + 0x100] * 4
    + [
        DATA + 0xFF0,
        DATA + 0x1FFD,
        ABSENT_PAGE - 0x40,
        READ_ONLY_PAGE - 0x40,
        READ_ONLY_PAGE,
        0x1EFC0,
        0x1F000,
        SIZE - 0x40,
        SIZE,
    ]
    + [CODE + 0x10, CODE + 0x700, PT + 8 * 0x11]
)
"""Data, page ends, a page that is not present, read-only and MMIO pages, no memory, code, a page table."""


class Program:
    """Code, registers and the pointers of one random program for a mode."""

    def __init__(self, random: Random, bits: int) -> None:
        self._random = random
        self._bits = bits
        body = b""
        for _ in range(random.randint(1, 12)):
            body += self._instruction()
        end = bytes.fromhex("49ffcf" if bits == 64 else "4d")  # dec r15 or (e)bp
        loop = body + end
        back = -(len(loop) + 2)
        jump = (
            bytes([0x75, back & 0xFF])
            if back >= -128
            else b"\x0f\x85" + self._near(back - 4 + (bits == 16) * 2)
        )
        self.code = b"".join(self._instruction() for _ in range(random.randint(0, 3))) + loop + jump + b"\xf4"
        self.registers = {number: self._value() for number in range(16 if bits == 64 else 8)}
        self.registers[RSP] = random.choice([0xC000, 0xC000, 0xC004, 0xBFFE, DATA + 0x800])
        for pointer in POINTERS:
            place = random.choice(PLACES)
            self.registers[pointer] = place if bits != 16 else place & 0xFFFF
        if random.random() < 0.1:
            self.registers[random.choice(POINTERS)] = self._value()
        self.registers[15 if bits == 64 else RBP] = random.randint(30, 200)

    def _near(self, displacement: int) -> bytes:
        return displacement.to_bytes(2 if self._bits == 16 else 4, "little", signed=True)

    def _value(self) -> int:
        random = self._random
        width = 64 if self._bits == 64 else 32
        value = random.choice(
            [random.getrandbits(width), random.getrandbits(8), 0, 1, (1 << width) - 1, 1 << width - 1, 0x7FFF]
        )
        return value & (1 << width) - 1

    def _instruction(self) -> bytes:
        random = self._random
        prefix = b""
        if random.random() < 0.15:
            prefix += b"\x66"
        if random.random() < 0.03:
            prefix += random.choice([b"\x67", b"\x64", b"\x36", b"\xf0"])
        wide = False
        if self._bits == 64 and random.random() < 0.6:
            rex = 0x40 | random.choice([0, 8, 8]) | random.choice([0, 0, 0, 1, 4, 5])
            wide = bool(rex & 8)
            prefix += bytes([rex])
        self._operand = 2 if (b"\x66" in prefix and not wide) == (self._bits != 16) else 4
        if self._bits == 16 and b"\x66" not in prefix:
            self._operand = 2
        return prefix + random.choice(self._kinds)(self)

    def _modrm(self, reg: int | None = None) -> bytes:
        """Registers, or a pointer with a displacement; pointers are rarely written."""
        random = self._random
        if reg is None:
            reg = random.choice([RAX, RCX, RDX, RDX, RBP, RAX, RCX, *POINTERS[: random.random() < 0.1]])
        if random.random() < 0.5:
            rm = random.choice([RAX, RCX, RDX, RAX, 4 if random.random() < 0.05 else RCX])
            return bytes([0xC0 | reg << 3 | rm])
        if self._bits == 16:
            rm = random.choice([4, 5, 7, 0, 6])  # [si], [di], [bx], [bx+si], [bp]
            return bytes([0x40 | reg << 3 | rm, random.choice([0, 2, 4, 8, 0x7F, 0xF0])])
        rm = random.choice(POINTERS)
        if random.random() < 0.05:
            return bytes([0x44 | reg << 3, random.choice([0x06, 0x4E, 0x8F]), random.randrange(256)])
        if random.random() < 0.05 and self._bits == 64:
            return bytes([0x05 | reg << 3]) + (0x400 + random.randrange(16)).to_bytes(4, "little")
        return bytes([0x40 | reg << 3 | rm, random.choice([0, 8, 0x10, 4, 0x40, 1, 0xF8, 0x7F])])

    def _immediate(self) -> bytes:
        return self._random.choice([1, 0, 0x7FFFFFFF, self._random.getrandbits(32)]).to_bytes(4, "little")[
            : self._operand
        ]

    def _alu(self) -> bytes:
        return bytes([self._random.choice(ALU)]) + self._modrm()

    def _alu_immediate(self) -> bytes:
        opcode = self._random.choice([0x80, 0x81, 0x83])
        tail = self._immediate() if opcode == 0x81 else bytes([self._random.randrange(256)])
        return bytes([opcode]) + self._modrm(self._random.randrange(8)) + tail

    def _advance(self) -> bytes:
        """add or sub pointer, a few bytes"""
        pointer, amount = self._random.choice(POINTERS), self._random.choice([1, 2, 4, 8, 8, 0x40])
        return bytes([0x83, self._random.choice([0xC0, 0xC0, 0xE8]) | pointer, amount])

    def _move(self) -> bytes:
        return (
            bytes([self._random.choice([0x88, 0x89, 0x89, 0x8A, 0x8B, 0x8B, 0x8D])]) + self._memory_or_any()
        )

    def _memory_or_any(self) -> bytes:
        while True:
            modrm = self._modrm()
            if modrm[0] < 0xC0:
                return modrm

    def _move_immediate(self) -> bytes:
        if self._random.random() < 0.5:
            return bytes([0xC6]) + self._modrm(0) + b"\x5a"
        return bytes([0xC7]) + self._modrm(0) + self._immediate()

    def _extend(self) -> bytes:
        return bytes([0x0F, self._random.choice([0xB6, 0xB7, 0xBE, 0xBF, 0xAF])]) + self._modrm()

    def _condition(self) -> bytes:
        return bytes([0x0F, self._random.choice([0x40, 0x90]) + self._random.randrange(16)]) + self._modrm()

    def _shift(self) -> bytes:
        opcode = self._random.choice([0xC0, 0xC1, 0xC1, 0xD0, 0xD1, 0xD3])
        tail = bytes([self._random.choice([0, 1, 3, 7, 8, 15, 31, 33, 63])]) if opcode < 0xD0 else b""
        return bytes([opcode]) + self._modrm(self._random.choice([0, 1, 2, 3, 4, 5, 7])) + tail

    def _group3(self) -> bytes:
        opcode, extension = self._random.choice([0xF6, 0xF7]), self._random.choice([0, 2, 3, 2, 3, 4, 5])
        tail = b"" if extension else (b"\x81" if opcode == 0xF6 else self._immediate())
        return bytes([opcode]) + self._modrm(extension) + tail

    def _count(self) -> bytes:
        return bytes([self._random.choice([0xFE, 0xFF])]) + self._modrm(self._random.choice([0, 1]))

    def _stack(self) -> bytes:
        register = self._random.choice([RAX, RCX, RDX])
        return self._random.choice(
            [
                bytes([0x50 | register]),
                bytes([0x58 | register]),
                b"\x6a\x85",
                b"\x9c",
                b"\xff" + self._modrm(6),
            ]
        )

    def _skip(self) -> bytes:
        """A conditional jump over some byte, or a jump or call over nothing."""
        random = self._random
        cc = bytes([0x70 | random.randrange(16), 1, random.choice([0xF8, 0xF9, 0xF5, 0x90, 0x98])])
        return random.choice([cc, cc, b"\xeb\x01\xf4", b"\xe3\x01\x90", b"\xe8" + self._near(0)])

    def _odd(self) -> bytes:
        random = self._random
        return random.choice(
            [
                bytes([random.choice([0xF8, 0xF9, 0xF5, 0x90, 0x98, 0x99, 0xFC, 0x9F, 0x9E])]),
                b"\x0f" + bytes([0xC8 | random.choice([RAX, RCX, RDX])]),
                b"\x0f\xc1" + self._modrm(),
                bytes([random.choice([0x84, 0x85, 0x86, 0x87, 0x86, 0x87])]) + self._modrm(),
                b"\x6b" + self._modrm() + b"\x97",
                b"\xb1\x0b",
                bytes([0xAA, 0xAB, 0xA4, 0xA5, 0xAC][random.randrange(5) :][:1]),
                b"\xb8" + self._immediate() if self._bits != 64 else b"\x90",
                bytes([0xA8, 0x55]),
                b"\xe6\x10",
            ]
        )

    _kinds = (
        _alu, _alu, _alu_immediate, _alu_immediate, _advance, _move, _move, _move, _move_immediate, _extend,
        _condition, _shift, _group3, _count, _count, _stack, _skip, _odd,
    )  # fmt: skip
