"""Where a command's output goes: the one JSON object, text for people, and progress.

Without ``--json`` results go to standard output and progress to standard error.  With it standard output
carries exactly one JSON object and everything else goes to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console

from pykvm.machine import System
from pykvm.report.document import encode

_PLAIN_WIDTH = 120


class _PipedConsole(Console):
    """A console that leaves it to ``main`` what a reader that went away means."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console(*, stderr: bool) -> Console:
    """A console that does not squeeze tables into 80 columns when nobody's terminal is that narrow."""
    console = _PipedConsole(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    return console


class Session:
    """One run of the command line.  A command fills ``document``; ``main`` prints it at the end."""

    def __init__(self) -> None:
        self.json = False
        self.debug = False
        self.backend = "auto"
        self.document: dict[str, Any] = {}

    @property
    def out(self) -> Console:
        """For results."""
        return _console(stderr=self.json)

    @property
    def progress(self) -> Console:
        """For what is only interesting while it happens."""
        return _console(stderr=True)

    def note(self, text: str) -> None:
        """One line of progress, free of markup."""
        self.progress.print(text, markup=False, soft_wrap=True)

    def tell_choice(self, system: System) -> None:
        """Say so where ``auto`` had to take the model, which is slower by orders of magnitude."""
        if self.backend == "auto" and system.backend == "model":
            self.note(system.description)

    def print_document(self) -> None:
        """The JSON object, on standard output, if it was asked for."""
        if self.json:
            sys.stdout.write(encode(self.document))
            sys.stdout.flush()


def _set(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value:  # a flag that a group was given holds for its subcommand, too
            setattr(ctx.find_object(Session), name, value)

    return callback


def debug_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--debug alone.  The command gets the Session as its first argument."""
    command = click.pass_obj(command)
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_set("debug"),
        help="Show the traceback of an unexpected error.",
    )(command)


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--debug and --json, for commands that create no machine; the Session is the first argument."""
    return click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        callback=_set("json"),
        is_eager=True,
        help="Print one JSON object on standard output; everything else goes to standard error.",
    )(debug_option(command))


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that creates a machine; the Session is the first argument."""
    return click.option(
        "--backend",
        type=click.Choice(["auto", "kvm", "model"]),
        default="auto",
        show_default=True,
        expose_value=False,
        callback=_set("backend"),
        help="The machine to use: real KVM, the reference model, or KVM where it works.",
    )(output_options(command))


def requested(option: str, arguments: list[str]) -> bool:
    """Whether a flag is among the options: known before they are parsed, since parsing can fail."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return option in options
