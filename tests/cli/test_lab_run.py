"""``pykvm lab run`` with a lab that boots nothing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pykvm.cli import lab_run
from pykvm.errors import LabDiedError, LabTimeoutError
from pykvm.lab import kernels
from pykvm.lab import session as lab_session
from pykvm.lab.session import RunResult, RunSpec, Sinks
from tests.cli.runner import invoke
from tests.lab.fake_lab import KERNEL

Play = Callable[[RunSpec, Sinks], int]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Play], list[RunSpec]]:
    """Takes what the lab is to do; returns the runs that it was asked for."""
    monkeypatch.setenv("PYKVM_LAB_CACHE", str(tmp_path / "cache"))

    def prepare(body: Play) -> list[RunSpec]:
        asked: list[RunSpec] = []

        def run(cache: Any, emulator: Any, spec: RunSpec, sinks: Sinks) -> RunResult:
            asked.append(spec)
            return RunResult(body(spec, sinks), "QEMU 10.0, TCG", "qemu-tcg", KERNEL.release, 4.25, 1.5)

        monkeypatch.setattr(lab_run, "choose", lambda *arguments: SimpleNamespace())
        monkeypatch.setattr(kernels, "provide", lambda *arguments: KERNEL)
        monkeypatch.setattr(lab_session, "run", run)
        return asked

    return prepare


def test_the_status_is_the_commands_and_the_last_line_says_what_it_ran_on(
    capfd: pytest.CaptureFixture[str], play: Callable[[Play], list[RunSpec]]
) -> None:
    def body(spec: RunSpec, sinks: Sinks) -> int:
        sinks.stdout(b"one [red] two\n")
        sinks.stderr(b"three\n")
        return 41

    asked = play(body)
    done = invoke(capfd, "lab", "run", "--kernel", "6.1", "--timeout", "90s", "--", "pykvm", "--json")
    assert (done.status, done.out) == (41, "one [red] two\n")
    assert done.err.splitlines() == [
        "three",
        "lab: amd-npt, Linux 6.1.0-43-cloud-amd64, QEMU 10.0, TCG: command started after 4.2 s, ran 1.5 s, "
        "exit status 41",
    ]
    assert asked[0].command == ("pykvm", "--json")
    assert asked[0].timeout == 90.0


def test_output_is_bytes_whatever_they_are(
    capfdbinary: pytest.CaptureFixture[bytes], play: Callable[[Play], list[RunSpec]]
) -> None:
    everything = bytes(range(256))

    def body(spec: RunSpec, sinks: Sinks) -> int:
        sinks.stdout(everything)
        return 0

    play(body)
    lab_main = lab_run.command.main
    with pytest.raises(SystemExit):
        lab_main(["--", "true"], obj=lab_run.Session())
    assert capfdbinary.readouterr().out == everything


@pytest.mark.parametrize(("error", "status"), [(LabTimeoutError("Late."), 123), (LabDiedError("Dead."), 125)])
def test_a_lab_that_fails_has_a_status_of_its_own(
    capfd: pytest.CaptureFixture[str],
    play: Callable[[Play], list[RunSpec]],
    error: Exception,
    status: int,
) -> None:
    def body(spec: RunSpec, sinks: Sinks) -> int:
        raise error

    play(body)
    done = invoke(capfd, "lab", "run", "--", "true")
    assert (done.status, done.err) == (status, f"pykvm: {error}\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_lab_clean_up(
    capfd: pytest.CaptureFixture[str], play: Callable[[Play], list[RunSpec]], number: signal.Signals
) -> None:
    cleaned = []

    def body(spec: RunSpec, sinks: Sinks) -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            cleaned.append(number)
        return 0

    play(body)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught:
        invoke(capfd, "lab", "run", "--", "true")
    assert (caught.value.code, cleaned) == (128 + number, [number])
    assert signal.getsignal(number) is before


def test_nohup_is_respected(capfd: pytest.CaptureFixture[str], play: Callable[[Play], list[RunSpec]]) -> None:
    def body(spec: RunSpec, sinks: Sinks) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 7

    play(body)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert invoke(capfd, "lab", "run", "--", "true").status == 7
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kernel", "../x", "--", "true"],
        ["--kvm", "arm", "--", "true"],
        ["--timeout", "0", "--", "true"],
        ["--memory", "100", "--", "true"],
        ["--put", "/nonexistent", "--", "true"],
        ["--"],
    ],
)
def test_mistakes_cost_no_download(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(lab_run, "choose", lambda *arguments: pytest.fail("prepares an emulator"))
    done = invoke(capfd, "lab", "run", *arguments)
    assert (done.status, done.err.count("\n")) == (2, 1), done.err
