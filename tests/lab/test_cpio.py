"""The archives that the kernel unpacks."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

import pytest

from pykvm.errors import HostError
from pykvm.lab.cpio import CpioWriter, join
from tests.lab import newc


def test_files_folders_links_and_devices_are_what_was_asked_for() -> None:
    output = io.BytesIO()
    with CpioWriter(output) as archive:
        archive.folder("/tmp", 0o1777)
        archive.file("/etc/hosts", b"127.0.0.1 lab\n", 0o600, mtime=1_700_000_000)
        archive.link("/bin", "usr/bin")
        archive.device("/dev/console", 5, 1)
    found = newc.read(output.getvalue())
    assert list(found) == ["tmp", "etc", "etc/hosts", "bin", "dev", "dev/console"]
    assert found["tmp"].fields["mode"] == stat.S_IFDIR | 0o1777
    assert found["etc/hosts"].data == b"127.0.0.1 lab\n"
    assert found["etc/hosts"].fields["mode"] == stat.S_IFREG | 0o600
    assert found["etc/hosts"].fields["mtime"] == 1_700_000_000
    assert (found["bin"].fields["mode"], found["bin"].data) == (stat.S_IFLNK | 0o777, b"usr/bin")
    assert (found["dev/console"].fields["rmaj"], found["dev/console"].fields["rmin"]) == (5, 1)
    assert stat.S_ISCHR(found["dev/console"].fields["mode"])


def test_inodes_differ_since_equal_ones_are_hard_links() -> None:
    output = io.BytesIO()
    with CpioWriter(output) as archive:
        for number in range(5):
            archive.file(f"/{number}", b"x")
    inodes = [entry.fields["ino"] for entry in newc.read(output.getvalue()).values()]
    assert len(set(inodes)) == len(inodes)


@pytest.mark.parametrize("length", range(9))
def test_every_length_of_name_and_data_keeps_the_padding(length: int) -> None:
    output = io.BytesIO()
    with CpioWriter(output) as archive:
        archive.file("/" + "n" * (length + 1), b"d" * length)
        archive.file("/after", b"whole")
    assert newc.read(output.getvalue())["after"].data == b"whole"
    assert len(output.getvalue()) % 4 == 0


def test_the_first_of_a_name_stays() -> None:
    output = io.BytesIO()
    with CpioWriter(output) as archive:
        archive.file("/a", b"first")
        archive.file("a/", b"second")
    assert newc.read(output.getvalue())["a"].data == b"first"


def test_copies_keep_mode_link_and_the_time_that_bytecode_is_trusted_by(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_bytes(b"#!/bin/sh\n")
    script.chmod(0o751)
    os.utime(script, (1_600_000_000, 1_600_000_000))
    (tmp_path / "link").symlink_to("script")
    os.mkfifo(tmp_path / "pipe")
    output = io.BytesIO()
    with CpioWriter(output) as archive:
        for name in ("script", "link", "pipe"):
            archive.copy(tmp_path / name, f"/{name}")
    found = newc.read(output.getvalue())
    assert list(found) == ["script", "link"]
    assert found["script"].fields["mode"] == stat.S_IFREG | 0o751
    assert found["script"].fields["mtime"] == 1_600_000_000
    assert found["link"].data == b"script"


def test_an_archive_that_failed_has_no_end() -> None:
    output = io.BytesIO()

    def fail() -> None:
        with CpioWriter(output) as archive:
            archive.file("/a", b"")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert b"TRAILER!!!" not in output.getvalue()


def test_joined_archives_begin_where_the_kernel_looks(tmp_path: Path) -> None:
    first, second, target = (tmp_path / name for name in ("first", "second", "target"))
    first.write_bytes(b"base!")
    second.write_bytes(b"python layer")
    assert join([first, second], target) == 20
    assert target.read_bytes() == b"base!\0\0\0python layer"


def test_an_archive_that_shrinks_is_no_endless_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = tmp_path / "layer"
    layer.write_bytes(b"1234")
    monkeypatch.setattr(os, "sendfile", lambda *arguments: 0)
    with pytest.raises(HostError, match="clean --layers"):
        join([layer], tmp_path / "target")
