"""Archives from a guest or a mirror stay in their folder, with every Python from 3.11.0 on."""

from __future__ import annotations

import io
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pytest

from pykvm.lab.unpacking import unpack


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.mode = kind, link, mode
    made.uid = made.gid = 4711
    return made


def unpacked(folder: Path, *entries: tarfile.TarInfo) -> list[str]:
    """Unpack an archive of these with warnings as errors; what was told of things left out."""
    packed = io.BytesIO()
    with tarfile.open(mode="w:gz", fileobj=packed) as archive:
        for one in entries:
            one.size = 5 if one.isreg() else 0
            archive.addfile(one, io.BytesIO(b"bytes"))
    told: list[str] = []
    packed.seek(0)
    with tarfile.open(fileobj=packed) as archive, warnings.catch_warnings():
        warnings.simplefilter("error")
        unpack(archive, folder, told.append)
    return told


def test_files_folders_and_links_within_arrive(tmp_path: Path) -> None:
    told = unpacked(
        tmp_path / "new" / "out",
        entry(".", tarfile.DIRTYPE),
        entry("./deep", tarfile.DIRTYPE, mode=0o500),
        entry("./deep/file", mode=0o4777),
        entry("./deep/soft", tarfile.SYMTYPE, "../deep/file"),
        entry("./hard", tarfile.LNKTYPE, "./deep/file", mode=0o4777),
    )
    out = tmp_path / "new" / "out"
    assert told == []
    assert [(out / name).read_bytes() for name in ("deep/file", "deep/soft", "hard")] == [b"bytes"] * 3
    assert (out / "deep").stat().st_mode & 0o7777 == 0o700
    assert (out / "deep/file").stat().st_mode & 0o7777 == 0o755


def test_files_belong_to_this_user_whoever_packed_them(tmp_path: Path) -> None:
    unpacked(tmp_path / "out", entry("file"))
    assert (tmp_path / "out" / "file").stat().st_uid == tmp_path.stat().st_uid


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (entry("../escaped"), "outside"),
        (entry("/escaped-from-pykvm"), "outside"),
        (entry("a/../../escaped"), "outside"),
        (entry("soft", tarfile.SYMTYPE, "/etc"), "link to '/etc'"),
        (entry("a/soft", tarfile.SYMTYPE, "../../elsewhere"), "link to '../../elsewhere'"),
        (entry("hard", tarfile.LNKTYPE, "../secret"), "link to '../secret'"),
        (entry("pipe", tarfile.FIFOTYPE), "no file"),
        (entry("device", tarfile.CHRTYPE), "no file"),
    ],
    ids=lambda value: value.name if isinstance(value, tarfile.TarInfo) else "",
)
def test_what_would_leave_the_folder_is_left_out_and_told(
    tmp_path: Path, bad: tarfile.TarInfo, why: str
) -> None:
    (tmp_path / "secret").write_text("secret")
    (told,) = unpacked(tmp_path / "out", entry("first"), bad, entry("last"))
    assert bad.name in told
    assert why in told
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["first", "last"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "secret"]


def test_a_link_that_is_there_already_is_no_way_out(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "way").symlink_to(tmp_path / "elsewhere")
    (told,) = unpacked(tmp_path / "out", entry("way/file"))
    assert "outside" in told
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_it_asks_for_nothing_that_came_after_python_3_11_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian 12's Python has neither filters nor their errors."""
    modern = tarfile.TarFile.extract

    def old_extract(
        self: tarfile.TarFile,
        member: Any,
        path: Any = "",
        set_attrs: bool = True,
        *,
        numeric_owner: bool = False,
    ) -> None:
        modern(self, member, path, set_attrs, numeric_owner=numeric_owner)

    monkeypatch.setattr(tarfile.TarFile, "extract", old_extract)
    monkeypatch.setattr(tarfile.TarFile, "extractall", None)
    for name in ("data_filter", "FilterError"):
        monkeypatch.delattr(tarfile, name, raising=False)
    assert unpacked(tmp_path / "out", entry("good"), entry("../bad")) != []
    assert (tmp_path / "out" / "good").read_bytes() == b"bytes"
