"""Executables that stand for apt's on PATH: they write down how they were called and play a recording."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from pykvm.lab import apt
from pykvm.lab.archive import Archive
from pykvm.lab.cache import Cache

STANZAS = """\
Package: linux-binary-7.1.13+deb13-cloud-amd64
Source: linux-signed-amd64 (7.1.13+1~bpo13+1)
Version: 7.1.13-1~bpo13+1
Installed-Size: 13330
Architecture: amd64
Depends: linux-base-7.1.13+deb13-cloud-amd64 (= 7.1.13-1~bpo13+1)
Description: Linux kernel image for x86-64 cloud (signed)
 The Linux kernel 7.1 binary image.
Filename: pool/main/l/linux-signed-amd64/linux-binary-7.1.13+deb13-cloud-amd64_7.1.13-1~bpo13+1_amd64.deb
Size: 13297444
SHA256: 2feb3588cd790e0fd7f4c425b8ede990b34f80f70703aeb3a6b3c21207e59785

Package: busybox-static
Source: busybox (1:1.37.0-6)
Version: 1:1.37.0-6+b9
Installed-Size: 2102
Architecture: amd64
Filename: pool/main/b/busybox/busybox-static_1.37.0-6+b9_amd64.deb
Size: 955316

Package: linux-image-cloud-amd64
Provides: linux-latest-image
"""

URIS = """\
Reading package lists...
Building dependency tree...
'http://deb.debian.org/debian/pool/main/q/qemu/qemu-system-data_10.0.13%2bds-0%2bdeb13u1_all.deb' \
qemu-system-data_1%3a10.0.13+ds-0+deb13u1_all.deb 2144176 MD5Sum:bd32b49c42d0b8cc57376b5fdf0ad864
'http://deb.debian.org/debian/pool/main/q/qemu/qemu-system-x86_10.0.13%2bds-0%2bdeb13u1_amd64.deb' \
qemu-system-x86_1%3a10.0.13+ds-0+deb13u1_amd64.deb 10278596 MD5Sum:be8c78d1878395bb80d067680e8c333e
"""


class FakeApt:
    """apt-get, apt-cache, apt-config, dpkg-deb in a folder that is all of PATH."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._log = folder / "log"
        self._bin = folder / "bin"
        self._bin.mkdir(parents=True)
        keys = folder / "keys"
        keys.mkdir()
        (keys / "debian-archive-keyring.gpg").touch()
        monkeypatch.setattr(apt, "KEYRING_FOLDER", keys)
        monkeypatch.setenv("PATH", str(self._bin))
        monkeypatch.chdir(folder)  # where programs write that get no folder of their own
        for name, body in {
            "apt-get": "exit 0",
            "apt-cache": "exit 0",
            "apt-config": "exit 0",
            "dpkg-deb": 'mkdir -p "$3/usr"; echo "$2" >"$3/usr/unpacked"',
        }.items():
            self.program(name, body)

    def program(self, name: str, body: str) -> None:
        """Let ``name`` be a shell script with this body; ``$arguments`` are all of its arguments."""
        path = self._bin / name
        log = f"echo \"{name} $arguments\" >>'{self._log}'"
        path.write_text(f'#!/bin/sh\nPATH={os.defpath}\narguments="$*"\n{log}\n{body}\n')
        path.chmod(0o755)

    def remove(self, name: str) -> None:
        (self._bin / name).unlink()

    @property
    def calls(self) -> list[str]:
        """How the programs were called, but for the option that names the sources."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [
            re.sub(r"--option=Dir::Etc::sourcelist=.*?\.list ", "", line)
            for line in lines
            if not line.startswith("apt-config")
        ]

    @property
    def sources(self) -> list[str]:
        """The lists of sources that the calls named, in turn."""
        found = re.findall(r"--option=Dir::Etc::sourcelist=.*?/sources/(\S+)\.list", self._log.read_text())
        return [str(name) for name in found]


def archive_of(cache: Cache, told: list[str] | None = None, **environment: str) -> Archive:
    """An archive that sees no variables but these."""
    return Archive(cache, (told if told is not None else []).append, environment)
