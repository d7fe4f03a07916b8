"""The folder that a lab keeps things in: what is built once, what one run needs, and freeing both.

Nothing in it counts before it is whole: a builder works beside the place and renames at the end, so that
whoever dies on the way leaves only a hidden leftover that the next one removes.  All locks are flocks, which
the kernel drops with the process that held them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pykvm.errors import HostError

Note = Callable[[str], None]
"""Takes one line of progress, for people."""

PARTS: Final = ("apt", "kernels", "tools", "layers", "runs", "results")
"""The folders of a cache: the archive's lists, unpacked kernels, emulators, packed file systems, runs, and
what the matrix found."""

LAYERS_LIMIT: Final = 2 << 30
"""Bytes that layers may take before the ones that were not used for long are removed."""

ARCHIVE_GATE: Final = "gate"
"""Name below apt/ of what ``archive`` locks while it fetches."""

_KEEP_MARK: Final = ".keep"
_KEPT_RUNS: Final = 10


@dataclass(frozen=True)
class Cleaned:
    """What ``Cache.clean`` or ``Cache.prune`` removed (or would remove)."""

    freed: int
    """Bytes of disk."""
    removed: tuple[Path, ...]
    in_use: tuple[Path, ...]
    """Left alone, since a running lab uses them."""


class RunFolder:
    """One run's own folder; removed at its end unless ``keep`` was called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: tuple[str, ...] | None = None

    def keep(self, *names: str) -> None:
        """Leave these files for people to read after the run has ended."""
        self._kept = names
        (self.path / _KEEP_MARK).touch()

    def _end(self) -> None:
        if self._kept is None:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            for entry in self.path.iterdir():
                if entry.name not in {*self._kept, _KEEP_MARK}:
                    remove(entry)


