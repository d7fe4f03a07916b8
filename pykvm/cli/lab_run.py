"""``pykvm lab run``: one command in one lab."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import click

from pykvm.cli.lab_options import accel_option, kind_option
from pykvm.cli.parameters import duration_type
from pykvm.cli.session import Session, debug_option
from pykvm.lab import kernels, session
from pykvm.lab.cache import Cache
from pykvm.lab.emulators import Accel, choose
from pykvm.lab.kinds import kind


@click.command(name="run", context_settings={"ignore_unknown_options": False})
@kind_option
@click.option(
    "--kernel",
    default=kernels.DEFAULT_SERIES,
    show_default=True,
    help="Kernel series (6.12) or release (6.1.0-56-cloud-amd64).",
)
@click.option(
    "--timeout",
    type=duration_type(minimum=1),
    default="10m",
    show_default=True,
    help="Time for the command, not counting the boot.",
)
@click.option(
    "--put",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="File or folder to lie in the command's working folder; may be repeated.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for what the command leaves in $PYKVM_LAB_OUT.",
)
@click.option(
    "--cd", "directory", metavar="DIR", help="Folder of the lab to start in.  [default: where --put lands]"
)
@click.option(
    "--memory", type=click.IntRange(512, 1 << 20), help="RAM of the lab in MiB.  [default: the emulator's]"
)
@click.option(
    "--console",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the kernel's console log; without it, it is kept on failure only.",
)
@accel_option
@click.argument("arguments", nargs=-1, required=True, metavar="-- COMMAND...")
@debug_option
def command(
    session_: Session,
    kind_name: str,
    kernel: str,
    timeout: float,
    put: tuple[Path, ...],
    out: Path | None,
    directory: str | None,
    memory: int | None,
    console: Path | None,
    accel: Accel,
    arguments: tuple[str, ...],
) -> None:
    """Boot a lab and run COMMAND in it, with this Python environment and /dev/kvm.

    Output is passed on as it comes, and the exit status is the command's. 123 means that it took longer
    than --timeout, 125 that the lab died. What is not prepared yet is fetched first; after that no network
    is needed.

        pykvm lab run --kernel 6.1 --kvm amd-npt -- pykvm info
    """
    kernels.check(kernel)
    cache = Cache()
    chosen = kind(kind_name)
    emulator = choose(cache, chosen, accel, session_.note)
    prepared = kernels.provide(cache, kernel, session_.note)
    spec = session.RunSpec(
        kernel=prepared,
        kind=chosen,
        command=arguments,
        timeout=timeout,
        put=put,
        out=out,
        directory=directory,
        memory=memory,
        console=console,
        environment={"COLUMNS": str(shutil.get_terminal_size((120, 40)).columns)},
    )
    result = session.run(cache, emulator, spec, session.Sinks(_writer(1), _writer(2), note=session_.note))
    session_.note(
        f"lab: {chosen.name}, Linux {result.release}, {result.emulator}: command started after "
        f"{result.boot_seconds:.1f} s, ran {result.seconds:.1f} s, exit status {result.status}"
    )
    click.get_current_context().exit(result.status)


def _writer(descriptor: int) -> session.Sink:
    stream = (sys.stdout if descriptor == 1 else sys.stderr).buffer

    def write(data: bytes) -> None:
        stream.write(data)
        stream.flush()

    return write
