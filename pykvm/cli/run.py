"""``pykvm run``: start an image file as a guest, with its serial line on the terminal."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from pykvm.cli.host_profile import open_machines, profile_option
from pykvm.cli.parameters import duration_type, number_type, size_type
from pykvm.cli.session import Session, common_options
from pykvm.errors import CapabilityError, GuestTimeoutError, UsageError
from pykvm.guest.devices import DeviceBus
from pykvm.guest.images import FORMATS, Image, load_image
from pykvm.guest.launch import BootExtras, LaunchedGuest, launch
from pykvm.guest.modes import MODES
from pykvm.guest.pc_devices import (
    COM_PORTS,
    Cmos,
    DebugExit,
    DebugText,
    KeyboardController,
    PostCode,
    Serial16550,
)
from pykvm.guest.protocol import DEBUG_TEXT_PORT
from pykvm.kvm import KvmVm
from pykvm.machine import DirtyPages, Exit, Machine, Vcpu
from pykvm.memory import PAGE_SIZE
from pykvm.profiles import Profile
from pykvm.report.text import bytes_text, plural, seconds_text
from pykvm.track import HOST_TRACKERS, TRACKERS, Tracker, make_tracker

_SERIAL_PORTS = 8
_FIRST_EXITS_SHOWN = 10_000
LARGEST_FILE = 1 << 30
"""Bytes of an image or a module."""


class Board:
    """The devices that the guest finds, and what they saw."""

    def __init__(self, session: Session, serial: str, post_port: int, memory: int, *, trace: bool) -> None:
        self._stream = sys.stderr.buffer if session.json else sys.stdout.buffer
        base = COM_PORTS[int(serial[-1])]
        self.serial = Serial16550(base, self._show)
        self.debug_text = DebugText(self._show)
        self.post = PostCode()
        self.exits: Counter[str] = Counter()
        self.bus = DeviceBus(trace=trace)
        self.bus.attach_ports(self.serial, base, _SERIAL_PORTS)
        self.bus.attach_ports(self.debug_text, DEBUG_TEXT_PORT)
        self.bus.attach_ports(DebugExit(), DebugExit.PORT)
        self.bus.attach_ports(self.post, post_port)
        self.bus.attach_ports(Cmos(memory), Cmos.PORT, 2)
        keyboard = KeyboardController()
        self.bus.attach_ports(keyboard, keyboard.DATA)
        self.bus.attach_ports(keyboard, keyboard.COMMAND)

    def _show(self, data: bytes) -> None:
        self._stream.write(data)
        self._stream.flush()

    def trace(self, vcpu: Vcpu, reason: Exit) -> None:
        """Print an exit; after the first thousands only count them."""
        self.exits[type(reason).__name__] += 1
        if self.exits.total() <= _FIRST_EXITS_SHOWN:
            print(f"vcpu {vcpu.id}: {reason}", file=sys.stderr)

    def document(self) -> dict[str, Any]:
        return {
            "serial": self.serial.output.decode("utf-8", "replace"),
            "debug_text": self.debug_text.output.decode("utf-8", "replace"),
            "post_codes": self.post.codes,
            "exits": dict(self.exits),
            "unanswered": dict(self.bus.unknown),
        }


def read_file(path: Path) -> bytes:
    """The file's bytes, at most LARGEST_FILE of them: a device may never end.  Raises UsageError."""
    data = bytearray()
    try:
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                data += part
                if len(data) > LARGEST_FILE:
                    raise UsageError(f"{path} is longer than {bytes_text(LARGEST_FILE)}; is it an image?")
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from error
    return bytes(data)


def _run(guest: LaunchedGuest, tracker: Tracker | None, timeout: float | None) -> tuple[int, DirtyPages]:
    """The guest's exit status and what it wrote (nothing without a tracker)."""
    runner = guest.runner
    if tracker is not None:
        runner.on_ring_full = tracker.on_ring_full
        tracker.arm(guest.machine)
    runner.start()
    status = runner.wait(timeout)
    if status is None:
        raise GuestTimeoutError(f"The guest did not end within {timeout:g} s; give it more with --timeout.")
    runner.stop()
    return status, tracker.collect(final=True) if tracker is not None else DirtyPages()


def _dirty_document(tracker: Tracker | None, pages: DirtyPages) -> dict[str, Any] | None:
    if tracker is None:
        return None
    runs = [
        {"slot": slot, "first_gfn": first, "pages": count}
        for slot in pages.slots
        for first, count in pages.runs(slot)
    ]
    return {"tracker": tracker.name, "pages": len(pages), "runs": runs}


