"""Tools: unpacked with their libraries, started through their own linker, trimmed."""

from __future__ import annotations

import stat
import struct
from pathlib import Path

import pytest

from pykvm.errors import HostError
from pykvm.lab import toolbox
from pykvm.lab.archive import ArchiveUnreachableError
from pykvm.lab.cache import Cache
from pykvm.lab.toolbox import find, prepare_qemu, prepare_root, upstream
from tests.lab.fake_archive import FakeArchive, package


def elf(kind: int) -> bytes:
    """An ELF64 header with one program header of this kind."""
    head = bytearray(64)
    head[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", head, 32, 64)
    struct.pack_into("<HH", head, 54, 56, 1)
    return bytes(head) + struct.pack("<I", kind) + bytes(52)


DYNAMIC, STATIC = elf(3), elf(1)


def archive_of(cache: Cache) -> FakeArchive:
    return FakeArchive(
        cache,
        [
            package("qemu-system-x86", "1:10.0.13+ds-0+deb13u1", 10_000_000),
            package("libc6", "2.41-12", 2_000_000),
            package("busybox-static", "1:1.37.0-6+b9", 955_316),
        ],
        {
            "qemu-system-x86": {
                "usr/bin/qemu-system-x86_64": DYNAMIC,
                "usr/bin/qemu-system-i386": DYNAMIC,
                "usr/share/qemu/linuxboot_dma.bin": b"1",
                "usr/share/qemu/multiboot_dma.bin": b"1",
                "usr/share/qemu/skiboot.lid": b"1",
                "usr/share/seabios/bios-256k.bin": b"1",
                "usr/share/man/man1/qemu.1.gz": b"1",
                "usr/sbin/something": b"1",
            },
            "libc6": {
                "usr/lib64/ld-linux-x86-64.so.2": b"1",
                "usr/lib/x86_64-linux-gnu/libc.so.6": b"1",
                "usr/lib/x86_64-linux-gnu/gconv/BIG5.so": b"1",
                "usr/share/locale/de/libc.mo": b"1",
                "etc/ld.so.conf": b"1",
            },
            "busybox-static": {"usr/bin/busybox": STATIC, "usr/share/doc/busybox/README": b"1"},
        },
    )


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_a_tool_has_its_libraries_and_no_documentation(cache: Cache) -> None:
    archive = archive_of(cache)
    tool = prepare_root(cache, archive, archive.told.append, "busybox", ["busybox-static"])
    assert tool == find(cache, "busybox")
    assert tool.version == "1.37.0"
    assert tool.folder == cache.root / "tools" / "busybox"
    assert files(tool.root) == {
        "usr/bin/busybox",
        "usr/lib64/ld-linux-x86-64.so.2",
        "usr/lib/x86_64-linux-gnu/libc.so.6",
    }
    assert archive.told == ["busybox: fetching 2 packages, 3 MB."]


def test_qemu_keeps_one_emulator_and_firmware_for_a_pc(cache: Cache) -> None:
    archive = archive_of(cache)
    assert files(prepare_qemu(cache, archive, archive.told.append).root) == {
        "usr/bin/qemu-system-x86_64",
        "usr/lib64/ld-linux-x86-64.so.2",
        "usr/lib/x86_64-linux-gnu/libc.so.6",
        "usr/share/qemu/linuxboot_dma.bin",
        "usr/share/qemu/multiboot_dma.bin",
        "usr/share/seabios/bios-256k.bin",
    }


def test_a_prepared_tool_is_not_fetched_again(cache: Cache) -> None:
    archive = archive_of(cache)
    for _ in range(2):
        prepare_qemu(cache, archive, archive.told.append)
    assert archive.fetched == ["qemu-system-x86", "libc6"]


def test_an_interrupted_tool_does_not_count_and_can_be_repeated(cache: Cache) -> None:
    archive = archive_of(cache)
    archive.breaks_after = 1
    with pytest.raises(ArchiveUnreachableError):
        prepare_qemu(cache, archive, archive.told.append)
    assert find(cache, "qemu") is None
    assert list(cache.folder("tools").iterdir()) == []
    archive.breaks_after = None
    assert prepare_qemu(cache, archive, archive.told.append).version == "10.0.13"


def test_a_program_is_started_through_its_own_linker(cache: Cache) -> None:
    archive = archive_of(cache)
    tool = prepare_qemu(cache, archive, archive.told.append)
    root = tool.root
    assert tool.argv("usr/bin/qemu-system-x86_64", "-m", "1G") == (
        f"{root}/usr/lib64/ld-linux-x86-64.so.2",
        "--library-path",
        f"{root}/usr/lib/x86_64-linux-gnu",
        f"{root}/usr/bin/qemu-system-x86_64",
        "-m",
        "1G",
    )


def test_a_static_program_is_started_as_it_is(cache: Cache) -> None:
    archive = archive_of(cache)
    tool = prepare_root(cache, archive, archive.told.append, "busybox", ["busybox-static"])
    assert tool.argv("usr/bin/busybox", "sh") == (f"{tool.root}/usr/bin/busybox", "sh")


def test_a_program_that_is_gone_is_one_sentence(cache: Cache) -> None:
    archive = archive_of(cache)
    tool = prepare_qemu(cache, archive, archive.told.append)
    with pytest.raises(HostError, match="clean --tools"):
        tool.argv("usr/bin/xorriso")


def test_a_tool_grants_nobody_privileges(cache: Cache) -> None:
    archive = archive_of(cache)
    unpack = archive.unpack

    def unpack_setuid(deb: Path, folder: Path) -> None:
        unpack(deb, folder)
        for path in folder.rglob("busybox"):
            if path.is_file():
                path.chmod(0o4755)

    archive.unpack = unpack_setuid  # type: ignore[method-assign]
    tool = prepare_root(cache, archive, archive.told.append, "busybox", ["busybox-static"])
    assert stat.S_IMODE((tool.root / "usr/bin/busybox").stat().st_mode) == 0o755


def test_qemu_and_busybox_are_fetched_on_the_way(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolbox, "Archive", lambda cache, note: archive_of(cache))
    assert toolbox.busybox(cache, print) == cache.root / "tools/busybox/root/usr/bin/busybox"
    argv, version = toolbox.qemu(cache, print, {})
    assert version == "10.0.13"
    assert argv[-4:] == (
        "-L",
        f"{cache.root}/tools/qemu/root/usr/share/qemu",
        "-L",
        f"{cache.root}/tools/qemu/root/usr/share/seabios",
    )
    monkeypatch.setattr(toolbox, "Archive", lambda *_: pytest.fail("asked the archive again"))
    assert toolbox.qemu(cache, print, {}) == (argv, version)
    assert toolbox.busybox(cache, print).is_file()


@pytest.mark.parametrize(
    ("version", "expected"),
    [("1:10.0.13+ds-0+deb13u1", "10.0.13"), ("1:1.37.0-6+b9", "1.37.0"), ("1.5.6-1.2", "1.5.6"), ("x", "x")],
)
def test_versions_are_told_as_upstream_has_them(version: str, expected: str) -> None:
    assert upstream(version) == expected


# --- another QEMU --------------------------------------------------------------------------------


def another(folder: Path, text: str) -> dict[str, str]:
    path = folder / "qemu"
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)
    return {"PYKVM_LAB_QEMU": str(path)}


def test_another_qemu_is_used_when_it_is_named(cache: Cache, tmp_path: Path) -> None:
    environment = another(tmp_path, "QEMU emulator version 9.2.0 (Debian 1:9.2.0+ds)")
    assert toolbox.qemu(cache, print, environment) == ((str(tmp_path / "qemu"),), "9.2.0")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "QEMU emulator version 7.2.17 (Debian 1:7.2)",
            r"QEMU 7\.2\.17, which corrupts .* name version 8 or newer",
        ),
        ("hello", "is no QEMU"),
    ],
)
def test_a_qemu_that_will_not_do_is_refused(cache: Cache, tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(HostError, match=sentence):
        toolbox.qemu(cache, print, another(tmp_path, text))


def test_a_qemu_that_is_not_there_is_one_sentence(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot be started"):
        toolbox.qemu(cache, print, {"PYKVM_LAB_QEMU": str(tmp_path / "missing")})
