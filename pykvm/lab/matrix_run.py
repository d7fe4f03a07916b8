"""Cells side by side: a few processes at a time, each with one lab, watched until all are done."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pykvm.lab.matrix import Task
from pykvm.lab.results import Case, GarbledResult, case_from_json
from pykvm.lab.tether import tethered

_GRACE = 20.0  # seconds that a cell has to end its lab when it is told to stop
_CHUNK = 1 << 16
_KEPT = 4096


class Watcher(Protocol):
    """Who wants to see the cells."""

    def started(self, task: Task) -> None:
        """A cell begins."""

    def note(self, task: Task, text: str) -> None:
        """A line about a cell."""

    def case(self, task: Task, case: Case, done: int, collected: int) -> None:
        """A test of a cell ended."""

    def ended(self, task: Task, error: str) -> None:
        """A cell was saved, or ended with this sentence and without a result."""


@dataclass
class _Child:
    """A cell's process; ``errors`` is the end of its standard error."""

    task: Task
    process: subprocess.Popen[bytes]
    line: bytearray = field(default_factory=bytearray)
    errors: bytearray = field(default_factory=bytearray)
    error: str = ""
    open: int = 2


Command = Callable[[Task], Sequence[str]]


def cell_command(order: Callable[[Task], dict[str, str]]) -> Command:
    """The command for a cell: tethered, so that it ends with this process, however this one ends."""
    # With -P the folder that this was started in is no place for modules, as it is for the console script: a
    # lab packs what is installed, and an .egg-info that lies in a checkout would be taken for that.
    python = (sys.executable, "-P", "-m")

    def command(task: Task) -> Sequence[str]:
        return tethered((*python, "pykvm.lab.cell", json.dumps(order(task))))

    return command


def run_tasks(tasks: Sequence[Task], command: Command, jobs: int, watcher: Watcher) -> dict[str, str]:
    """Run all, ``jobs`` at a time, in order.  The cells without a result, as ``6.1 amd-npt``, and why.

    Whatever is raised meanwhile (Ctrl-C, too), the cells that run are stopped and their labs gone when it
    leaves.
    """
    return _Pool(command, watcher).run(list(tasks), jobs)


class _Pool:
    def __init__(self, command: Command, watcher: Watcher) -> None:
        self._command = command
        self._watcher = watcher
        self._children: list[_Child] = []
        self._failed: dict[str, str] = {}

    def run(self, waiting: list[Task], jobs: int) -> dict[str, str]:
        with selectors.DefaultSelector() as selector:
            try:
                while waiting or self._children:
                    while waiting and len(self._children) < jobs:
                        self._start(waiting.pop(0), selector)
                    for key, _ in selector.select():
                        self._read(key, selector)
            finally:
                self._stop()
        return self._failed

    def _start(self, task: Task, selector: selectors.BaseSelector) -> None:
        self._watcher.started(task)
        process = subprocess.Popen(
            self._command(task),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is ours to answer
        )
        child = _Child(task, process)
        self._children.append(child)
        assert process.stdout is not None
        assert process.stderr is not None
        selector.register(process.stdout, selectors.EVENT_READ, (child, False))
        selector.register(process.stderr, selectors.EVENT_READ, (child, True))

    def _read(self, key: selectors.SelectorKey, selector: selectors.BaseSelector) -> None:
        child, is_error = key.data
        data = os.read(key.fd, _CHUNK)
        if not data:
            selector.unregister(key.fileobj)
            child.open -= 1
            if not child.open:
                self._end(child)
        elif is_error:
            child.errors += data
            del child.errors[:-_KEPT]
        else:
            *lines, rest = bytes(child.line + data).split(b"\n")
            child.line = bytearray(rest)
            for line in lines:
                self._take(child, line)

    def _take(self, child: _Child, line: bytes) -> None:
        try:
            said = json.loads(line)
            if "case" in said:
                case = case_from_json(said["case"])
                self._watcher.case(child.task, case, int(said["done"]), int(said["collected"]))
            elif "error" in said:
                child.error = str(said["error"])
            elif "note" in said:
                self._watcher.note(child.task, str(said["note"]))
        except (GarbledResult, ValueError, KeyError, TypeError):
            self._watcher.note(child.task, f"A line is garbled: {line[:200]!r}")

    def _end(self, child: _Child) -> None:
        status = child.process.wait()
        self._close(child)
        self._children.remove(child)
        if status and not child.error:
            lines = bytes(child.errors).decode(errors="replace").strip().splitlines()
            said = f": {lines[-1].strip()}" if lines else ""
            child.error = f"The process of the cell ended with status {status}{said}"
        if child.error:
            self._failed[f"{child.task.kernel.series} {child.task.kind.name}"] = child.error
        self._watcher.ended(child.task, child.error)

    def _stop(self) -> None:
        """End every cell that still runs, first by asking."""
        for child in self._children:
            child.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + _GRACE
        for child in self._children:
            try:
                child.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            self._close(child)
        self._children.clear()

    @staticmethod
    def _close(child: _Child) -> None:
        for stream in (child.process.stdout, child.process.stderr):
            if stream is not None:
                stream.close()