@click.command("run", short_help="Run an image file as a guest.")
@click.argument("image", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--format",
    "format_",
    type=click.Choice(FORMATS),
    default="auto",
    show_default=True,
    help="Image format; auto tells multiboot and ELF, and takes anything else as flat.",
)
@click.option(
    "--load-address",
    type=number_type(0, 2**52 - 1),
    default="0x8000",
    show_default=True,
    help="Where a flat image goes, guest-physical.",
)
@click.option("--entry", type=number_type(), help="Where a flat image starts; by default at its beginning.")
@click.option(
    "--mode",
    type=click.Choice(list(MODES)),
    help="CPU mode of a flat or ELF image; by default real, protected32 or long.",
)
@click.option(
    "--cpl",
    type=click.Choice(["0", "3"]),
    default="0",
    show_default=True,
    help="Privilege level that a flat or ELF image starts at.",
)
@click.option(
    "--memory",
    type=size_type(minimum=1 << 20, multiple=PAGE_SIZE),
    default="32M",
    show_default=True,
    help="Guest memory, a multiple of 4K from 1M to 3G.",
)
@click.option(
    "--vcpus",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Number of vCPUs; register RDI of a flat or ELF image tells each its number.",
)
@click.option(
    "--log",
    "log",
    type=click.Choice(["none", *TRACKERS, *HOST_TRACKERS]),
    default="none",
    show_default=True,
    help="Log dirty pages this way, and tell at the end what the guest wrote.",
)
@click.option(
    "--ring-entries",
    type=number_type(1, 1 << 20),
    default="4096",
    show_default=True,
    help="With --log ring: entries of each vCPU's ring, a power of two.",
)
@click.option(
    "--serial",
    type=click.Choice([f"com{n}" for n in COM_PORTS]),
    default="com1",
    show_default=True,
    help="The port whose 16550 writes to the terminal.",
)
@click.option(
    "--post-port",
    type=number_type(0, 0xFFFF),
    default="0x80",
    show_default=True,
    help="The port whose writes are recorded as POST codes.",
)
@click.option("--append", "cmdline", default="", help="Command line of a multiboot kernel.")
@click.option(
    "--module",
    "modules",
    type=click.Path(dir_okay=False, path_type=Path),
    multiple=True,
    help="A file to load as a multiboot module; may be repeated.",
)
@click.option(
    "--irqchip",
    is_flag=True,
    help="Interrupt controllers in the kernel, as a kernel with several vCPUs needs; HLT then waits there.",
)
@click.option(
    "--trace-exits",
    is_flag=True,
    help="Print every exit of the guest, and list the ports and addresses that nobody answers.",
)
@click.option(
    "--timeout", type=duration_type(minimum=0.001), help="Give up after this long, with status 124."
)
@profile_option
@common_options
def command(
    session: Session,
    image: Path,
    format_: str,
    load_address: int,
    entry: int | None,
    mode: str | None,
    cpl: str,
    memory: int,
    vcpus: int,
    log: str,
    ring_entries: int,
    serial: str,
    post_port: int,
    cmdline: str,
    modules: tuple[Path, ...],
    irqchip: bool,
    trace_exits: bool,
    timeout: float | None,
    host: Profile | None,
) -> None:
    """Run the guest in the file IMAGE; its serial line and port 0xe9 go to the terminal.

    The guest ends the run by writing V to port 0xf4, and the exit status is then V*2+1. It is 0 if all
    vCPUs halt.
    """
    parsed: Image = load_image(
        read_file(image), format_, address=load_address, entry=entry, mode=MODES[mode] if mode else None
    )
    extras = BootExtras(
        cmdline=f"{image} {cmdline}".rstrip(), modules=[(read_file(path), str(path)) for path in modules]
    )
    tracker = None if log == "none" else make_tracker(log, ring_entries=ring_entries)

    def prepare(machine: Machine) -> None:
        if irqchip:
            if not isinstance(machine, KvmVm):
                raise CapabilityError(
                    "The reference machine has no interrupt controllers; do without --irqchip."
                )
            machine.create_irqchip()
        if tracker is not None:
            tracker.prepare(machine)

    board = Board(session, serial, post_port, memory, trace=trace_exits)
    session.document |= {"image": str(image), "format": parsed.format, "mode": parsed.mode.value}
    with open_machines(session, host) as system:
        session.tell_choice(system)
        with launch(
            system,
            parsed,
            board.bus,
            memory=memory,
            vcpus=vcpus,
            cpl=int(cpl),
            extras=extras,
            irqchip=irqchip,
            prepare=prepare,
        ) as guest:
            session.document["backend"] = guest.machine.backend
            if trace_exits:
                guest.runner.trace = board.trace
            begin = time.monotonic()
            try:
                status, pages = _run(guest, tracker, timeout)
            finally:
                seconds = time.monotonic() - begin
                session.document |= {"seconds": seconds} | board.document()
    session.document |= {"status": status, "dirty": _dirty_document(tracker, pages)}
    _tell(session, board, tracker, pages, seconds)
    click.get_current_context().exit(status)


def _tell(session: Session, board: Board, tracker: Tracker | None, pages: DirtyPages, seconds: float) -> None:
    """What is worth a line after the guest's own output."""
    if tracker is not None:
        total = f"{plural(len(pages), 'page')} written in {seconds_text(seconds)} (by {tracker.name})"
        session.note(total + (":" if pages else ""))
        for slot in pages.slots:
            for first, count in pages.runs(slot):
                session.note(f"  slot {slot}: gfn {first:#x}, {plural(count, 'page')}")
    for what, count in sorted(board.bus.unknown.items()):
        session.note(f"nobody answered: {what} ({plural(count, 'time')})")
    if board.exits:
        counts = ", ".join(f"{name} {count}" for name, count in board.exits.most_common())
        session.note(f"exits: {counts}")
