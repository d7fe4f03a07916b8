"""The contestants of the emulator bench: the same guest code, every write observed, one pass at a time."""

from __future__ import annotations

from contextlib import ExitStack
from importlib import import_module
from time import perf_counter_ns
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from guest_code import CODE, STOP_PORT

from pykvm.guest.boot import Arena, BootMode, SystemTables, boot_state
from pykvm.guest.pagetables import PageTables, PagingMode
from pykvm.kvm import KvmSystem
from pykvm.machine import IoOut, SlotFlags, System
from pykvm.memory import PAGE_SIZE, GuestMemory
from pykvm.model.system import ModelSystem

MEMORY = 4 << 20
DATA = 0x100000
REGISTERS = ("rax", "rbx", "rcx", "rdi", "r8")
_TABLES = 0x10000


class Loop(NamedTuple):
    """Guest code: ``code`` up to an OUT, of ``length`` instructions a turn; RDX turns, stores at RSI."""

    name: str
    code: bytes
    length: int
    stores: bool


LOOPS = (
    # mov rdi, rsi ; mov rcx, rdx ; next: mov [rdi], rcx ; add rdi, 8 ; dec rcx ; jnz next
    Loop("store loop", bytes.fromhex("4889f7 4889d1 48890f 4883c708 48ffc9 75f4"), 4, True),
    # mov rcx, rdx ; next: add rax, rbx ; xor rbx, rcx ; lea r8, [rax+rbx*2] ; shr r8, 7 ; sub rax, r8
    # dec rcx ; jnz next
    Loop("ALU loop", bytes.fromhex("4889d1 4801d8 4831cb 4c8d0458 49c1e807 4c29c0 48ffc9 75ea"), 7, False),
)


class Outcome(NamedTuple):
    """What a pass took, and what all sides must agree on."""

    nanoseconds: float
    registers: tuple[int, ...]
    dirty: tuple[int, ...]


class Side(Protocol):
    """One way to execute the loop."""

    def run(self) -> Outcome:
        """One pass, from the same registers and with no page dirty."""

    def close(self) -> None: ...


class MachineSide:
    """A machine behind pykvm's Protocols: long mode at CPL 0, 4-level paging with 4 KiB pages, dirty log."""

    def __init__(self, system: System, loop: Loop, turns: int) -> None:
        with ExitStack() as stack:
            stack.enter_context(system)
            vm = stack.enter_context(system.create_machine())
            memory = stack.enter_context(GuestMemory(MEMORY))
            arena = Arena(_TABLES, DATA)
            tables = SystemTables.build(memory, arena.take, wide=True, stacks=[0x8000])
            pages = PageTables(PagingMode.LONG4, memory, arena.take)
            pages.map(0, 0, MEMORY)
            memory.write(CODE, loop.code + bytes((0xE6, STOP_PORT)))
            self._state = boot_state(BootMode.LONG, entry=CODE, stack=0x9000, cr3=pages.cr3, tables=tables)
            registers = self._state.registers
            registers.rsi, registers.rdx, registers.rbx = DATA, turns, 0x1234567
            self._slot = vm.create_slot(memory, 0, flags=SlotFlags.LOG_DIRTY_PAGES)
            self._vm = vm
            self.vcpu = vm.create_vcpu()
            self.vcpu.set_cpuid(vm.supported_cpuid)
            self._state.apply(self.vcpu)
            self.run()  # the tables get their A and D bits
            self._close = stack.pop_all()

    def run(self) -> Outcome:
        vcpu = self.vcpu
        vcpu.set_registers(self._state.registers)
        self._vm.get_dirty_log(self._slot)
        start = perf_counter_ns()
        exit = vcpu.run()
        spent = perf_counter_ns() - start
        if not isinstance(exit, IoOut) or exit.port != STOP_PORT:
            raise RuntimeError(f"The guest of the bench came out with {exit} instead of its port write.")
        registers = vcpu.get_registers()
        return Outcome(
            spent,
            tuple(getattr(registers, name) for name in REGISTERS),
            tuple(int(gfn) for gfn in self._vm.get_dirty_log(self._slot)),
        )

    def emulated(self) -> bool:
        """Whether KVM executes this guest in its instruction emulator."""
        before = self.vcpu.statistics()
        self.run()
        count = self.vcpu.statistics().value("insn_emulation") - before.value("insn_emulation")
        return count > self._state.registers.rdx

    def close(self) -> None:
        self._close.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class UnicornSide:
    """unicorn with hooks in Python: on each write, and on each instruction with ``each``.  Its memory is
    flat, without page tables."""

    def __init__(self, loop: Loop, turns: int, *, each: bool) -> None:
        unicorn: Any = import_module("unicorn")
        names: Any = import_module("unicorn.x86_const")
        self._engine = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self._engine.mem_map(0, MEMORY)
        self._engine.mem_write(CODE, loop.code + bytes((0xE6, STOP_PORT)))
        self._end = CODE + len(loop.code)
        self._start = {
            names.UC_X86_REG_RSI: DATA,
            names.UC_X86_REG_RDX: turns,
            names.UC_X86_REG_RBX: 0x1234567,
            **dict.fromkeys(
                (names.UC_X86_REG_RAX, names.UC_X86_REG_RCX, names.UC_X86_REG_RDI, names.UC_X86_REG_R8), 0
            ),
        }
        self._names = [getattr(names, f"UC_X86_REG_{name.upper()}") for name in REGISTERS]
        self._dirty: set[int] = set()
        self._instructions = 0
        if each:
            self._engine.hook_add(unicorn.UC_HOOK_CODE, self._instruction)
        self._engine.hook_add(unicorn.UC_HOOK_MEM_WRITE, self._write)
        self.run()

    def _instruction(self, engine: Any, address: int, size: int, data: Any) -> None:
        self._instructions += 1

    def _write(self, engine: Any, access: int, address: int, size: int, value: int, data: Any) -> None:
        self._dirty.add(address // PAGE_SIZE)

    def run(self) -> Outcome:
        for register, value in self._start.items():
            self._engine.reg_write(register, value)
        self._dirty.clear()
        start = perf_counter_ns()
        self._engine.emu_start(CODE, self._end)
        spent = perf_counter_ns() - start
        registers = tuple(self._engine.reg_read(register) for register in self._names)
        return Outcome(spent, registers, tuple(sorted(self._dirty)))

    def close(self) -> None:
        pass


def model(loop: Loop, turns: int, *, translate: bool) -> MachineSide:
    """The reference machine."""
    return MachineSide(ModelSystem(translate=translate), loop, turns)


def kvm(loop: Loop, turns: int) -> MachineSide:
    """Real KVM.  Raises PykvmError where there is none."""
    return MachineSide(KvmSystem(), loop, turns)
