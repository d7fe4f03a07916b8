"""How commands fail: one sentence, a status, no traceback, and clean JSON."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pykvm.backends import open_system
from pykvm.cli import host_profile, main
from pykvm.errors import DeviceMissingError, DevicePermissionError
from pykvm.guest import catalog
from tests.cli.runner import command_line, environment, execute, invoke
from tests.patience import patient

Capture = pytest.CaptureFixture[str]

MISTAKES = {
    "an unknown command": (["nosuch"], "No such command 'nosuch'"),
    "an unknown option": (["info", "--nosuch"], "No such option"),
    "a missing argument": (["run"], "Missing argument 'IMAGE'"),
    "a size": (["dirty", "hotspot", "--memory", "12Q"], "'12Q' is not a size"),
    "a memory that is no multiple": (
        ["dirty", "hotspot", "--memory", "3M"],
        "not a multiple of 2097152 bytes",
    ),
    "a duration": (["dirty", "hotspot", "--seconds", "soon"], "'soon' is not a duration"),
    "a rate": (["migrate", "--bandwidth", "fast"], "'fast' is not a size"),
    "a choice": (["migrate", "--tracker", "magic"], "'magic' is not one of"),
    "a ring size": (["dirty", "hotspot", "--tracker", "ring", "--ring-entries", "1000"], "power of two"),
    "an unknown workload": (["dirty", "nosuch"], "no workload 'nosuch'"),
    "an unknown guest": (["guests", "show", "nosuch"], "no guest 'nosuch'"),
    "a file that is not there": (["run", "/nonexistent/image"], "Cannot read /nonexistent/image"),
    "a report that cannot be written": (["migrate", "--report", "/nonexistent/x.html"], "Cannot write"),
    "an address": (["migrate", "send", "--address", "nowhere"], "'nowhere' is no address"),
    "options before a subcommand": (["migrate", "--memory", "4M", "receive"], "Options go behind 'receive'"),
}


@pytest.mark.kvm
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_status_2(capfd: Capture, mistake: str) -> None:
    arguments, sentence = MISTAKES[mistake]
    result = invoke(capfd, *arguments)
    assert result.status == 2
    assert result.out == ""
    assert sentence in result.err
    assert result.err.startswith("pykvm: ")
    assert result.err.count("\n") == 1


@pytest.mark.kvm
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_json_object(capfd: Capture, mistake: str) -> None:
    arguments, sentence = MISTAKES[mistake]
    result = invoke(capfd, *arguments, "--json")
    assert result.status == 2
    assert result.document["exit_status"] == 2
    assert sentence in result.document["error"]


def test_what_the_model_lacks_is_one_sentence(capfd: Capture, tmp_path: Path) -> None:
    image = tmp_path / "halt.bin"
    image.write_bytes(b"\xf4")
    result = invoke(capfd, "run", str(image), "--irqchip", "--backend", "model")
    assert result.status == 5
    assert result.err == "pykvm: The reference machine has no interrupt controllers; do without --irqchip.\n"


def test_auto_takes_the_model_where_kvm_is_unusable_and_says_why(
    capfd: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host_profile, "open_system", lambda backend: open_system(backend, device="/dev/null"))
    image = tmp_path / "halt.bin"
    image.write_bytes(b"\xf4")
    result = invoke(capfd, "run", str(image), "--json")
    assert result.status == 0
    assert result.document["backend"] == "model"
    assert "reference machine" in result.err
    assert "/dev/null is not a KVM device" in result.err


@pytest.mark.parametrize(("error", "status"), [(DeviceMissingError, 3), (DevicePermissionError, 4)])
def test_a_host_without_kvm_has_its_statuses(
    capfd: Capture, monkeypatch: pytest.MonkeyPatch, error: type[Exception], status: int
) -> None:
    def refuse(backend: str) -> None:
        raise error("No KVM here: get one.")

    monkeypatch.setattr(host_profile, "open_system", refuse)
    result = invoke(capfd, "dirty", "hotspot", "--json")
    assert result.status == status
    assert result.document == {"error": "No KVM here: get one.", "exit_status": status}


def test_info_tells_about_the_host_even_without_kvm(capfd: Capture) -> None:
    result = invoke(capfd, "info", "--backend", "model", "--json")
    assert result.status == 0
    assert result.document["kernel"] == os.uname().release
    assert result.document["backend"] == "model"
    assert {mode["execution"] for mode in result.document["modes"]} == {"emulated"}, "every mode runs"
    assert result.document["missing"] == []
    assert result.document["mmu"]["kind"] == "none"


def test_a_bug_is_called_one(capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> tuple[str, ...]:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(catalog, "names", broken)
    result = invoke(capfd, "guests", "list", "--json")
    assert result.status == main.BUG_STATUS
    assert "bug in pykvm" in result.document["error"]
    assert "Traceback" not in result.err
    assert "Traceback" in invoke(capfd, "guests", "list", "--debug").err


def test_debug_behind_two_dashes_is_the_commands_own(capfd: Capture) -> None:
    assert "Traceback" not in invoke(capfd, "lab", "run", "--kernel", "x", "--", "pykvm", "--debug").err
    assert "Traceback" in invoke(capfd, "lab", "run", "--kernel", "x", "--debug", "--", "pykvm").err


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_output_is_no_error(closed: str) -> None:
    command = f"{shlex.join(command_line('guests', 'list'))} {closed}"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, timeout=patient(60), env=environment(), check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_without_arguments_the_help_is_an_error(capfd: Capture) -> None:
    result = invoke(capfd)
    assert result.status == 2
    assert result.out == ""
    assert "Usage: pykvm" in result.err


def test_help_and_version_are_not(capfd: Capture) -> None:
    assert "Usage: pykvm dirty" in invoke(capfd, "dirty", "--help").out
    assert invoke(capfd, "--version").status == 0


def test_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command_line("guests", "list"),
        stdout=writer,
        stderr=subprocess.PIPE,
        env=environment(),
        timeout=patient(30),
        check=False,
    )
    os.close(writer)
    assert done.returncode == main.BROKEN_PIPE_STATUS
    assert done.stderr == b""


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_output_that_cannot_be_written_is_one_sentence(options: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command_line("guests", "list", *options),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            timeout=patient(30),
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "pykvm: Cannot write the output: No space left on device; free some space."
    )
    assert "Traceback" not in done.stderr


@pytest.mark.kvm
def test_ctrl_c_ends_a_running_guest(tmp_path: Path) -> None:
    image = tmp_path / "spin.bin"
    image.write_bytes(b"\xb0\x21\xe6\xe9\xeb\xfe")  # mov al, '!' ; out 0xe9, al ; jmp $
    process = subprocess.Popen(
        command_line("run", str(image)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    try:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"!"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=patient(20))
    finally:
        process.kill()
        process.wait()
    assert process.returncode == main.INTERRUPTED_STATUS
    assert err == b"pykvm: Interrupted.\n"


def test_starting_is_fast_enough_to_be_used_in_scripts() -> None:
    """The commands' modules are imported when they are used, so --version needs none of them."""
    done = subprocess.run(
        [*command_line()[:1], "-X", "importtime", "-m", "pykvm", "--version"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=patient(30),
        check=True,
    )
    assert "pykvm.kvm" not in done.stderr
    assert "capstone" not in done.stderr


def test_the_module_runs_like_the_script() -> None:
    begin = time.monotonic()
    assert execute("guests", "list").status == 0
    assert time.monotonic() - begin < 30


@pytest.mark.kvm
def test_ctrl_c_tells_what_dirty_knows_so_far() -> None:
    process = subprocess.Popen(
        command_line("dirty", "random", "--memory", "8M", "--seconds", "60", "--interval", "20ms", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline()  # the first interval
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=patient(20))
    finally:
        process.kill()
        process.wait()
    document = json.loads(out)
    assert document["exit_status"] == process.returncode == main.INTERRUPTED_STATUS
    assert document["intervals"]
    assert document["guest_corruptions"] == 0
