"""Random cases from the table of forms: prefixes, operands and a state in which they mean something."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Final

from pykvm.crosscheck.instructions import values
from pykvm.crosscheck.instructions.case import REAL, InstructionCase, layout_of
from pykvm.crosscheck.instructions.encode import Encoder
from pykvm.crosscheck.instructions.forms import FORMS, Form
from pykvm.observe.refusals import refusal
from pykvm.x86.registers import Registers

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
_FIELDS: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
_BRANCHES: Final = frozenset({"ret", "call", "jmp", "retf", "iret", "ljmp", "lcall"})


@dataclass(frozen=True, slots=True)
class Generated:
    """A case and the cell of the coverage table that it belongs to."""

    form: Form
    operands: str
    """``reg16``, ``mem64``, ``-32`` …: what ModR/M names, and the operand size in bits."""
    case: InstructionCase


def forms_of(mode: int, cpl: int) -> list[Form]:
    """The forms that cases of that mode and privilege use."""
    return [form for form in FORMS if form.exists(mode, cpl)]


class Generator:
    """Cases of one mode and CPL.  The same seed gives the same cases.

    With ``sweep`` the forms take turns, so that all are hit; else each is drawn.
    """

    def __init__(self, mode: int, cpl: int, seed: int, *, sweep: bool = True) -> None:
        self.mode = mode
        self.cpl = cpl
        self.random = Random(f"{seed}/{mode}/{cpl}")
        self.forms = forms_of(mode, cpl)
        self.random.shuffle(self.forms)
        self._turn = 0
        self._sweep = sweep

    def next(self) -> Generated:
        """The next case that no processor's environment has to refuse."""
        while True:
            if self._sweep:
                form = self.forms[self._turn % len(self.forms)]
                self._turn += 1
            else:
                form = self.random.choice(self.forms)
            made = self.make(form)
            if self.cpl == 0 or refusal(made.case.code, self.mode) is None:
                return made

    def make(self, form: Form) -> Generated:
        """One case of the form."""
        return make(self.random, self.mode, self.cpl, form)


def make(random: Random, mode: int, cpl: int, form: Form) -> Generated:
    """One case of a form that exists in that mode and privilege."""
    return _Draft(random, mode, cpl, form).finish()


