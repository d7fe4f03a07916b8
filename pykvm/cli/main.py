"""The entry point: find the command, run it, and turn whatever happens into one sentence and a status."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import NoReturn

import click

from pykvm import __version__
from pykvm.cli.lazy import LazyGroup
from pykvm.cli.session import Session, requested
from pykvm.errors import PykvmError

USAGE_STATUS = 2
BUG_STATUS = 70  # EX_SOFTWARE of <sysexits.h>
INTERRUPTED_STATUS = 128 + 2
BROKEN_PIPE_STATUS = 128 + 13
_OUTPUT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@click.command(
    cls=LazyGroup,
    modules={
        "info": "info",
        "overhead": "overhead",
        "guests": "guests",
        "run": "run",
        "dirty": "dirty",
        "migrate": "migrate",
        "crosscheck": "crosscheck",
        "replay": "replay",
        "interleave": "interleave",
        "explain": "explain",
        "lab": "lab",
    },
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="pykvm")
def cli() -> None:
    """Find out whether a KVM host tells the truth about memory.

    pykvm drives /dev/kvm directly: it runs tiny guests under dirty logging, shows what they write, and
    migrates them live from one process to another while both sides prove that no page was lost. All of it
    also runs on a reference machine in pure Python, and both are held against each other.

    Exit statuses and the keys of --json are listed in docs/exit-status.md and docs/json.md.
    """


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _failed(session: Session, message: str, status: int) -> int:
    session.document |= {"error": message, "exit_status": status}
    print(f"pykvm: {message}", file=sys.stderr)
    return status


def _discard_output() -> None:
    """Python flushes standard output once more at exit: let it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status; nothing is raised."""
    session = Session()
    session.json = requested("--json", arguments)
    session.debug = requested("--debug", arguments)
    status = 0
    try:
        try:
            with cli.make_context("pykvm", arguments, obj=session) as context:
                cli.invoke(context)
        except click.exceptions.Exit as done:
            status = done.exit_code
        except click.exceptions.NoArgsIsHelpError as error:
            print(error.ctx.get_help(), file=sys.stderr)
            status = USAGE_STATUS
        except click.ClickException as error:
            where = getattr(error, "ctx", None)
            hint = f" See '{where.command_path} --help'." if where else ""
            status = _failed(session, _sentence(Exception(error.format_message())) + hint, USAGE_STATUS)
        except PykvmError as error:
            if session.debug:
                traceback.print_exc()
            status = _failed(session, _sentence(error), error.exit_status)
        except (KeyboardInterrupt, click.Abort):
            status = _failed(session, "Interrupted.", INTERRUPTED_STATUS)
        if session.document:
            session.print_document()
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()  # whoever read it went away
        status = BROKEN_PIPE_STATUS
    except Exception as error:
        if session.debug:
            traceback.print_exc()
        if isinstance(error, OSError) and error.errno in _OUTPUT_ERRORS:
            _discard_output()
            return _failed(
                session,
                f"Cannot write the output: {error.strerror}; free some space.",
                PykvmError.exit_status,
            )
        status = _failed(
            session,
            f"This is a bug in pykvm ({type(error).__name__}: {_sentence(error)}) "
            "Run again with --debug for the traceback and report it.",
            BUG_STATUS,
        )
        session.print_document()
    return status


def _open_closed() -> None:
    """Started without standard output or error (``>&-``), write to nowhere instead."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def main() -> NoReturn:
    """The console script ``pykvm``."""
    _open_closed()
    sys.exit(run(sys.argv[1:]))