class Cache:
    """The cache at ``root``, by default where ``default_root`` says; folders are made when asked for."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or default_root()).absolute()

    def folder(self, *parts: str) -> Path:
        """The folder below the root, made if it is missing.

        Raises HostError where this user cannot make it or write to it.
        """
        path = self.root.joinpath(*parts)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(path, error) from None
        if not os.access(path, os.W_OK | os.X_OK):
            raise _unusable(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
        return path

    # --- building --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def build(self, path: Path, note: Note | None = None) -> Iterator[Path | None]:
        """Build ``path`` once: yields where to build it, or None if it is there already.

        The body makes a file or folder at the yielded place, which becomes ``path`` when the body ends and
        vanishes when it raises.  Another process that wants the same waits here and then gets None.  What a
        builder wants to go on with after an interruption lies beside ``path`` as ``.NAME.work``.  ``note`` is
        told when there is somebody to wait for.
        """
        self.folder(*path.parent.relative_to(self.root).parts)
        with contextlib.ExitStack() as stack:
            if not stack.enter_context(self.lock(path, wait=False)):
                if note is not None:
                    note(f"Another pykvm is at work on {path.name}; waiting for it.")
                stack.enter_context(self.lock(path))
            if path.exists():
                _touch(path)
                yield None
                return
            for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
                remove(leftover)  # its builder held this lock and is dead
            scratch = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
            try:
                yield scratch
                scratch.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise HostError(
                    f"There is no room left for {path}; free some, for example with 'pykvm lab clean'."
                ) from error
            finally:
                remove(scratch)

    def provide(self, path: Path, make: Callable[[Path], None], note: Note | None = None) -> Path:
        """``path``, after ``make(scratch)`` built it if it was missing."""
        if path.exists():
            _touch(path)
            return path
        with self.build(path, note) as scratch:
            if scratch is not None:
                make(scratch)
        return path

    @contextlib.contextmanager
    def lock(self, path: Path, *, wait: bool = True) -> Iterator[bool]:
        """Be the only one who builds or changes ``path``; yields False if that is not to be had at once.

        The lock is a hidden file beside the path, which goes when the last holder is done.  HostError if
        there can be none, so that ``path`` cannot be changed either.
        """
        place = path.parent / f".{path.name}.lock"
        while True:
            try:
                descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise _unusable(path.parent, error) from None
            try:
                if not _flock(descriptor, fcntl.LOCK_EX, wait=wait):
                    yield False
                    return
                if not _is(descriptor, place):
                    continue  # the previous holder removed it between our open and our lock
                try:
                    yield True
                finally:
                    place.unlink(missing_ok=True)
                return
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def use(self, *paths: Path) -> Iterator[None]:
        """While the body runs, neither ``clean`` nor ``prune`` of any process removes these.

        Raises HostError if one was removed in the meantime.
        """
        with contextlib.ExitStack() as stack:
            for path in paths:
                try:
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    stack.callback(os.close, descriptor)
                    _flock(descriptor, fcntl.LOCK_SH)
                    present = _is(descriptor, path)
                except FileNotFoundError:
                    present = False
                if not present:
                    raise HostError(f"{path} was removed from the lab cache; run the command again.")
                _touch(path)
            yield

    # --- runs ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def run_folder(self) -> Iterator[RunFolder]:
        """A fresh folder below runs/, held by this process.

        Folders of dead runs and layers of long ago are removed on the way.
        """
        runs = self.folder("runs")
        self.prune()
        with _opened(runs) as door:
            _flock(door, fcntl.LOCK_EX)  # nobody sweeps between our mkdir and our lock
            self._sweep_runs(runs)
            path = runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{secrets.token_hex(2)}"
            try:
                path.mkdir()
            except OSError as error:
                raise _unusable(runs, error) from None
            hold = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            _flock(hold, fcntl.LOCK_EX)
        folder = RunFolder(path)
        try:
            yield folder
        finally:
            folder._end()
            os.close(hold)

    def running(self) -> bool:
        """Whether a lab of this cache runs, in whatever process."""
        return any(is_used(path) for path in self.entries("runs"))

    def _sweep_runs(self, runs: Path) -> None:
        kept = []
        for path in sorted(entry for entry in runs.iterdir() if not entry.name.startswith(".")):
            if (path / _KEEP_MARK).exists():
                kept.append(path)
            else:
                _remove_unless_used(path)
        for path in kept[:-_KEPT_RUNS]:
            _remove_unless_used(path)

    # --- room ------------------------------------------------------------------------------------

    def entries(self, part: str) -> list[Path]:
        """What was built in a part, by name."""
        folder = self.root / part
        return sorted(path for path in folder.glob("*") if not path.name.startswith("."))

    def usage(self) -> dict[str, int]:
        """Bytes on disk of each part."""
        return {part: size_of(self.root / part) for part in PARTS}

    def prune(self, part: str = "layers", limit: int = LAYERS_LIMIT, grace: float = 600.0) -> Cleaned:
        """Remove what was not used for the longest time until ``limit`` bytes remain, and dead leftovers.

        What was used within ``grace`` seconds stays: somebody may be about to use it again.
        """
        self._sweep_leftovers(part)
        left, old = 0, []
        for path in sorted(self.entries(part), key=_last_use, reverse=True):
            left += size_of(path)
            if left > limit and time.time() - _last_use(path) > grace:
                old.append(path)
        return self._clear(old, dry_run=False)

    def clean(self, parts: Collection[str], *, dry_run: bool = False) -> Cleaned:
        """Remove everything in these parts that no running lab uses; ``dry_run`` only counts."""
        with contextlib.ExitStack() as stack:
            found: list[Path] = []
            in_use: tuple[Path, ...] = ()
            freed = 0
            for part in filter(lambda name: (self.root / name).is_dir(), parts):
                gate = self.root / part / ARCHIVE_GATE
                if part == "runs":
                    # As in run_folder: no run begins while these are looked at.
                    _flock(stack.enter_context(_opened(self.root / part)), fcntl.LOCK_EX)
                if part == "apt" and not stack.enter_context(self.lock(gate, wait=False)):
                    in_use = (gate.parent,)
                    continue
                found += self.entries(part)
                freed += self._sweep_leftovers(part, work=True, dry_run=dry_run)
            cleaned = self._clear(found, dry_run=dry_run)
            return Cleaned(cleaned.freed + freed, cleaned.removed, cleaned.in_use + in_use)

    def discard(self, paths: Collection[Path]) -> Cleaned:
        """Remove these entries unless a running lab uses them."""
        return self._clear(paths, dry_run=False)

    def _clear(self, paths: Collection[Path], *, dry_run: bool) -> Cleaned:
        freed, removed, in_use = 0, [], []
        for path in paths:
            size = size_of(path)
            # A lab holds its layers and its run folder; a kernel or an emulator may be any running lab's.
            shared = path.parent.name in ("kernels", "tools") and self.running()
            if shared or (is_used(path) if dry_run else not self._remove_built(path)):
                in_use.append(path)
            else:
                freed += size
                removed.append(path)
        return Cleaned(freed, tuple(removed), tuple(in_use))

    def _remove_built(self, path: Path) -> bool:
        """Remove an entry unless it is in use or being built; whether it is gone."""
        with self.lock(path, wait=False) as mine:
            return mine and _remove_unless_used(path)

    def _sweep_leftovers(self, part: str, *, work: bool = False, dry_run: bool = False) -> int:
        """Remove what dead builders left, with ``work`` even what they could go on with; returns bytes."""
        folder = self.root / part
        owners = {path: path.name[1:].rsplit(".", 2)[0] for path in folder.glob(".*.part")}
        if work:
            owners |= {path: path.name[1:].rsplit(".", 1)[0] for path in folder.glob(".*.work")}
        freed = 0
        for leftover, name in owners.items():
            with self.lock(folder / name, wait=False) as mine:
                if mine and leftover.exists():
                    freed += size_of(leftover)
                    if not dry_run:
                        remove(leftover)
        return freed


def default_root(environment: Mapping[str, str] = os.environ) -> Path:
    """``$PYKVM_LAB_CACHE``, else ``pykvm/lab`` in ``$XDG_CACHE_HOME`` or ~/.cache.

    HostError for a user without a home.
    """
    try:
        if own := environment.get("PYKVM_LAB_CACHE"):
            return Path(own).expanduser()
        caches = environment.get("XDG_CACHE_HOME", "")
        # The base directory specification tells to ignore a relative path.
        base = Path(caches) if caches.startswith("/") else Path("~/.cache").expanduser()
    except RuntimeError:
        raise HostError(
            "There is no home folder to keep lab files in; name a folder with PYKVM_LAB_CACHE."
        ) from None
    return base / "pykvm" / "lab"


def _unusable(path: Path, error: OSError) -> HostError:
    return HostError(
        f"Cannot use {path} to keep lab files ({error.strerror}); "
        "name a folder of your own with PYKVM_LAB_CACHE, or free some room if it is full."
    )


def size_of(path: Path) -> int:
    """Bytes on disk of a file or a whole folder; a file with several names counts once, a missing one not."""
    seen: set[tuple[int, int]] = set()
    total = 0
    todo = [path]
    while todo:
        place = todo.pop()
        try:
            facts = place.lstat()
            if stat.S_ISDIR(facts.st_mode):
                todo += place.iterdir()
        except OSError:
            continue  # it went away, or belongs to somebody else
        if (facts.st_dev, facts.st_ino) not in seen:
            seen.add((facts.st_dev, facts.st_ino))
            total += facts.st_blocks * 512
    return total


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, read-only folders included; missing is fine."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for folder, _, _ in os.walk(path):
        with contextlib.suppress(OSError):
            os.chmod(folder, 0o700)
    shutil.rmtree(path, ignore_errors=True)


def is_used(path: Path) -> bool:
    """Whether a process holds ``path`` through ``Cache.use`` or as its run folder."""
    try:
        with _opened(path) as descriptor:
            return not _flock(descriptor, fcntl.LOCK_EX, wait=False)
    except FileNotFoundError:
        return False


def _remove_unless_used(path: Path) -> bool:
    """Whether ``path`` is gone afterwards.  Its lock is held until then, so that nobody begins to use it."""
    try:
        with _opened(path) as descriptor:
            if not _flock(descriptor, fcntl.LOCK_EX, wait=False):
                return False
            remove(path)
            return not os.path.lexists(path)  # parts of it may belong to somebody else
    except FileNotFoundError:
        return True


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _flock(descriptor: int, kind: int, *, wait: bool = True) -> bool:
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is(descriptor: int, path: Path) -> bool:
    """Whether the open file is still what the path names."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _touch(path: Path) -> None:
    """Remember this use, for ``prune``."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