class _Draft:
    """A case in the making: registers by number, memory patches, the encoded instruction."""

    def __init__(self, random: Random, mode: int, cpl: int, form: Form) -> None:
        self.random = random
        self.mode = mode
        self.cpl = cpl
        self.form = form
        self.registers = [values.number(random) for _ in range(16)]
        self.registers[RSP] = values.stack(random, mode)
        self.memory: dict[int, bytes] = {}
        self.fs_base, self.gs_base = (
            (random.choice((0, 0, 8, layout_of(mode).data)) for _ in range(2)) if mode == 64 else (0, 0)
        )
        self.rip = self._place()
        self.encoder = Encoder(self)

    def _place(self) -> int:
        page = 4096
        if self.mode != 16 and self.random.random() < 0.04:
            return layout_of(self.mode).code + page - self.random.randrange(1, 15)
        return self.random.randrange(64, page - 64) + (0 if self.mode == 16 else layout_of(self.mode).code)

    def finish(self) -> Generated:
        form, random = self.form, self.random
        self._prepare_implicit()
        code = self.encoder.encode()
        self._prepare_operands()
        self._fill_stack()
        registers = Registers(**dict(zip(_FIELDS, self.registers, strict=True)))
        if self.mode != 64:
            for number in range(8, 16):
                setattr(registers, f"r{number}", 0)
            for number in range(8):
                setattr(registers, _FIELDS[number], self.registers[number] & 0xFFFFFFFF)
        if self.mode == 16:
            registers.rsp &= 0xFFFF
        registers.rip = self.rip
        registers.rflags = values.flags(random)
        if self.cpl == 0:
            registers.rflags &= ~(1 << 18)
        floating = values.floating(random, self.mode, x87="x87" in form.words) if form.floating else None
        case = InstructionCase(
            self.mode,
            self.cpl,
            code,
            registers,
            self.memory,
            floating,
            self.fs_base,
            self.gs_base,
        )
        size = 8 if "byte" in form.words else 8 * self.encoder.operand_size
        return Generated(form, f"{self.encoder.kind}{size}", case)

    # --- registers that the form uses without naming them ------------------------------------------------

    def _prepare_implicit(self) -> None:
        random, words, name = self.random, self.form.words, self.form.name
        if "string" in words or name.startswith(("maskmov", "xlat")):
            for number in (RSI, RDI):
                self.point(number, values.address(random, self.mode))
            self._put_at_register(RSI, 40)
            self._put_at_register(RDI, 40)
            if random.random() < 0.5:
                self._same_strings()
            if random.random() < 0.9:
                self._set_count(random.choice((0, 1, 2, 3, random.randrange(40))))
        if "count" in words and random.random() < 0.8:
            self.registers[RCX] = self.registers[RCX] & ~0xFF | random.randrange(70)
        if name.startswith(("loop", "jrcxz")) and random.random() < 0.7:
            self.registers[RCX] = random.choice((0, 1, 2, 1 << 16, 1 << 32, (1 << 16) + 1, (1 << 32) + 1))
        if name in {"div", "idiv"} and random.random() < 0.7:
            self.registers[RDX] = random.choice((0, 0, 1, 2**64 - 1, random.getrandbits(6)))
            if random.random() < 0.3:
                self.registers[RAX] &= 0xFF
        if name == "xlat":
            self.point(RBX, values.address(random, self.mode))
            self._put_at_register(RBX, 16)
        if name in {"leave", "enter"}:
            self.point(RBP, values.stack(random, self.mode))
            self._put_at_register(RBP, 16, stack=True)
        if name.startswith("pcmp") and random.random() < 0.7:
            self.registers[RAX], self.registers[RDX] = (
                random.randrange(-20, 20) & 2**64 - 1,
                random.randrange(20),
            )

    def _set_count(self, count: int) -> None:
        self.registers[RCX] = count | (self.random.getrandbits(32) << 32 if self.random.random() < 0.1 else 0)

    def _same_strings(self) -> None:
        """The same bytes at both ends for CMPS; AL among those for SCAS."""
        source = next(iter(self.memory.values()), b"")
        self.registers[RAX] = int.from_bytes(source[:8].ljust(8, b"\0"), "little")
        if source:
            self.put(self.registers[RDI], source)

    def point(self, number: int, target: int) -> None:
        """Let a register hold an address; in 16- and 32-bit code the upper bits do not matter."""
        self.registers[number] = target & 2**64 - 1

    def _put_at_register(self, number: int, length: int, *, stack: bool = False) -> None:
        self.put(self.registers[number] - 8, values.octets(self.random, length), stack=stack)

    # --- operands ----------------------------------------------------------------------------------------

    def _prepare_operands(self) -> None:
        random, form, encoder = self.random, self.form, self.encoder
        target = encoder.target
        data = (values.float_octets if form.floating else values.octets)(random, 40)
        size = 1 if "byte" in form.words else encoder.operand_size
        words = b""
        if form.name in _BRANCHES and (form.modrm or "ptr" in form.words):
            words = self._pointer(8 if self.mode == 64 and form.extension in {2, 4} else size)
            if encoder.register is not None:
                self.registers[encoder.register] = self.code_address()
        elif "sel" in form.words and random.random() < 0.8:
            selector = random.choice(values.SELECTORS)
            if form.name in {"les", "lds", "lss", "lfs", "lgs"}:
                words = values.octets(random, size) + selector.to_bytes(2, "little")
            else:
                words = selector.to_bytes(2, "little")
            if encoder.register is not None:
                self.registers[encoder.register] = selector | (random.getrandbits(48) << 16)
        elif form.name.startswith("cmpxchg") and random.random() < 0.5:
            words = self._equal_to_accumulator(size)
        elif form.name == "bound":
            low, high = sorted((random.randrange(-40, 40), random.randrange(-40, 40)))
            words = b"".join((n % (1 << 8 * size)).to_bytes(size, "little") for n in (low, high))
        if target is not None:
            if words:
                self.put(target, words)
                self.put(target + len(words), data[:16])
            else:
                self.put(target - 8, data)
        if form.name.startswith("bt") and form.modrm == "/r" and target is not None and random.random() < 0.7:
            self.registers[encoder.field] = random.randrange(-300, 300) & 2**64 - 1

    def _equal_to_accumulator(self, size: int) -> bytes:
        if self.form.name == "cmpxchg8b":
            low, high = (self.registers[n] & (1 << 4 * size * 2) - 1 for n in (RAX, RDX))
            half = 8 if size == 8 else 4
            return (low % (1 << 8 * half)).to_bytes(half, "little") + (high % (1 << 8 * half)).to_bytes(
                half, "little"
            )
        if self.encoder.register is not None:
            self.registers[self.encoder.register] = self.registers[RAX]
        return (self.registers[RAX] % (1 << 8 * size)).to_bytes(size, "little")

    def _pointer(self, size: int) -> bytes:
        offset = self.code_address() % (1 << 8 * size)
        return offset.to_bytes(size, "little") + self._selector().to_bytes(2, "little")

    def code_address(self) -> int:
        """A branch target that is not within the instruction: there a machine would go on."""
        while True:
            target = values.code_address(self.random, self.mode)
            if abs(target - self.rip) > 16:
                return target

    def _selector(self) -> int:
        if self.mode == 16:
            return self.random.choice((REAL.code >> 4, REAL.code >> 4, (REAL.code >> 4) + 1))
        if self.random.random() < 0.5:
            return self.random.choice((0x23, 0x33))
        return self.random.choice(values.SELECTORS)

    def _fill_stack(self) -> None:
        random, form = self.random, self.form
        if "stack" not in form.words:
            return
        top = self.registers[RSP]
        size = self.encoder.operand_size
        if self.mode == 64 and form.name not in {"retf", "iret"} and size == 4:
            size = 8
        if form.name not in _BRANCHES or (self.mode != 16 and random.random() < 0.1):
            self.put(top - 16, values.octets(random, 96), stack=True)
            if "sel" in form.words:
                self.put(top, random.choice(values.SELECTORS).to_bytes(2, "little"), stack=True)
            return
        words = [
            self.code_address(),
            self._selector(),
            values.flags(random) | random.getrandbits(12) & ~0x100,
            values.stack(random, self.mode),
            random.choice((0x2B, *values.SELECTORS)),
        ]
        if form.name in {"ret", "call"}:
            words[1:] = []
        self.put(
            top, b"".join((word % (1 << 8 * size)).to_bytes(size, "little") for word in words), stack=True
        )

    def put(self, address: int, data: bytes, *, stack: bool = False) -> None:
        """Bytes into memory, as far as they are inside; later ones do not overwrite earlier ones."""
        layout = layout_of(self.mode)
        if self.mode == 16:
            address = (address & 0xFFFF) + (layout.stack if stack else layout.data)
        elif self.mode == 32:
            address &= 0xFFFFFFFF
        first, last = max(address, layout.data), min(address + len(data), layout.end)
        if first >= last:
            return
        data = data[first - address : last - address]
        if any(at < first + len(data) and first < at + len(old) for at, old in self.memory.items()):
            return
        self.memory[first] = data
