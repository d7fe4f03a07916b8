"""The program in the guest: it runs one command and tells the host everything over the wire.

Started by /init as ``python -m pykvm.lab.agent DEVICE``.  It reads /lab/command.json, runs the command with
pipes, forwards what comes as frames (``channel``), then the files that the command left in /lab/out, then
the exit status.
"""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import selectors
import subprocess
import sys
import tarfile
import termios
import time
import tty
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pykvm.lab.channel import LARGEST, Frame, encode, pieces

COMMAND = Path("/lab/command.json")
PARAMETERS = ("kvm", "kvm_amd", "kvm_intel")
_CHUNK = 1 << 16
_GRACE = 2.0  # seconds for the pipes of a command that ended, which its own children may hold open


class Wire:
    """The device that leads to the host, written frame by frame."""

    def __init__(self, device: str) -> None:
        self._file = os.open(device, os.O_RDWR | os.O_NOCTTY)
        self._serial = os.isatty(self._file)
        if self._serial:
            tty.setraw(self._file)
            settings = termios.tcgetattr(self._file)
            settings[4] = settings[5] = termios.B115200
            termios.tcsetattr(self._file, termios.TCSANOW, settings)

    def send(self, kind: Frame, payload: bytes) -> None:
        for frame in pieces(kind, payload) if payload else (encode(kind, b""),):
            view = memoryview(frame)
            while view:
                view = view[os.write(self._file, view) :]

    def drain(self) -> None:
        """Wait until a serial port has sent everything."""
        if self._serial:
            termios.tcdrain(self._file)


def facts() -> dict[str, Any]:
    """What this guest is: kernel, seconds since it started, KVM's module parameters."""
    parameters = {}
    for module in PARAMETERS:
        folder = Path("/sys/module", module, "parameters")
        if folder.is_dir():
            parameters[module] = {
                path.name: path.read_text(errors="replace").strip()
                for path in sorted(folder.iterdir())
                if os.access(path, os.R_OK)
            }
    return {
        "release": os.uname().release,
        "uptime": float(Path("/proc/uptime").read_text().split()[0]),
        "kvm": os.path.exists("/dev/kvm"),
        "parameters": parameters,
    }


def complaints() -> str:
    """What the kernel said about KVM, for a lab that has none."""
    log = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", check=False).stdout
    return "; ".join(
        line for line in log.splitlines() if "kvm" in line.lower() or "SVM" in line or "VMX" in line
    )[-500:]


def run_command(command: Mapping[str, Any], send: Callable[[Frame, bytes], None]) -> int:
    """Run the command, forward what it writes, return its exit status as a shell would."""
    records, records_end = os.pipe()
    os.set_inheritable(records_end, True)
    environment = {**os.environ, **command["environment"], "PYKVM_LAB_RECORDS": str(records_end)}
    try:
        child = subprocess.Popen(
            command["argv"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=command["directory"],
            env=environment,
            pass_fds=(records_end,),
            start_new_session=True,
        )
    except OSError as error:
        os.close(records)
        what = f"cannot run '{command['argv'][0]}'"
        if error.filename == command["directory"]:
            what = f"cannot start in '{error.filename}'"
        send(Frame.STDERR, os.fsencode(f"pykvm lab: {what}: {error.strerror}\n"))
        return 127 if error.errno == errno.ENOENT else 126
    finally:
        os.close(records_end)
    with child:
        _forward(child, records, send)
        os.close(records)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _forward(child: subprocess.Popen[bytes], records: int, send: Callable[[Frame, bytes], None]) -> None:
    """Everything that comes until the pipes end, or the child has ended and its own children keep them."""
    assert child.stdout is not None
    assert child.stderr is not None
    lines = _Lines(lambda line: send(Frame.RECORD, line))
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout.fileno(), selectors.EVENT_READ, lambda data: send(Frame.STDOUT, data))
        selector.register(child.stderr.fileno(), selectors.EVENT_READ, lambda data: send(Frame.STDERR, data))
        selector.register(records, selectors.EVENT_READ, lines.feed)
        ended: float | None = None
        while selector.get_map() and (ended is None or time.monotonic() - ended < _GRACE):
            for key, _ in selector.select(0.2):
                data = os.read(key.fd, _CHUNK)
                if data:
                    key.data(data)
                else:
                    selector.unregister(key.fd)
            if ended is None and child.poll() is not None:
                ended = time.monotonic()
    lines.end()


class _Lines:
    """Cuts records into lines."""

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self._take = take
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole:
            self._take(line)

    def end(self) -> None:
        if self._rest:
            self._take(self._rest)


class _FramedFile(io.RawIOBase):
    """A file for tarfile that sends what is written to it."""

    def __init__(self, send: Callable[[Frame, bytes], None]) -> None:
        self._send = send

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = bytes(data)
        for start in range(0, len(view), LARGEST):
            self._send(Frame.FILES, view[start : start + LARGEST])
        return len(view)


def send_files(folder: Path, send: Callable[[Frame, bytes], None]) -> None:
    """What is below ``folder``, as a tar stream; nothing if it is empty.

    Pipes and devices are left out, since the host would refuse the whole stream for one of them.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    with gzip.GzipFile(fileobj=_FramedFile(send), mode="wb", compresslevel=1) as packed:
        with tarfile.open(mode="w|", fileobj=packed) as archive:
            archive.add(folder, arcname=".", filter=lambda entry: None if entry.isdev() else entry)


def main(device: str) -> int:
    """Run what /lab/command.json says; the return value is for the console only."""
    wire = Wire(device)
    command = json.loads(COMMAND.read_text())
    found = facts()
    wire.send(Frame.READY, json.dumps(found).encode())
    if not found["kvm"]:
        wire.send(Frame.PROBLEM, f"the guest has no /dev/kvm: {complaints()}".encode())
        wire.drain()
        return 1
    status = run_command(command, wire.send)
    send_files(Path(command["out"]), wire.send)
    wire.send(Frame.EXIT, str(status).encode())
    wire.drain()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
