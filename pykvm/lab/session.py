"""One boot of a lab: from a command to its exit status, output and files.

Whatever happens, a refusal, Ctrl-C, a time-out, a dead guest, the emulator's process is gone and the run's
folder removed when ``run`` is left.  If this process itself is killed, the emulator dies with it
(``tether``) and the next lab removes the folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from pykvm.errors import HostError, LabDiedError, LabError, LabTimeoutError, UsageError
from pykvm.lab import layers
from pykvm.lab.cache import Cache, RunFolder
from pykvm.lab.channel import BrokenStream, Decoder, Frame
from pykvm.lab.diagnosis import Diagnosis, diagnose
from pykvm.lab.emulator import Boot, Emulator, Launch
from pykvm.lab.init import boot_file
from pykvm.lab.kernels import PreparedKernel
from pykvm.lab.kinds import Kind
from pykvm.lab.tether import tethered
from pykvm.lab.toolbox import busybox
from pykvm.lab.unpacking import unpack

_POLL = 0.02  # seconds between two looks at the wire
_CONSOLE_READ = 1 << 20
_WIRE_READ = 1 << 20
_WIRE_KEPT = 16 << 20  # bytes of the wire's file that were read and may still take disk
_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE of <linux/falloc.h>
_APPEND = (
    "console=ttyS0",
    "panic=-1",
    "oops=panic",
    "random.trust_cpu=on",
    "cryptomgr.notests=1",
    "loglevel=5",
    "nokaslr",
    "mitigations=off",
)


@dataclass(frozen=True)
class RunSpec:
    """What to run where.

    ``timeout`` (seconds) counts from the start of the command, not of the boot.  ``put`` files lie in the
    working folder of the guest, ``out`` is where the files come that the command leaves in $PYKVM_LAB_OUT.
    ``directory`` is the guest's working folder if it is another than /lab/work, ``memory`` is in MiB.  A
    guest that says nothing for ``silence`` seconds after the command's start is taken for dead.
    """

    kernel: PreparedKernel
    kind: Kind
    command: tuple[str, ...]
    timeout: float
    put: tuple[Path, ...] = ()
    out: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: str | None = None
    memory: int | None = None
    console: Path | None = None
    silence: float | None = None


Sink = Callable[[bytes], None]


@dataclass(frozen=True)
class Sinks:
    """Where things go while the lab runs."""

    stdout: Sink
    stderr: Sink
    record: Sink = lambda line: None
    note: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class RunResult:
    """How the command ended: its exit status as a shell gives it, on which emulator, in how many seconds."""

    status: int
    emulator: str
    slug: str
    release: str
    boot_seconds: float
    seconds: float


def run(cache: Cache, emulator: Emulator, spec: RunSpec, sinks: Sinks) -> RunResult:
    """Boot, run the command, return its status.

    Raises LabTimeoutError if it takes longer than it may, LabDiedError if the lab ends before it,
    UsageError for a file that cannot be put there or a place that cannot be written, HostError if there is
    no room for the lab's files.
    """
    if not spec.command:
        raise UsageError("There is no command to run in the lab; write it after '--'.")
    _check_targets(spec)
    with contextlib.ExitStack() as stack:
        stack.enter_context(cache.use(spec.kernel.folder))
        busy = busybox(cache, sinks.note)
        wanted = (*emulator.modules, "kvm", spec.kind.module)
        base, modules = layers.base(cache, spec.kernel, busy, wanted)
        kept = [base, layers.python(cache, sinks.note), *filter(None, [layers.project(cache)])]
        stack.enter_context(cache.use(*kept))
        folder = stack.enter_context(cache.run_folder())
        directory = spec.directory or layers.WORK
        command = json.dumps(
            {
                "argv": spec.command,
                "directory": directory,
                "out": layers.OUT,
                "environment": _environment(spec, emulator),
            }
        )
        agent = (sys.executable, "-m", "pykvm.lab.agent", emulator.wire_device)
        boot_text = boot_file(modules, _parameters(spec.kind, emulator), agent)
        try:
            last = layers.run(folder.path / "run.cpio", command, boot_text, spec.put)
            boot = Boot(
                folder=folder.path,
                kernel=spec.kernel,
                layers=(*kept, last),
                append=(*_APPEND, *(("module.sig_enforce=1",) if spec.kernel.enforce else ())),
                memory=spec.memory or emulator.default_memory,
            )
            launch = emulator.launch(boot)
        except OSError as error:
            raise HostError(
                f"Cannot write the lab's files to {folder.path} ({error.strerror}); free some room, for "
                "example with 'pykvm lab clean', or name another folder with PYKVM_LAB_CACHE."
            ) from None
        return _Session(emulator, spec, sinks, folder, launch).run()


def _check_targets(spec: RunSpec) -> None:
    """UsageError now, rather than after the run, for what could not be written then."""
    try:
        if spec.out is not None:
            spec.out.mkdir(parents=True, exist_ok=True)
            if not os.access(spec.out, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(spec.out))
        if spec.console is not None:
            spec.console.write_bytes(b"")
    except OSError as error:
        raise UsageError(f"Cannot write {error.filename} ({error.strerror}); name another place.") from None


def _parameters(kind: Kind, emulator: Emulator) -> dict[str, str]:
    """Module parameters of the kind and of the emulator, by module."""
    both = dict(kind.parameters)
    for module, setting in emulator.parameters.items():
        both[module] = f"{both[module]},{setting}" if module in both else setting
    return both


def _environment(spec: RunSpec, emulator: Emulator) -> dict[str, str]:
    return {
        "PATH": f"{sysconfig.get_path('scripts')}:/usr/bin:/usr/sbin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYKVM_LAB": spec.kind.name,
        "PYKVM_LAB_EMULATOR": emulator.slug,
        "PYKVM_LAB_KERNEL": spec.kernel.release,
        "PYKVM_LAB_OUT": layers.OUT,
        "PYKVM_REQUIRE_KVM": "1",
        **spec.environment,
    }


class _Session:
    """The emulator's process and what comes from it."""

    def __init__(
        self, emulator: Emulator, spec: RunSpec, sinks: Sinks, folder: RunFolder, launch: Launch
    ) -> None:
        self._emulator = emulator
        self._spec = spec
        self._sinks = sinks
        self._folder = folder
        self._launch = launch
        self._decoder = Decoder(self._take)
        self._ready_at: float | None = None
        self._status: int | None = None
        self._problem = ""
        self._files = folder.path / "files.tar.gz"

    def run(self) -> RunResult:
        started = time.monotonic()
        errors = self._folder.path / "emulator.log"
        with errors.open("wb") as log:
            process = subprocess.Popen(
                tethered(self._launch.argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours to answer
            )
        try:
            with self._launch.wire.open("r+b", buffering=0) as wire:
                self._follow(process, wire, started)
        finally:
            _end(process)
            self._copy_console()
        assert self._status is not None
        assert self._ready_at is not None
        self._unpack()
        return RunResult(
            self._status,
            self._emulator.name,
            self._emulator.slug,
            self._spec.kernel.release,
            self._ready_at - started,
            time.monotonic() - self._ready_at,
        )

    def _copy_console(self) -> None:
        if self._spec.console is None:
            return
        try:
            shutil.copyfile(self._launch.console, self._spec.console)
        except OSError as error:  # no reason to lose the command's own status
            self._sinks.note(f"Cannot write the console log to {self._spec.console} ({error.strerror}).")

    def _follow(self, process: subprocess.Popen[bytes], wire: FileIO, started: float) -> None:
        heard = started
        freed = 0
        while not self._done():
            ended = process.poll() is not None  # asked before reading, so that the last bytes are read
            data = wire.read(_WIRE_READ)
            try:
                self._decoder.feed(data)
            except BrokenStream as error:
                raise self._died(f"what it sent cannot be read ({error})") from None
            if self._problem:
                raise self._died(self._problem)
            if self._done():
                return
            if wire.tell() - freed > _WIRE_KEPT:
                _free(wire, wire.tell())
                freed = wire.tell()
            if ended and not data:
                raise self._died()
            now = time.monotonic()
            heard = now if data else heard
            if self._ready_at is None and now - started > self._emulator.boot_timeout:
                raise self._died(f"it did not start its command within {self._emulator.boot_timeout:.0f} s")
            if self._ready_at is not None and now - self._ready_at > self._spec.timeout:
                console = self._keep()
                raise LabTimeoutError(
                    f"The command did not end within {self._spec.timeout:g} s in {self._where()}; "
                    f"give it more with --timeout. The console log is {console}."
                )
            silence = self._spec.silence
            if self._ready_at is not None and silence is not None and now - heard > silence:
                raise self._died(f"it stood still, with nothing to hear from it for {silence:.0f} s")
            if not data:
                time.sleep(_POLL)

    def _done(self) -> bool:
        return self._status is not None

    def _take(self, frame: Frame, payload: bytes) -> None:
        match frame:
            case Frame.READY:
                self._ready_at = time.monotonic()
                self._check(json.loads(payload))
            case Frame.STDOUT:
                self._sinks.stdout(payload)
            case Frame.STDERR:
                self._sinks.stderr(payload)
            case Frame.RECORD:
                self._sinks.record(payload)
            case Frame.FILES:
                with self._files.open("ab") as file:
                    file.write(payload)
            case Frame.PROBLEM:
                self._problem = payload.decode(errors="replace")
            case Frame.EXIT:
                self._status = int(payload)

    def _check(self, facts: Mapping[str, object]) -> None:
        """The guest says what it is: hold it against what was asked for."""
        found = facts.get("parameters")
        assert isinstance(found, dict)
        for module, setting in self._spec.kind.parameters.items():
            for one in setting.split(","):
                name, _, value = one.partition("=")
                actual = found.get(module, {}).get(name)
                if actual is None:
                    self._problem = (
                        f"its {module} has no parameter '{name}', so it cannot be {self._spec.kind.name}"
                    )
                elif actual not in (value, {"0": "N", "1": "Y"}.get(value)):
                    self._problem = f"{module}.{name} is {actual} although {value} was asked for"

    def _where(self) -> str:
        return f"{self._spec.kind.name} with Linux {self._spec.kernel.release} on {self._emulator.name}"

    def _keep(self) -> Path:
        self._folder.keep(self._launch.console.name, "emulator.log")
        return self._launch.console

    def _died(self, why: str = "") -> LabDiedError:
        console = self._keep()
        text = ""
        for path in (console, self._folder.path / "emulator.log"):
            if path.exists():
                with path.open("rb") as file:
                    file.seek(max(0, path.stat().st_size - _CONSOLE_READ))
                    text += file.read().decode(errors="replace")
        found = (
            Diagnosis("unknown", why)
            if why
            else diagnose(text, self._emulator.slug, self._ready_at is not None)
        )
        return LabDiedError(
            f"The lab {self._where()} died: {found.sentence.rstrip('.')}. The console log is {console}.",
            found.sentence,
            str(console),
        )

    def _unpack(self) -> None:
        if self._spec.out is None:
            return
        try:
            self._spec.out.mkdir(parents=True, exist_ok=True)
            if self._files.exists():
                with tarfile.open(self._files) as archive:
                    unpack(archive, self._spec.out, self._left_out)
        except (OSError, tarfile.TarError) as error:
            raise LabError(f"Cannot write the lab's files to {self._spec.out} ({error}).") from None

    def _left_out(self, what: str) -> None:
        """One file that the host refuses is no reason to lose the rest."""
        self._sinks.note(f"Left out of {self._spec.out}: {what}.")


def _free(file: FileIO, end: int) -> None:
    """Give back the disk of everything before ``end``, where the file system can; what is read stays read."""
    fallocate = ctypes.CDLL(None).fallocate
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    fallocate(file.fileno(), _PUNCH_HOLE, 0, end)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The emulator's whole process group is gone afterwards."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
