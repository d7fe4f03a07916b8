"""The traced child: an empty process with the arena in it and nothing else, which executes what it is told.

It is started with posix_spawn from a program of some hundred bytes that is built here, so no Python runs in
it.  The program maps the arena, unmaps everything else, closes all files, asks to be traced, and forbids
itself all system calls (seccomp); from then on only its parent moves it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import struct
import threading
import weakref
from typing import Any, Final

from ptrace import PtraceError
from ptrace.binding import func as binding
from ptrace.binding.linux_struct import siginfo, user_fpregs_struct, user_regs_struct

from pykvm.errors import HostError, UsageError
from pykvm.observe.arena import CODE, DATA, PAGE, READ_ONLY, WRITABLE_PAGES, Arena

_PROGRAM: Final = 0x400000
_ARENA_FD: Final = 3
_END_OF_ADDRESSES: Final = 0x7FFF_FFFF_F000

_READ, _WRITE, _EXEC = 1, 2, 4
_SHARED_FIXED: Final = 0x11
_MMAP, _MUNMAP, _PTRACE, _GETPPID, _PRCTL, _EXIT_GROUP, _CLOSE_RANGE = 9, 11, 101, 110, 157, 231, 436
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER: Final = 2
_KILL_PROCESS: Final = struct.pack("<HBBI", 0x06, 0, 0, 0x80000000)
"""BPF_RET | BPF_K with SECCOMP_RET_KILL_PROCESS: a filter that allows nothing."""

_EXITKILL: Final = 0x100000
"""PTRACE_O_EXITKILL: the child dies with its tracer."""
_WALL: Final = 0x40000000
_CPU_SECONDS: Final = 20
"""Processor time of one child, after which another takes its place: whatever runs wild ends there."""

_STEPS: Final = {
    1: "mapping its memory",
    2: "tying its life to its parent's",
    3: "closing its files",
    4: "asking to be traced (ptrace)",
    5: "giving up system calls (seccomp)",
}


class ChildDiedError(Exception):
    """The traced child is gone; ``str`` says how."""


def _call(number: int, *arguments: int) -> bytes:
    """mov each argument register, imm64; mov eax, number; syscall (System V ABI, A.2.1)."""
    registers = (b"\x48\xbf", b"\x48\xbe", b"\x48\xba", b"\x49\xba", b"\x49\xb8", b"\x49\xb9")
    loads = b"".join(
        opcode + struct.pack("<Q", value) for opcode, value in zip(registers, arguments, strict=False)
    )
    return loads + b"\xb8" + struct.pack("<I", number) + b"\x0f\x05"


def _or_exit(step: int) -> bytes:
    """test rax, rax; jns over; exit_group(step)."""
    end = _call(_EXIT_GROUP, step)
    return b"\x48\x85\xc0\x79" + bytes([len(end)]) + end


def _program() -> bytes:
    """An ELF file that maps the code page and jumps to it."""
    code = _call(_MMAP, CODE, PAGE, _READ | _EXEC, _SHARED_FIXED, _ARENA_FD, 0) + _or_exit(1)
    code += b"\xb8" + struct.pack("<I", CODE) + b"\xff\xe0"  # mov eax, CODE; jmp rax
    headers = 64 + 56
    size = headers + len(code)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, _PROGRAM + headers, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, _READ | _EXEC, 0, _PROGRAM, _PROGRAM, size, size, PAGE)
    return ident + header + segment + code


def _setup() -> bytes:
    """What the child executes in its code page before it is the parent's."""
    end = READ_ONLY + PAGE
    parts = [
        _call(_MMAP, DATA, WRITABLE_PAGES * PAGE, _READ | _WRITE, _SHARED_FIXED, _ARENA_FD, PAGE),
        _or_exit(1),
        _call(_MMAP, READ_ONLY, PAGE, _READ, _SHARED_FIXED, _ARENA_FD, PAGE * (1 + WRITABLE_PAGES)),
        _or_exit(1),
        _call(_MUNMAP, 0, CODE),
        _call(_MUNMAP, CODE + PAGE, DATA - CODE - PAGE),
        # The kernel may refuse to unmap its own pages up there; nothing else depends on it.
        _call(_MUNMAP, end, _END_OF_ADDRESSES - end),
        _call(_PRCTL, _PR_SET_PDEATHSIG, signal.SIGKILL),
        _or_exit(2),
        _call(_GETPPID),
        b"\x2d" + struct.pack("<I", os.getpid()) + b"\x48\xf7\xd8",  # sub eax, parent; neg rax
        _or_exit(2),
        _call(_CLOSE_RANGE, 0, 0xFFFFFFFF, 0),
        _or_exit(3),
        _call(_PTRACE, binding.PTRACE_TRACEME, 0, 0, 0),
        _or_exit(4),
        _call(_PRCTL, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        _or_exit(5),
    ]
    code = b"".join(parts)
    last = len(_call(_PRCTL, 0, 0, 0) + _or_exit(5)) + 1
    program = CODE + len(code) + last
    code += _call(_PRCTL, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program) + _or_exit(5) + b"\xcc"
    return code + struct.pack("<HxxxxxxQ", 1, program + 16) + _KILL_PROCESS


def _reap(pid: int) -> None:
    """End the child and collect it."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        while True:
            _, status = os.waitpid(pid, _WALL)
            if not os.WIFSTOPPED(status):
                return


class TracedChild:
    """One child, stopped whenever no call here is under way.

    ptrace(2) binds it to the thread that made it.  All calls raise ChildDiedError once it is gone.
    """

    def __init__(self, arena: Arena) -> None:
        arena.set_code(CODE, _setup(), 0xCC)
        self.registers: Any = user_regs_struct()
        self.floating: Any = user_fpregs_struct()
        self._registers_at = ctypes.addressof(self.registers)
        self._floating_at = ctypes.addressof(self.floating)
        self._thread = threading.get_ident()
        self.pid = self._spawn(arena.fd)
        self._finalizer = weakref.finalize(self, _reap, self.pid)
        try:
            self._wait_for_setup()
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _spawn(arena_fd: int) -> int:
        program = os.memfd_create("pykvm-child", os.MFD_CLOEXEC)
        try:
            os.write(program, _program())
            path = f"/proc/self/fd/{program}"
            return os.posix_spawn(
                path, ["pykvm-child"], {}, file_actions=[(os.POSIX_SPAWN_DUP2, arena_fd, _ARENA_FD)]
            )
        except OSError as error:
            raise HostError(
                f"The host's processor cannot be observed: no child process ({error.strerror}); "
                "allow memfd_create and executing from it, or leave the host out."
            ) from error
        finally:
            os.close(program)

    def _wait_for_setup(self) -> None:
        try:
            stopped = self.wait()
        except ChildDiedError as died:
            raise HostError(
                f"The host's processor cannot be observed: the traced child {died}; "
                "run where ptrace and seccomp are allowed, or leave the host out."
            ) from None
        if stopped != signal.SIGTRAP:
            raise HostError(f"The host's processor cannot be observed: the child stopped with {stopped}.")
        self._ptrace(binding.PTRACE_SETOPTIONS, 0, _EXITKILL)
        resource.prlimit(self.pid, resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS + 1))
        self._ptrace(binding.PTRACE_GETREGS, 0, self._registers_at)
        self._ptrace(binding.PTRACE_GETFPREGS, 0, self._floating_at)

    def close(self) -> None:
        """End and collect the child; twice does nothing."""
        self._finalizer()

    def write_registers(self) -> None:
        """``registers`` become the child's."""
        self._ptrace(binding.PTRACE_SETREGS, 0, self._registers_at)

    def read_registers(self) -> None:
        """The child's become ``registers``."""
        self._ptrace(binding.PTRACE_GETREGS, 0, self._registers_at)

    def write_floating(self) -> None:
        """``floating`` (an FXSAVE image) becomes the child's."""
        self._ptrace(binding.PTRACE_SETFPREGS, 0, self._floating_at)

    def read_floating(self) -> None:
        """The child's become ``floating``."""
        self._ptrace(binding.PTRACE_GETFPREGS, 0, self._floating_at)

    def step(self) -> int:
        """Execute one instruction; the signal that stopped the child after it."""
        self._ptrace(binding.PTRACE_SINGLESTEP, 0, 0)
        return self.wait()

    def resume(self) -> int:
        """Execute until a signal, and say which."""
        self._ptrace(binding.PTRACE_CONT, 0, 0)
        return self.wait()

    def signal_information(self) -> tuple[int, int]:
        """si_code and si_addr of the signal that stopped the child (sigaction(2))."""
        info = siginfo()
        self._ptrace(binding.PTRACE_GETSIGINFO, 0, ctypes.addressof(info))
        return info.si_code, info._sigfault._addr or 0

    def wait(self) -> int:
        """Wait until the child stops; the signal."""
        try:
            _, status = os.waitpid(self.pid, _WALL)
        except ChildProcessError:
            raise ChildDiedError("was collected by somebody else") from None
        if os.WIFSTOPPED(status):
            return os.WSTOPSIG(status)
        self._finalizer.detach()
        if os.WIFEXITED(status):
            raise ChildDiedError(f"failed when {_STEPS.get(os.WEXITSTATUS(status), 'starting')}")
        raise ChildDiedError(f"was ended by {signal.Signals(os.WTERMSIG(status)).name}")

    def _ptrace(self, request: int, address: int, data: int) -> None:
        if threading.get_ident() != self._thread:
            raise UsageError("A HostCpu belongs to the thread that opened it; open another one here.")
        try:
            binding.ptrace(request, self.pid, address, data)
        except PtraceError:
            if self._finalizer.alive:
                self.wait()
            raise ChildDiedError("cannot be traced any more") from None
