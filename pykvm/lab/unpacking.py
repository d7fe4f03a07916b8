"""Unpack a tar archive below one folder, and nothing of it elsewhere.

Python's own filter for that came with 3.11.4, and Debian 12 has 3.11.2.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path


def unpack(archive: tarfile.TarFile, folder: Path, left_out: Callable[[str], None]) -> None:
    """Files, folders and links of the archive, owned by this user and writable by nobody else.

    What is none of these, lies outside of the folder or points there is left out, and ``left_out`` gets a
    phrase about it.  Raises OSError and tarfile.TarError.
    """
    archive.extraction_filter = lambda member, path: member  # newer Pythons warn if they are told nothing
    folder.mkdir(parents=True, exist_ok=True)
    root = os.path.realpath(folder)
    for member in archive:
        why = _objection(member, root)
        if why:
            left_out(f"'{member.name}' {why}")
            continue
        member.uid, member.gid = os.getuid(), os.getgid()
        member.uname = member.gname = ""  # or names of this system would count for more than the numbers
        member.mode = member.mode & 0o755 | (0o700 if member.isdir() else 0o600)
        archive.extract(member, root)


def _objection(member: tarfile.TarInfo, root: str) -> str:
    """Why this is not to be unpacked; links that are there already are followed."""
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        return "is no file, folder or link"
    if not _within(os.path.join(root, member.name), root):
        return "would lie outside of the folder"
    if member.issym() and not _within(
        os.path.join(root, os.path.dirname(member.name), member.linkname), root
    ):
        return f"is a link to '{member.linkname}', outside of the folder"
    if member.islnk() and not _within(os.path.join(root, member.linkname), root):
        return f"is a link to '{member.linkname}', outside of the folder"
    return ""


def _within(path: str, root: str) -> bool:
    return os.path.commonpath([os.path.realpath(path), root]) == root
