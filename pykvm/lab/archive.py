"""Debian's archive as labs use it: what there is, fetched and unpacked, never installed.

apt verifies the archive's signatures and the sum of every file.  Files that lie in the archive's pool but
are in no list any more come by ``fetch_pool``, and nobody vouches for those.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pykvm.errors import HostError
from pykvm.lab.apt import QUERY_TIMEOUT, Apt, FailedError, reason, run, tool
from pykvm.lab.cache import ARCHIVE_GATE, Cache, Note, remove, size_of
from pykvm.lab.unpacking import unpack

MIRROR: Final = "http://deb.debian.org/debian"
SECURITY_MIRROR: Final = "http://deb.debian.org/debian-security"

_DAY: Final = 86400.0
_UPDATE_TIMEOUT: Final = 900.0
_UNPACK_TIMEOUT: Final = 300.0
_SLOWEST: Final = 50_000
"""Bytes per second that a download is given time for."""
_SILENCE: Final = 30.0
TELL_EVERY: Final = 2.0
"""Seconds between two lines of progress."""
_URI_LINE = re.compile(r"^'([^']+)' (\S+) (\d+)", re.MULTILINE)
_UNREACHABLE = re.compile(
    r"could not resolve|temporary failure|could not connect|unable to connect|cannot initiate the connection|"
    r"connection (failed|timed out|refused|reset)|network is unreachable|no route to host",
    re.IGNORECASE,
)
_FETCH = re.compile(r"^Failed to fetch \S+ ")


class ArchiveUnreachableError(HostError):
    """No connection to the archive; what was fetched before still works."""


@dataclass(frozen=True)
class Package:
    """One version of a package, for amd64 or for all architectures."""

    name: str
    version: str
    size: int
    """Bytes to download."""
    filename: str
    """Path below the mirror."""

    @property
    def deb(self) -> str:
        """The file's name as apt saves it."""
        architecture = "all" if self.filename.endswith("_all.deb") else "amd64"
        return f"{self.name}_{self.version.replace(':', '%3a')}_{architecture}.deb"


def _silent(_: str) -> None:
    """Progress that nobody wants to hear about."""


