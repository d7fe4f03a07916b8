"""The program in the guest, run here."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pykvm.lab import agent
from pykvm.lab.channel import Decoder, Frame
from pykvm.lab.init import INIT, boot_file


class Sent:
    """Frames as the agent sent them."""

    def __init__(self) -> None:
        self.frames: list[tuple[Frame, bytes]] = []

    def __call__(self, kind: Frame, payload: bytes) -> None:
        self.frames.append((kind, payload))

    def of(self, kind: Frame) -> bytes:
        return b"".join(payload for one, payload in self.frames if one is kind)


def command(tmp_path: Path, *argv: str, **changes: Any) -> dict[str, Any]:
    return {"argv": list(argv), "directory": str(tmp_path), "environment": {}, **changes}


def test_output_environment_folder_and_status(tmp_path: Path) -> None:
    sent = Sent()
    asked = command(tmp_path, "sh", "-c", "pwd; echo $LAB >&2; exit 9", environment={"LAB": "yes"})
    assert agent.run_command(asked, sent) == 9
    assert sent.of(Frame.STDOUT).decode().strip() == str(tmp_path)
    assert sent.of(Frame.STDERR) == b"yes\n"


def test_records_leave_at_once_line_by_line(tmp_path: Path) -> None:
    sent = Sent()
    script = (
        "import os; f = int(os.environ['PYKVM_LAB_RECORDS']); os.write(f, b'a\\nb'); os.write(f, b'c\\nrest')"
    )
    assert agent.run_command(command(tmp_path, sys.executable, "-c", script), sent) == 0
    assert [payload for kind, payload in sent.frames if kind is Frame.RECORD] == [b"a", b"bc", b"rest"]


@pytest.mark.parametrize(("number", "status"), [(9, 137), (15, 143)])
def test_a_signal_is_told_as_a_shell_tells_it(tmp_path: Path, number: int, status: int) -> None:
    assert agent.run_command(command(tmp_path, "sh", "-c", f"kill -{number} $$"), Sent()) == status


def test_commands_that_cannot_start(tmp_path: Path) -> None:
    sent = Sent()
    assert agent.run_command(command(tmp_path, "no-such-program"), sent) == 127
    assert b"no-such-program" in sent.of(Frame.STDERR)
    plain = tmp_path / "plain"
    plain.write_text("no program")
    assert agent.run_command(command(tmp_path, str(plain)), sent) == 126
    sent = Sent()
    assert agent.run_command(command(tmp_path, "true", directory="/no/such/folder"), sent) == 127
    assert b"cannot start in '/no/such/folder'" in sent.of(Frame.STDERR)


@pytest.mark.parametrize(("name", "told"), [(b"\xff", b"cannot run '\xff'"), (b"", b"cannot run ''")])
def test_a_name_that_is_no_text_is_a_command_that_cannot_start(
    tmp_path: Path, name: bytes, told: bytes
) -> None:
    sent = Sent()
    assert agent.run_command(command(tmp_path, os.fsdecode(name)), sent) in (126, 127)
    assert told in sent.of(Frame.STDERR)


def test_a_child_that_holds_the_pipes_does_not_keep_the_lab_up(tmp_path: Path) -> None:
    sent = Sent()
    assert agent.run_command(command(tmp_path, "sh", "-c", "sleep 60 & echo done"), sent) == 0
    assert sent.of(Frame.STDOUT) == b"done\n"


def test_files_come_as_a_tar(tmp_path: Path) -> None:
    sent = Sent()
    agent.send_files(tmp_path / "nothing", sent)
    (tmp_path / "out" / "deep").mkdir(parents=True)
    agent.send_files(tmp_path / "empty", sent)
    assert sent.frames == []
    (tmp_path / "out" / "deep" / "file").write_bytes(b"contents")
    agent.send_files(tmp_path / "out", sent)
    with tarfile.open(fileobj=io.BytesIO(sent.of(Frame.FILES))) as archive:
        file = archive.extractfile("./deep/file")
        assert file is not None
        assert file.read() == b"contents"


def test_pipes_among_the_files_are_left_out(tmp_path: Path) -> None:
    """The host's tar filter would refuse everything for one of them."""
    out = tmp_path / "out"
    out.mkdir()
    os.mkfifo(out / "pipe")
    (out / "file").touch()
    sent = Sent()
    agent.send_files(out, sent)
    with tarfile.open(fileobj=io.BytesIO(sent.of(Frame.FILES))) as archive:
        assert archive.getnames() == [".", "./file"]


def test_the_wire_carries_frames(tmp_path: Path) -> None:
    port = tmp_path / "port"
    port.touch()
    wire = agent.Wire(str(port))
    wire.send(Frame.STDOUT, b"x" * (3 << 20))
    wire.send(Frame.EXIT, b"0")
    wire.drain()
    found: list[tuple[Frame, int]] = []
    Decoder(lambda kind, payload: found.append((kind, len(payload)))).feed(port.read_bytes())
    assert found == [(Frame.STDOUT, 1 << 20)] * 3 + [(Frame.EXIT, 1)]


def test_boot_values_survive_the_shell(tmp_path: Path) -> None:
    """/init reads modules, parameters and the agent's command line back as they were meant."""
    arguments = ("/path with space/python", "-m", "agent", "it's $HOME", "/dev/vport0p1")
    text = boot_file(["virtio", "kvm", "kvm_amd"], {"kvm_amd": "npt=0,nested=1"}, arguments)
    (tmp_path / "boot").write_text(text)
    loop = INIT[INIT.index("for entry") : INIT.index("rm -rf /lab/modules")]
    script = (
        f'. {tmp_path}/boot; insmod() {{ echo "$@"; }}\n{loop}\n'
        f'eval "set -- $AGENT"; for one in "$@"; do echo "<$one>"; done'
    )
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.splitlines() == [
        "/lab/modules/virtio.ko",
        "/lab/modules/kvm.ko",
        "/lab/modules/kvm_amd.ko npt=0 nested=1",
        *(f"<{one}>" for one in arguments),
    ]


def test_init_is_a_shell_script() -> None:
    subprocess.run(["sh", "-n", "-c", INIT], check=True, timeout=30)
