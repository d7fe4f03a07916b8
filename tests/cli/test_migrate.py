"""``pykvm migrate`` on real KVM: both sides at once, two terminals, sabotage, and killed sides."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.runner import Result, command_line, environment, execute, invoke
from tests.patience import patient

pytestmark = pytest.mark.kvm

Capture = pytest.CaptureFixture[str]
SMALL = ("--memory", "8M", "--warm-up", "100ms")
QUICK = (*SMALL, "--check-seconds", "100ms")
SLOW = ("--memory", "4M", "--bandwidth", "1500K", "--max-rounds", "1")


class Process:
    """A command in the background; killed at the end of the test."""

    def __init__(self, *arguments: str) -> None:
        self.popen = subprocess.Popen(
            command_line(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def await_line(self, start: str) -> str:
        """The rest of the next line on standard error that starts so."""
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            if line.startswith(start):
                return line.removeprefix(start).strip()
        raise AssertionError(f"no line '{start}…'; status {self.popen.wait()}")

    def end(self) -> Result:
        out, err = self.popen.communicate(timeout=patient(60))
        return Result(self.popen.returncode, out, err)

    def kill(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.communicate()


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        process.kill()


def receiver(processes: list[Process], *options: str) -> tuple[Process, str]:
    """A listening receiver and its address."""
    process = Process("migrate", "receive", "--accept-timeout", "30s", "--check-seconds", "100ms", *options)
    processes.append(process)
    return process, process.await_line("listening at ")


@pytest.mark.parametrize("tracker", ["bitmap", "manual", "ring"])
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_a_guest_moves_and_the_proof_holds(capfd: Capture, tracker: str, transport: str) -> None:
    result = invoke(capfd, "migrate", *QUICK, "--tracker", tracker, "--transport", transport, "--json")
    assert result.status == 0, result.err
    document = result.document
    assert document["verified"] is True
    assert document["digest_source"] == document["digest_destination"] == document["destination"]["digest"]
    assert document["pages_total"] == 2048
    assert document["guest_checks"] > 0
    assert document["guest_corruptions"] == 0
    assert [item["final"] for item in document["rounds"]][-1] is True


def test_the_table_says_verified(capfd: Capture) -> None:
    result = invoke(capfd, "migrate", *QUICK)
    assert result.status == 0, result.err
    assert "verified" in result.out
    assert "final" in result.out


def test_several_vcpus_move(capfd: Capture) -> None:
    result = invoke(
        capfd, "migrate", *QUICK, "--workload", "smp", "--vcpus", "2", "--tracker", "ring", "--json"
    )
    assert result.document["verified"] is True, result.err


@pytest.mark.parametrize("tracker", ["bitmap", "ring"])
def test_a_lost_page_is_found_and_named(capfd: Capture, tmp_path: Path, tracker: str) -> None:
    page = tmp_path / "report.html"
    arguments = (
        "migrate",
        *QUICK,
        "--tracker",
        tracker,
        "--sabotage",
        "lost-page",
        "--report",
        str(page),
        "--json",
    )
    result = invoke(capfd, *arguments)
    assert result.status == 10
    document = result.document
    assert document["verified"] is False
    (wrong,) = document["wrong_pages"]
    assert f"gfn {wrong:#x}" in document["error"]
    assert document["guest_at_source"]["running"] is True
    assert document["guest_at_source"]["checks"] > 0
    assert document["guest_at_source"]["corruptions"] == 0
    text = page.read_text()
    assert "✗ failed" in text
    assert f"page {wrong:#x} differs" in text


def test_the_report_has_the_rounds(capfd: Capture, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = invoke(capfd, "migrate", *QUICK, "--report", str(page), "--json")
    assert result.document["report"] == str(page)
    text = page.read_text()
    assert "✓ verified" in text
    for item in result.document["rounds"]:
        assert f"{item['pages'] + item['zero_pages']:,}" in text


def test_two_terminals(processes: list[Process]) -> None:
    there, address = receiver(processes, "--json")
    sent = execute("migrate", "send", "--address", address, *SMALL, "--json")
    received = there.end()
    assert (sent.status, received.status) == (0, 0), sent.err + received.err
    assert sent.document["digest_source"] == received.document["digest"]
    assert received.document["guest_checks"] == sent.document["guest_checks"] > 0


def test_keep_running_goes_on_until_ctrl_c(processes: list[Process]) -> None:
    there, address = receiver(processes, "--keep-running", "--json")
    assert execute("migrate", "send", "--address", address, *SMALL).status == 0
    there.await_line("The guest runs on")
    time.sleep(0.2)
    there.popen.send_signal(signal.SIGINT)
    received = there.end()
    assert received.status == 0, received.err
    assert received.document["guest_corruptions"] == 0


def test_nobody_listens(capfd: Capture, tmp_path: Path) -> None:
    result = invoke(capfd, "migrate", "send", "--address", f"unix:{tmp_path}/none", *SMALL, "--json")
    assert result.status == 8
    assert result.document["guest_at_source"]["running"] is True
    assert "listening?" in result.document["error"]


def test_a_guest_that_is_too_large_is_refused(processes: list[Process]) -> None:
    there, address = receiver(processes, "--max-memory", "4M")
    sent = execute("migrate", "send", "--address", address, *SMALL, "--json")
    assert sent.status == 8
    assert "at most 4 MiB" in sent.document["error"]
    assert sent.document["guest_at_source"]["running"] is True
    assert there.end().status == 8


def test_a_killed_receiver_leaves_the_guest_where_it_was_and_a_second_attempt_succeeds(
    processes: list[Process],
) -> None:
    there, address = receiver(processes)
    source = Process("migrate", "send", "--address", address, *SMALL, *SLOW, "--attempts", "100", "--json")
    processes.append(source)
    source.await_line("connecting")
    time.sleep(0.4)  # 4 MiB at 1.5 MiB/s take much longer
    there.kill()
    source.await_line("attempt 1 failed")
    receiver(processes, "--address", address)
    sent = source.end()
    assert sent.status == 0, sent.err
    assert sent.document["attempts"] > 1
    assert sent.document["verified"] is True
    assert sent.document["guest_corruptions"] == 0


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def is_alive(pid: int) -> bool:
    """Running, not merely unreaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def one_child(process: Process) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = children(process.popen.pid)
        if found:
            return found[0]
        time.sleep(0.02)
    raise AssertionError("no child")


