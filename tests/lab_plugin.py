"""Results that survive a guest that dies: a pytest plugin for runs inside a lab.

``python -m pytest -p tests.lab_plugin`` writes one JSON line per event to the file descriptor that
``PYKVM_LAB_RECORDS`` names, at once and without a buffer:

    {"event": "facts", "facts": {…}}         what 'pykvm info --json' says of this host, if PYKVM_LAB_FACTS=1
    {"event": "collected", "nodeid": …}      a file; collecting takes long there, and silence looks like death
    {"event": "session", "kernel": …, "collected": N}
    {"event": "start", "nodeid": …}          a test begins; without a result it is the one that killed the lab
    {"event": "result", "nodeid": …, "outcome": …, "seconds": …, "reason": …, "text": …, "kvm": …, "bug": …}
    {"event": "broken", "nodeid": …, "text": …}   a file that could not be collected
    {"event": "end", "status": N}            pytest came to its end

Tests whose node ids stand in the file that ``PYKVM_LAB_LEAVE_OUT`` names are deselected: an earlier boot ran
them. A test that takes longer than ``PYKVM_LAB_TEST_TIMEOUT`` seconds ends the process, with all stacks on
standard error; the limits that tests have elsewhere do not count, since they were chosen for real processors.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

LONGEST_TEXT = 24_000
"""Characters of a failure's text: its beginning and its end are kept, since both say most."""

FACTS_NODEID = "pykvm info"
"""Stands for the look at the host, which can kill it like any test."""


def shortened(text: str, longest: int = LONGEST_TEXT) -> str:
    """``text`` with its middle left out where it is too long."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters left out …]\n{text[-half:]}"


def first_line(report: pytest.TestReport) -> str:
    """The line that says why a test failed."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else report.longreprtext
    return next((line.strip() for line in str(text).splitlines() if line.strip()), "")


def skip_reason(report: pytest.TestReport) -> str:
    """Why a test was skipped."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return first_line(report)


class Verdict:
    """What becomes of one test as the reports of its setup, call and teardown come in."""

    def __init__(self) -> None:
        self.outcome = "passed"
        self.reason = ""
        self.text = ""
        self.seconds = 0.0
        self.kvm = False

    def add(self, report: pytest.TestReport) -> None:
        """A failure in any phase counts; a skip or an expected failure replaces a pass."""
        self.seconds += report.duration
        self.kvm = self.kvm or any(name == "kvm" for name, _ in report.user_properties)
        expected = getattr(report, "wasxfail", None)
        if report.failed:
            where = "" if report.when == "call" else f"in {report.when}: "
            sections = "".join(f"\n--- {title} ---\n{text}" for title, text in report.sections)
            self._set("failed", where + first_line(report), report.longreprtext + sections)
        elif self.outcome == "failed":
            return
        elif expected is not None:
            reason = expected.removeprefix("reason: ")
            self._set("xfailed" if report.skipped else "xpassed", reason, "")
        elif report.skipped:
            self._set("skipped", skip_reason(report), "")

    def _set(self, outcome: str, reason: str, text: str) -> None:
        self.outcome, self.reason, self.text = outcome, reason, shortened(text)


class Recorder:
    """The plugin: a verdict for each test, a line for each event."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._limit = float(os.environ.get("PYKVM_LAB_TEST_TIMEOUT", "0"))
        self._limits: dict[str, float] = {}
        self._stderr = os.dup(2)  # pytest puts a file in place of 2 while a test runs
        self._verdicts: dict[str, Verdict] = {}
        self._bugs: dict[str, str] = {}

    def write(self, event: str, **members: Any) -> None:
        """One line; a lab whose other end is gone needs no records any more."""
        line = json.dumps({"event": event, **members}).encode() + b"\n"
        while line:
            try:
                line = line[os.write(self._descriptor, line) :]
            except OSError:
                return

    def facts(self) -> None:
        """What this host offers, by the command that tells everybody."""
        self.write("start", nodeid=FACTS_NODEID)
        command = [sys.executable, "-m", "pykvm", "info", "--json"]
        self._watch(FACTS_NODEID)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        self._watch(None)
        try:
            facts = json.loads(done.stdout)
        except ValueError:
            facts = {"error": shortened(done.stderr or done.stdout, 2000)}
        self.write("facts", facts=facts)

    def _watch(self, nodeid: str | None) -> None:
        """End the process if this test takes too long; None: nothing runs."""
        faulthandler.cancel_dump_traceback_later()
        limit = self._limits.get(nodeid, self._limit) if nodeid is not None else 0
        if limit:
            faulthandler.dump_traceback_later(limit, exit=True, file=self._stderr)

    def pytest_sessionstart(self) -> None:
        if os.environ.get("PYKVM_LAB_FACTS") == "1":
            self.facts()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what an earlier boot has done; runs after -m and -k."""
        path = os.environ.get("PYKVM_LAB_LEAVE_OUT")
        if path:
            done = set(Path(path).read_text(encoding="utf-8").splitlines())
            config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
            items[:] = [item for item in items if item.nodeid not in done]
        slug = os.environ.get("PYKVM_LAB_EMULATOR", "")
        for item in items:
            own = item.get_closest_marker("timeout")
            if own is not None and own.args and self._limit:
                self._limits[item.nodeid] = max(self._limit, float(own.args[0]))
            item.add_marker(pytest.mark.timeout(0), append=False)  # the recorder watches by itself
            for mark in item.iter_markers("emulator_bug"):
                if mark.args[:1] == (slug,):
                    self._bugs[item.nodeid] = str(mark.args[1])

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.write("session", kernel=platform.release(), collected=len(session.items))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write("broken", nodeid=report.nodeid, text=shortened(report.longreprtext))
        elif report.nodeid.endswith(".py"):
            self.write("collected", nodeid=report.nodeid)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._verdicts[nodeid] = Verdict()
        self.write("start", nodeid=nodeid)
        self._watch(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self._verdicts:
            self._verdicts[report.nodeid].add(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._watch(None)
        verdict = self._verdicts.pop(nodeid, None)
        if verdict is not None:
            self.write(
                "result",
                nodeid=nodeid,
                outcome=verdict.outcome,
                seconds=round(verdict.seconds, 4),
                reason=verdict.reason,
                text=verdict.text,
                kvm=verdict.kvm,
                # A bug of the emulator explains only what was expected to fail because of it.
                bug=self._bugs.get(nodeid, "") if verdict.outcome == "xfailed" else "",
            )

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> Generator[None, None, None]:
        yield
        self.write("end", status=int(exitstatus))


def pytest_configure(config: pytest.Config) -> None:
    descriptor = os.environ.get("PYKVM_LAB_RECORDS", "")
    if descriptor.isdigit() and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(int(descriptor)), "pykvm-lab-recorder")
