"""apt with a configuration of its own, so that it needs no root and changes nothing in the system.

Lists, downloads and package state lie in one folder, and the state says that nothing is installed.  The keys
of Debian's archive come from the system, and so do its proxies; nothing else does.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from pykvm.errors import HostError
from pykvm.lab.tether import tethered

SUITES: Final[Mapping[str, tuple[str, ...]]] = {
    "bookworm": ("bookworm", "bookworm-security"),
    "trixie": ("trixie", "trixie-security"),
    "trixie-backports": ("trixie-backports",),
}
"""What is read.  Dependencies are resolved within one of these groups."""

QUERY_TIMEOUT: Final = 120.0
"""Seconds for what needs no network."""

_KEYRINGS: Final = ("debian-archive-keyring.gpg", "debian-archive-keyring.pgp")
KEYRING_FOLDER: Path = Path("/usr/share/keyrings")
_PROXY = re.compile(r'^(Acquire::(?:https?|ftp)::Proxy(?:-Auto-Detect|::\S+)? ".+";)$', re.MULTILINE)


class FailedError(HostError):
    """A program ended with a status other than 0; ``output`` is all that it wrote."""

    def __init__(self, program: str, status: int, output: str) -> None:
        super().__init__(f"{program} failed with status {status}: {reason(output)}.")
        self.output = output


class Apt:
    """apt's programs on lists and state below ``folder``."""

    def __init__(self, folder: Path, mirror: str, security_mirror: str) -> None:
        self.folder = folder
        self._mirror = mirror
        self._security_mirror = security_mirror
        self._configured = False

    def run(
        self,
        program: str,
        *arguments: str,
        timeout: float,
        sources: str = "all",
        folder: Path | None = None,
        watch: Callable[[], None] | None = None,
    ) -> str:
        """What apt-get or apt-cache prints; see ``run``.

        ``sources`` is a group of SUITES, ``all`` of them, or ``source`` for trixie's source packages.
        """
        self.configure()
        option = f"--option=Dir::Etc::sourcelist={self.folder / 'sources' / sources}.list"
        return run(
            [tool(program, "apt"), option, *arguments],
            timeout=timeout,
            folder=folder,
            environment={"APT_CONFIG": str(self.folder / "apt.conf")},
            watch=watch,
        )

    def stamp(self, sources: str) -> Path:
        """A file as old as these lists; it goes when other mirrors are named."""
        return self.folder / f"updated-{sources}"

    def configure(self) -> None:
        """Write the configuration, once in this object's life.

        Raises HostError if apt or the keyring is missing.
        """
        if self._configured:
            return
        tool("apt-get", "apt")
        options = f"[arch=amd64 signed-by={keyring()}]"
        for name in ("state/lists/partial", "cache/archives/partial", "sources", "empty"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        lines = {
            group: [f"deb {options} {self._mirror_of(suite)} {suite} main" for suite in suites]
            for group, suites in SUITES.items()
        }
        lines["all"] = [line for group in SUITES for line in lines[group]]
        lines["source"] = [f"deb-src {options} {self._mirror} trixie main"]
        for group, text in lines.items():
            if self._write(f"sources/{group}.list", "\n".join(text) + "\n"):
                self.stamp(group).unlink(missing_ok=True)
        self._write("status", "")
        self._write("apt.conf", _configuration(self.folder, _system_proxies()))
        self._configured = True

    def _mirror_of(self, suite: str) -> str:
        return self._security_mirror if suite.endswith("-security") else self._mirror

    def _write(self, name: str, text: str) -> bool:
        """Whether the file had to be written."""
        path = self.folder / name
        if path.exists() and path.read_text() == text:
            return False
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        scratch.write_text(text)
        scratch.replace(path)
        return True


def _configuration(folder: Path, proxies: str) -> str:
    def at(*parts: str) -> str:
        return f'"{folder.joinpath(*parts)}"'

    lines = [
        f"Dir {at()};",
        f"Dir::State {at('state')};",
        f"Dir::State::status {at('status')};",  # empty: nothing is installed
        f"Dir::Cache {at('cache')};",
        'Dir::Cache::pkgcache "";',  # a second of work saves 100 MB of disk
        'Dir::Cache::srcpkgcache "";',
        f"Dir::Etc {at('empty')};",
        *(f'Dir::Etc::{name} "/dev/null";' for name in ("main", "trusted", "preferences", "netrc")),
        *(
            f"Dir::Etc::{name} {at('empty')};"
            for name in ("parts", "sourceparts", "trustedparts", "preferencesparts", "netrcparts")
        ),
        f"Dir::Etc::sourcelist {at('sources', 'all.list')};",
        'APT::Architecture "amd64";',
        'APT::Architectures { "amd64"; };',
        'APT::Get::List-Cleanup "false";',  # the lists of sources and of binaries are fetched apart
        'APT::Sandbox::User "root";',  # started by root, apt would work as a user who may not write here
        'Acquire::Languages "none";',
        'Acquire::GzipIndexes "true";',
        'Acquire::Retries "2";',
        'Acquire::http::Timeout "30";',
        'Acquire::https::Timeout "30";',
        proxies,
    ]
    return "\n".join(lines) + "\n"


def _system_proxies() -> str:
    """The proxies of the system's apt: behind one, a configuration of our own would reach nothing."""
    program = shutil.which("apt-config")
    if program is None:
        return ""
    try:
        return "\n".join(_PROXY.findall(run([program, "dump", "Acquire"], timeout=QUERY_TIMEOUT)))
    except HostError:
        return ""


def keyring() -> Path:
    """The keys of Debian's archive; HostError says how to get them."""
    for name in _KEYRINGS:
        if (path := KEYRING_FOLDER / name).is_file():
            return path
    raise HostError(
        f"The keys of Debian's archive are missing ({KEYRING_FOLDER / _KEYRINGS[0]}); "
        "install the package debian-archive-keyring, which Ubuntu has, too."
    )


def tool(program: str, package: str) -> str:
    """The path of a program; HostError names the package that has it."""
    if (path := shutil.which(program)) is None:
        raise HostError(
            f"Labs fetch from Debian's archive with {program}, which is not there; install the package "
            f"{package} of Debian or Ubuntu, or prepare the lab in a container of one of them."
        )
    return path


def reason(output: str) -> str:
    """The line of a failed program's output that tells most."""
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    for mark in ("E: ", "Err:", "W: "):
        for line in lines:
            if line.startswith(mark):
                return line.removeprefix(mark).rstrip(".:")
    return lines[-1].rstrip(".:") if lines else "it said nothing"


def run(
    command: Sequence[str],
    *,
    timeout: float,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    watch: Callable[[], None] | None = None,
) -> str:
    """Standard output of a program that is not waited for longer than ``timeout`` seconds.

    ``watch`` is called several times a second meanwhile.  Raises FailedError for a status other than 0, and
    HostError if the program took too long.  It outlives neither this call nor this process.
    """
    name = Path(command[0]).name
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as problems:
        process = subprocess.Popen(
            tethered(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=problems,
            cwd=folder,
            env={**os.environ, **(environment or {}), "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
        )
        try:
            status = _wait(process, name, timeout, watch)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        out.seek(0)
        text = out.read().decode(errors="replace")
        if status:
            problems.seek(0)
            raise FailedError(name, status, problems.read().decode(errors="replace") + text)
        return text


def _wait(
    process: subprocess.Popen[bytes], name: str, timeout: float, watch: Callable[[], None] | None
) -> int:
    deadline = time.monotonic() + timeout
    while True:
        try:
            return process.wait(0.2)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                raise HostError(f"{name} did not end within {timeout:.0f} s; run it again.") from None
            if watch is not None:
                watch()