def test_a_killed_child_is_a_failed_migration(processes: list[Process]) -> None:
    source = Process("migrate", *SMALL, *SLOW, "--json")
    processes.append(source)
    child = one_child(source)
    source.await_line("connecting")
    time.sleep(0.4)
    os.kill(child, signal.SIGKILL)
    result = source.end()
    assert result.status == 8, result.err
    assert result.document["guest_at_source"] | {"checks": 0} == {
        "running": True,
        "checks": 0,
        "corruptions": 0,
    }
    assert not is_alive(child)


def test_after_a_killed_child_a_second_attempt_succeeds(processes: list[Process]) -> None:
    source = Process("migrate", *SMALL, *SLOW, "--check-seconds", "100ms", "--attempts", "2", "--json")
    processes.append(source)
    child = one_child(source)
    source.await_line("connecting")
    time.sleep(0.4)
    os.kill(child, signal.SIGKILL)
    result = source.end()
    assert result.status == 0, result.err
    assert result.document["attempts"] == 2
    assert result.document["verified"] is True
    assert result.document["guest_corruptions"] == 0


def test_a_killed_source_takes_the_child_with_it(processes: list[Process]) -> None:
    source = Process("migrate", *SMALL, *SLOW, "--json")
    processes.append(source)
    child = one_child(source)
    source.await_line("connecting")
    source.kill()
    deadline = time.monotonic() + 20
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)


@pytest.mark.parametrize("hanging", [False, True])
def test_ctrl_c_leaves_no_process(processes: list[Process], hanging: bool) -> None:
    source = Process("migrate", *SMALL, *SLOW, "--json")
    processes.append(source)
    child = one_child(source)
    source.await_line("connecting")
    if hanging:
        os.kill(child, signal.SIGSTOP)
    source.popen.send_signal(signal.SIGINT)
    result = source.end()
    assert result.status == 130, result.err
    assert result.document["error"] == "Interrupted."
    assert not is_alive(child)