class Archive:
    """The archive as seen from one lab cache.

    ``note`` gets lines of progress.  ``environment`` may name other mirrors: ``PYKVM_LAB_MIRROR`` in place of
    http://deb.debian.org/debian, ``PYKVM_LAB_SECURITY_MIRROR`` in place of .../debian-security.

    All methods raise HostError with a remedy where the host lacks apt or its keyring, and
    ArchiveUnreachableError without a network.
    """

    def __init__(
        self, cache: Cache, note: Note = _silent, environment: Mapping[str, str] = os.environ
    ) -> None:
        self._cache = cache
        self._note = note
        self._folder = cache.root / "apt"
        self.mirror = environment.get("PYKVM_LAB_MIRROR", "").rstrip("/") or MIRROR
        security_mirror = environment.get("PYKVM_LAB_SECURITY_MIRROR", "").rstrip("/") or SECURITY_MIRROR
        self._apt = Apt(self._folder, self.mirror, security_mirror)
        self._updated: set[str] = set()
        self._inside = False

    # --- what there is ---------------------------------------------------------------------------

    def update(self, *, force: bool = False) -> None:
        """Fetch the lists (20 MB) if they are missing or older than a day; once in this object's life."""
        self._update("all", force=force)

    @property
    def age(self) -> float | None:
        """Seconds since the lists were fetched; None if there are none."""
        try:
            return max(0.0, time.time() - self._apt.stamp("all").stat().st_mtime)
        except FileNotFoundError:
            return None

    def packages(self, pattern: str) -> list[Package]:
        """The newest version of each package whose whole name matches the regular expression."""
        self.update()
        names = self._ask("apt-cache", "pkgnames").split()
        wanted = sorted(name for name in names if re.fullmatch(pattern, name))
        if not wanted:
            return []
        return list(parse_stanzas(self._ask("apt-cache", "show", "--no-all-versions", *wanted)))

    def closure(self, names: Sequence[str], suite: str = "trixie") -> list[Package]:
        """What a root needs that has nothing yet: the named packages and all that they depend on."""
        self.update()
        plan = ("install", "--quiet", "--yes", "--print-uris", "--no-install-recommends")
        text = self._ask("apt-get", *plan, *names, sources=suite)
        return [_from_uri(uri, file, int(size)) for uri, file, size in _URI_LINE.findall(text)]

    def remembered(self, key: str) -> Any:
        """What ``remember`` kept under the key since the lists were last fetched, else None."""
        return self._memory().get(key)

    def remember(self, key: str, value: Any) -> None:
        """Keep a JSON value that was worked out from the lists, for later and for runs without a network."""
        path = self._cache.folder("apt") / "remembered.json"
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        scratch.write_text(json.dumps(self._memory() | {key: value}, indent=1))
        scratch.replace(path)

    def _memory(self) -> dict[str, Any]:
        try:
            memory = json.loads((self._folder / "remembered.json").read_text())
        except (OSError, ValueError):
            return {}
        return memory if isinstance(memory, dict) else {}

    # --- fetching --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def fetch(self, packages: Sequence[Package], what: str = "packages") -> Iterator[list[Path]]:
        """Download, and yield the .deb files, which are removed when the body ends without an exception.

        What an interrupted download left is completed.  ``what`` begins the lines of progress.
        """
        with self._door():
            folder = self._cache.folder("apt", "debs")
            wanted = {package.deb for package in packages}
            for stranger in folder.iterdir():
                if stranger.name not in wanted:
                    remove(stranger)
            total = sum(package.size for package in packages)
            self._ask(
                "apt-get",
                "--quiet",
                "download",
                *(f"{package.name}={package.version}" for package in packages),
                timeout=_UPDATE_TIMEOUT + total / _SLOWEST,
                folder=folder,
                watch=self._teller(what, folder, total),
            )
            debs = [folder / package.deb for package in packages]
            if missing := [deb.name for deb in debs if not deb.is_file()]:
                raise HostError(f"apt-get download ended without {missing[0]}; run the command again.")
            yield debs
            for deb in debs:
                remove(deb)

    def fetch_source(self, name: str, folder: Path) -> Path:
        """Fetch the upstream part of trixie's source package into ``folder``; returns where it is unpacked.

        Debian's own changes are left out, and with them the need for dpkg-source and for the .dsc file, whose
        signature the archive's keyring cannot check: apt has the tarball's sum from the signed lists.
        """
        self._update("source")
        with self._door():
            folder.mkdir(parents=True, exist_ok=True)
            self._ask(
                "apt-get",
                "--quiet",
                "--download-only",
                "--tar-only",
                "source",
                name,
                sources="source",
                timeout=_UPDATE_TIMEOUT,
                folder=folder,
                watch=self._teller(f"{name}, source", folder, 0),
            )
        tarballs = list(folder.glob("*.orig.tar.*"))
        if len(tarballs) != 1:
            raise HostError(f"apt-get source {name} left no tarball; run the command again.")
        with tarfile.open(tarballs[0]) as archive:
            unpack(archive, folder / "tree", lambda what: self._note(f"Left out of {name}: {what}."))
        tarballs[0].unlink()
        inside = list((folder / "tree").iterdir())
        return inside[0] if len(inside) == 1 else folder / "tree"

    def pool_size(self, path: str) -> int | None:
        """Bytes of a file of the pool, by its path below the mirror; None if the archive has it no more."""
        try:
            with self._open(path, method="HEAD") as answer:
                return int(answer.headers.get("Content-Length") or 0)
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def fetch_pool(self, path: str) -> Iterator[Path]:
        """Download a file of the pool.  apt knows no sum of it: the caller must have reasons to trust it.

        It is removed when the body ends without an exception; an interrupted download is completed.
        HostError if the archive has it no more.
        """
        with self._door():
            place = self._cache.folder("apt", "pool") / path.rpartition("/")[2]
            part = place.with_name(place.name + ".part")
            for attempt in range(4):
                try:
                    if self._fetch_piece(path, part):
                        break
                except FileNotFoundError:
                    raise HostError(f"{self.mirror}/{path} is gone from the archive.") from None
                except ArchiveUnreachableError:
                    if attempt == 3:
                        raise
            else:
                raise self._unreachable(f"{place.name} came in pieces only")
            part.replace(place)
            yield place
            remove(place)

    def _fetch_piece(self, path: str, part: Path) -> bool:
        """Append what the server sends to ``part``; whether the file is whole."""
        have = part.stat().st_size if part.exists() else 0
        with self._open(path, {"Range": f"bytes={have}-"} if have else {}) as answer:
            if answer.status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                remove(part)  # as long as the file or longer, and not known to be whole
                return False
            resumed = answer.status == http.client.PARTIAL_CONTENT
            total = int(answer.headers.get("Content-Length") or 0) + (have if resumed else 0)
            tell = self._teller(path.rpartition("/")[2], part, total)
            deadline = time.monotonic() + _UPDATE_TIMEOUT + total / _SLOWEST
            with part.open("ab" if resumed else "wb") as file:
                while piece := self._read(answer):
                    file.write(piece)
                    tell()
                    if time.monotonic() > deadline:
                        raise self._unreachable(f"{part.name} did not come in time")
                return file.tell() == total

    def _read(self, answer: http.client.HTTPResponse) -> bytes:
        try:
            return answer.read(1 << 18)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(str(error)) from None

    @contextlib.contextmanager
    def _open(
        self, path: str, headers: Mapping[str, str] | None = None, method: str = "GET"
    ) -> Iterator[http.client.HTTPResponse]:
        """An answer of the mirror.  FileNotFoundError if it has no such file."""
        url = f"{self.mirror}/{urllib.parse.quote(path, safe='/~+:')}"
        request = urllib.request.Request(url, headers=dict(headers or {}), method=method)
        try:
            answer = urllib.request.urlopen(request, timeout=_SILENCE)
        except urllib.error.HTTPError as error:
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                error.close()
                if error.code in (http.client.NOT_FOUND, http.client.GONE):
                    raise FileNotFoundError(url) from None
                raise self._unreachable(f"status {error.code} for {path}") from None
            answer = error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._unreachable(str(getattr(error, "reason", error))) from None
        with answer:
            yield answer

    def unpack(self, deb: Path, folder: Path) -> None:
        """Unpack the package's files below ``folder``.  Nothing of the package is run."""
        folder.mkdir(parents=True, exist_ok=True)
        run([tool("dpkg-deb", "dpkg"), "--extract", str(deb), str(folder)], timeout=_UNPACK_TIMEOUT)

    # --- apt -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _door(self) -> Iterator[None]:
        """One process at a time changes lists or downloads; another waits and says so."""
        if self._inside:
            yield
            return
        gate = self._cache.folder("apt") / ARCHIVE_GATE
        with contextlib.ExitStack() as stack:
            if not stack.enter_context(self._cache.lock(gate, wait=False)):
                self._note("Another pykvm fetches from the archive; waiting for it.")
                stack.enter_context(self._cache.lock(gate))
            self._inside = True
            try:
                yield
            finally:
                self._inside = False

    def _update(self, sources: str, *, force: bool = False) -> None:
        if sources in self._updated:
            return
        self._cache.folder("apt")
        self._apt.configure()
        stamp = self._apt.stamp(sources)
        with self._door():
            fresh = stamp.exists() and 0 <= time.time() - stamp.stat().st_mtime < _DAY
            if force or not fresh:
                self._note(f"Fetching the lists of {self.mirror}.")
                strict = "--option=APT::Update::Error-Mode=any"
                self._ask("apt-get", "--quiet", strict, "update", sources=sources, timeout=_UPDATE_TIMEOUT)
                stamp.touch()
                if sources == "all":
                    remove(self._folder / "remembered.json")
        self._updated.add(sources)

    def _ask(
        self,
        program: str,
        *arguments: str,
        sources: str = "all",
        timeout: float = QUERY_TIMEOUT,
        folder: Path | None = None,
        watch: Callable[[], None] | None = None,
    ) -> str:
        self._cache.folder("apt")
        try:
            return self._apt.run(
                program, *arguments, timeout=timeout, sources=sources, folder=folder, watch=watch
            )
        except FailedError as error:
            for line in error.output.splitlines():
                if _UNREACHABLE.search(line):
                    raise self._unreachable(_FETCH.sub("", reason(line))) from None
            raise HostError(
                f"{program} failed: {reason(error.output)}; "
                "'pykvm lab clean --lists' makes it start over with fresh lists."
            ) from None

    def _unreachable(self, why: str) -> ArchiveUnreachableError:
        return ArchiveUnreachableError(
            f"Debian's archive at {self.mirror} could not be reached ({why}); "
            "check the network, or name another mirror with PYKVM_LAB_MIRROR."
        )

    def _teller(self, what: str, place: Path, total: int) -> Callable[[], None]:
        """A function to call often, which tells now and then how much has come to ``place``."""
        asked, told = time.monotonic(), 0

        def tell() -> None:
            nonlocal asked, told
            if time.monotonic() - asked < TELL_EVERY:
                return
            asked = time.monotonic()
            if (come := size_of(place) // 1_000_000) != told:
                told = come
                self._note(f"{what}: {come} of {total / 1e6:.0f} MB" if total else f"{what}: {come} MB")

        return tell


def parse_stanzas(text: str) -> Iterator[Package]:
    """Packages from the stanzas that ``apt-cache show`` prints."""
    for stanza in text.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", stanza, re.MULTILINE))
        if {"Package", "Version", "Size", "Filename"} <= fields.keys():
            yield Package(fields["Package"], fields["Version"], int(fields["Size"]), fields["Filename"])


def _from_uri(uri: str, file: str, size: int) -> Package:
    name, version, _ = urllib.parse.unquote(file).split("_")
    path = urllib.parse.unquote(uri)
    return Package(name, version, size, path[path.find("/pool/") + 1 :])
