"""Writing the Python function of one trace.

The function keeps general registers in variables of their names, the flags of the trace's start in ``f``, the
number of instructions of completed turns in ``n``.  ``t3a`` records something of instruction 3 for its flags;
such a line is left out where nobody asks.  When the function ends, ``k`` is the number of instructions
completed in the current turn, which tells RIP and which flags are due.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, NoReturn

from pykvm.model.cpu import flags
from pykvm.model.cpu.flags import CF, MASK
from pykvm.model.cpu.instruction import RSP, SS, HighByte, Immediate, Instruction, Memory, Operand, Register
from pykvm.model.cpu.shifts import SHIFTS, status_after
from pykvm.model.cpu.translator import lazyflags
from pykvm.model.cpu.translator.lazyflags import Source, State
from pykvm.model.cpu.translator.views import Leave, leave

NAMES: Final = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
_RECORDED: Final = re.compile(r"\bt\d+[abcr]\b")
_SHIFT: Final = {1: 0, 2: 1, 4: 2, 8: 3}


class NoTemplate(Exception):
    """This form of the instruction is left to the interpreter."""


def shifted(name: str, value: int, count: int, size: int) -> int:
    """The flags of a shift or rotate by ``count`` (not zero, and carry in does not matter)."""
    result, carry, overflow = SHIFTS[name](value, count, size, 0)
    return status_after(result, carry, overflow, size)


class SegmentKind(NamedTuple):
    """What a template must know of a segment: whether offsets are linear addresses, and its permissions."""

    flat: bool
    readable: bool
    writable: bool


@dataclass(frozen=True)
class Mode:
    """What is fixed in translated code: it is valid while these are so."""

    bits: int
    stack_size: int
    canonical_shift: int
    code_base: int
    code_first: int
    code_last: int
    segments: tuple[SegmentKind, ...]


class Line(NamedTuple):
    text: str
    owner: int
    records: bool


class Emitter:
    """Collects the lines of a trace that starts at RIP ``start``."""

    def __init__(self, mode: Mode, start: int) -> None:
        self.mode = mode
        self.start = start
        self.index = 0
        """Number of the current instruction in the trace."""
        self.next_rip = 0
        """Behind the current instruction."""
        self.rips: list[int] = []
        self.state: State = lazyflags.of_nothing()
        self.returns: list[str] = []
        """Addresses, as expressions, to which the calls of this trace return, innermost last."""
        self.loops = False
        """Whether the trace closes on itself."""
        self.eager = False
        """Whether a loop works out its flags on every turn, since somebody reads those of the turn before."""
        self._writes_rflags = False
        self._lines: list[Line] = []
        self._states: list[State] = []
        self._exits: set[int] = set()
        self._used: set[int] = set()
        self._changed: set[int] = set()
        self._views: set[str] = set()
        self._windows: set[int] = set()
        self._narrow: set[int] = set()
        """Registers whose upper half is known to be zero here."""

    # --- one instruction -------------------------------------------------------------------------------

    def translate(
        self, insn: Instruction, rip: int, template: Callable[[Emitter, Instruction], int | None]
    ) -> int | None:
        """Add an instruction: where the trace goes on, None where it ends.  Raises NoTemplate, adding
        nothing."""
        before = len(self._lines), dict(self.state), set(self._narrow), set(self._exits), list(self.returns)
        self.next_rip = rip + insn.length
        try:
            following = template(self, insn)
        except NoTemplate:
            count, self.state, self._narrow, self._exits, self.returns = before
            del self._lines[count:]
            raise
        self.rips.append(rip)
        self._states.append(before[1])
        self.index += 1
        return following

    def refuse(self) -> NoReturn:
        raise NoTemplate

    def emit(self, text: str) -> None:
        self._lines.append(Line(text, self.index, False))

    def record(self, letter: str, text: str) -> str:
        """Remember a value for the flags: its name, or the value itself where that is a constant."""
        if text.isdigit():
            return text
        name = f"t{self.index}{letter}"
        self._lines.append(Line(f"{name} = {text}", self.index, True))
        return name

    def set_flags(self, source: Source) -> None:
        for flag in lazyflags.FLAGS:
            if source.defines & flag:
                self.state[flag] = source

    def change_rflags(self, text: str) -> None:
        """A line that changes ``f`` itself: flags other than the status flags."""
        self._writes_rflags = True
        self.emit(text)

    def condition(self, name: str) -> str:
        self._note_reads(lazyflags.READS[name])
        return lazyflags.condition(self.state, name)

    def carry(self) -> str:
        """CF as 0 or 1, recorded."""
        self._note_reads(CF)
        name = f"c{self.index}"
        self.emit(f"{name} = 1 if {lazyflags.bit(self.state, CF)} else 0")
        return self.record("c", name)

    def _note_reads(self, flags_read: int) -> None:
        if any(self.state[flag] is None for flag in lazyflags.FLAGS if flags_read & flag):
            self.eager = True

    # --- registers ---------------------------------------------------------------------------------------

    def register(self, index: int, size: int) -> str:
        """The low ``size`` bytes of a register."""
        self._used.add(index)
        name = NAMES[index]
        if size == 8 or (size == 4 and (self.mode.bits != 64 or index in self._narrow)):
            return name
        return f"({name} & {MASK[size]})"

    def set_register(self, index: int, size: int, text: str) -> str:
        """Assign its low ``size`` bytes: the name of a variable that holds them."""
        self._used.add(index)
        self._changed.add(index)
        name = NAMES[index]
        if size >= 4:
            self.emit(f"{name} = {text}")
            if size == 4:
                self._narrow.add(index)
            else:
                self._narrow.discard(index)
            return name
        value = self.value(text)
        self.emit(f"{name} = {name} & {MASK[8] ^ MASK[size]} | {value}")
        return value

    def value(self, text: str) -> str:
        """A variable, or constant, with the value."""
        if text.isidentifier() or text.isdigit():
            return text
        self.emit(f"v{self.index} = {text}")
        return f"v{self.index}"

    # --- operands -----------------------------------------------------------------------------------------

    def read(self, operand: Operand) -> str:
        """An expression for an operand's value; loads happen here and now."""
        if isinstance(operand, Register):
            return self.register(operand.index, operand.size)
        if isinstance(operand, HighByte):
            self._used.add(operand.index)
            return f"({NAMES[operand.index]} >> 8 & 255)"
        if isinstance(operand, Immediate):
            return str(operand.value)
        if isinstance(operand, Memory):
            return self.load(operand.segment, self.offset(operand), operand.size)
        raise NoTemplate

    def write(self, operand: Operand, text: str) -> str:
        """Assign to an operand: the name of a variable, or a constant, with the value."""
        if isinstance(operand, Register):
            return self.set_register(operand.index, operand.size, text)
        if isinstance(operand, HighByte):
            value = self.value(text)
            self._used.add(operand.index)
            self._changed.add(operand.index)
            name = NAMES[operand.index]
            self.emit(f"{name} = {name} & {MASK[8] ^ 0xFF00} | {value} << 8")
            return value
        if isinstance(operand, Memory):
            value = self.value(text)
            self.store(operand.segment, self.offset(operand), operand.size, value)
            return value
        raise NoTemplate

    def update(self, operand: Operand) -> tuple[str, Callable[[str], str]]:
        """Read what the instruction will write: the value and what assigns the new one."""
        if not isinstance(operand, Memory):
            return self.read(operand), lambda text: self.write(operand, text)
        size = operand.size
        address = self._linear(operand.segment, self.offset(operand), size, write=True)
        if size > 1:
            self.emit(f"if {address} & {size - 1}: leave()")
        page, at, old = f"p{self.index}", f"i{self.index}", f"m{self.index}"
        self._views.add(f"write{size}")
        self.emit(f"{page} = write{size}[{address} >> 12]")
        self.emit(f"{at} = {self._element(address, size)}")
        self.emit(f"{old} = {page}[{at}]")

        def put(text: str) -> str:
            value = self.value(text)
            self.emit(f"{page}[{at}] = {value}")
            return value

        return old, put

    # --- memory -------------------------------------------------------------------------------------------

    def offset(self, operand: Memory) -> str:
        """The effective address."""
        mask, displacement = operand.mask, operand.displacement
        if operand.base == Memory.RIP:
            displacement += self.next_rip
        terms = []
        if 0 <= operand.base < Memory.RIP:
            terms.append(self.register(operand.base, 8))
        if operand.index >= 0:
            scale = f" * {operand.scale}" if operand.scale > 1 else ""
            terms.append(self.register(operand.index, 8) + scale)
        if not terms:
            return str(displacement & mask)
        bits = 32 if self.mode.bits != 64 else 64
        if len(terms) == 1 and not displacement and terms[0].isidentifier() and mask >= MASK[bits // 8]:
            return terms[0]
        text = " + ".join(terms)
        if displacement:
            text += f" {'-' if displacement < 0 else '+'} {abs(displacement)}"
        return f"{text} & {mask}"

    def _linear(self, segment: int, offset: str, size: int, *, write: bool) -> str:
        """The linear address, checked against the segment, as a variable or constant."""
        self._exits.add(self.index)
        kind = self.mode.segments[segment]
        if not (kind.writable if write else kind.readable):
            self.refuse()
        if kind.flat:
            return self._atom("a", offset)
        self._windows.add(segment)
        if self.mode.bits == 64:
            return self._atom("a", f"base{segment} + ({offset}) & {MASK[8]}")
        at = self._atom("o", offset)
        self.emit(f"if {at} < first{segment} or {at} + {size - 1} > last{segment}: leave()")
        return self._atom("a", f"base{segment} + {at} & {MASK[4]}")

    def _atom(self, letter: str, text: str) -> str:
        if text.isidentifier() or text.isdigit():
            return text
        name = f"{letter}{self.index}"
        self.emit(f"{name} = {text}")
        return name

    def _element(self, address: str, size: int) -> str:
        return f"({address} & 4095) >> {_SHIFT[size]}" if size > 1 else f"{address} & 4095"

    def load(self, segment: int, offset: str, size: int) -> str:
        """Load an integer: the variable with it."""
        if size not in _SHIFT:
            self.refuse()
        address = self._linear(segment, offset, size, write=False)
        self._views.add(f"read{size}")
        text = f"read{size}[{address} >> 12][{self._element(address, size)}]"
        if size > 1:
            text += f" if not {address} & {size - 1} else load({address}, {size})"
        self.emit(f"m{self.index} = {text}")
        return f"m{self.index}"

    def store(self, segment: int, offset: str, size: int, value: str) -> None:
        """Store a variable or constant.  After it nothing of the instruction may leave."""
        if size not in _SHIFT:
            self.refuse()
        address = self._linear(segment, offset, size, write=True)
        self._views.add(f"write{size}")
        direct = f"write{size}[{address} >> 12][{self._element(address, size)}] = {value}"
        if size == 1:
            self.emit(direct)
            return
        self.emit(f"if {address} & {size - 1}: store({address}, {size}, {value})")
        self.emit(f"else: {direct}")

    def push(self, value: str, size: int) -> None:
        """As MemoryAccess.push."""
        stack = self.mode.stack_size
        self.emit(f"s{self.index} = {self.register(RSP, stack)} - {size} & {MASK[stack]}")
        self.store(SS, f"s{self.index}", size, value)
        self.set_register(RSP, stack, f"s{self.index}")

    def pop(self, size: int) -> tuple[str, str]:
        """As MemoryAccess.pop: the value, and the new stack pointer, which the caller assigns."""
        stack = self.mode.stack_size
        pointer = self.register(RSP, stack)
        value = self.load(SS, pointer, size)
        return value, f"{pointer} + {size} & {MASK[stack]}"

    # --- leaving ------------------------------------------------------------------------------------------

    def leaves(self) -> None:
        """The current instruction may be left to the interpreter."""
        self._exits.add(self.index)

    def finish(self, rip: int) -> None:
        """End a trace behind its last instruction."""
        self._exits.add(self.index)
        self.emit(f"rip = {rip}; k = {self.index}; break")

    def exit_to(self, rip: str, condition: str | None = None) -> None:
        """End the function, or end it if; the instruction is complete."""
        self._exits.add(self.index + 1)
        text = f"rip = {rip}; k = {self.index + 1}; break"
        self.emit(text if condition is None else f"if {condition}: {text}")

    def turn(self, condition: str | None = None) -> None:
        """Go back to the start of the trace, or go back if.  The last thing in a trace."""
        self.loops = True
        if self.eager:
            # The condition first: the sources are still those of this turn.
            if condition is not None:
                self.emit(f"again = {condition}")
                condition = "again"
            mask, bits = lazyflags.materialised(self.state)
            if mask:
                self.emit(f"f = f & {~mask} | {bits}")
            self.state = lazyflags.of_nothing()
        self._exits.add(self.index + 1)
        self.emit("continue" if condition is None else f"if {condition}: continue")

    # --- the function -------------------------------------------------------------------------------------

    def source(self) -> tuple[str, list[int]]:
        """The function's text, and by line number which instruction it belongs to."""
        count = self.index
        states = [*self._states, self.state]
        self._exits.add(count)
        ending = self._ending(states)
        asked = set(_RECORDED.findall("\n".join(ending)))
        for line in self._lines:
            if not line.records:
                asked.update(_RECORDED.findall(line.text))
        lines = [line for line in self._lines if not line.records or line.text.split(" ", 1)[0] in asked]
        header = self._header()
        turns = f"range(0, limit - {count - 1}, {count})" if self.loops else "range(1)"
        text = [*header, "    try:", f"        for n in {turns}:"]
        owners = [0] * (len(text) + 1)
        for line in lines:
            text.append(f"            {line.text}")
            owners.append(line.owner)
        if self.loops:
            text += ["        else:", f"            k = {count}; rip = {self.start}"]
        text += [
            "    except Leave as left:",
            "        k = owners[left.__traceback__.tb_lineno]",
            "        rip = rips[k]",
            *ending,
        ]
        return "\n".join(text) + "\n", owners

    def _header(self) -> list[str]:
        text = ["def block(cpu, limit, views):", "    registers = cpu.regs"]
        text += [f"    {NAMES[index]} = registers[{index}]" for index in sorted(self._used)]
        if self.mode.bits != 64 and self._used:
            union = " | ".join(NAMES[index] for index in sorted(self._used))
            text.append(f"    if ({union}) > {MASK[4]}: return 0")
        text += [f"    {name} = views.{name}" for name in sorted(self._views)]
        if self._views:
            text += ["    load = views.load", "    store = views.store"]
        for segment in sorted(self._windows):
            text.append(f"    base{segment}, first{segment}, last{segment}, _, _ = cpu.windows[{segment}]")
        return [*text, "    f = cpu.rflags", "    n = 0"]

    def _ending(self, states: list[State]) -> list[str]:
        text = self._flags_at_exits(states)
        text += [f"    registers[{index}] = {NAMES[index]}" for index in sorted(self._changed)]
        return [*text, "    cpu.rip = rip", "    return n + k"]

    def _flags_at_exits(self, states: list[State]) -> list[str]:
        """RFLAGS by ``k``: neighbouring exits with the same sources together."""
        groups: list[tuple[int, list[str]]] = []
        for exit in sorted(self._exits):
            code = self._flags_code(states[exit], states[-1])
            if groups and groups[-1][1] == code:
                groups[-1] = exit, code
            else:
                groups.append((exit, code))
        text: list[str] = []
        for number, (last, code) in enumerate(groups):
            word = "if" if number == 0 else "elif"
            text.append(f"    {word} k <= {last}:")
            text += [f"        {line}" for line in code or ["pass"]]
        if any(code for _, code in groups) or (self.loops and self.eager) or self._writes_rflags:
            text.append("    cpu.rflags = f")
            return text
        return []

    def _flags_code(self, state: State, end: State) -> list[str]:
        code = []
        from_start = [flag for flag in lazyflags.FLAGS if state[flag] is None]
        if self.loops and not self.eager:
            # In later turns of a loop these are what the turn before left.
            mask, bits = lazyflags.materialised(end, from_start)
            if mask:
                code.append(f"if n: f = f & {~mask} | {bits}")
        mask, bits = lazyflags.materialised(state)
        if mask:
            code.append(f"f = f & {~mask} | {bits}")
        return code


_HELPERS: Final[Mapping[str, object]] = {
    "Leave": Leave,
    "leave": leave,
    "add": flags.add,
    "subtract": flags.subtract,
    "logic": flags.logic,
    "shifted": shifted,
}

Function = Callable[..., int]


def compiled(emitter: Emitter, helpers: Mapping[str, object]) -> Function:
    """The function ``block(cpu, limit, views)``: how many instructions it executed."""
    text, owners = emitter.source()
    names: dict[str, object] = {**_HELPERS, **helpers}
    names["owners"] = owners
    names["rips"] = emitter.rips
    exec(compile(text, f"<guest code at {emitter.start:#x}>", "exec"), names)
    function = names["block"]
    assert callable(function)
    return function


__all__ = ["Emitter", "Function", "Mode", "NoTemplate", "SegmentKind", "compiled"]
