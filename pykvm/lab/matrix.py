"""Kernels times kinds: the cells of the matrix, what is known of each, and which ones to run.

A finished cell is a JSON file in the cache, so an interrupted matrix goes on where it was.  A cell says which
state of the checkout it saw.  When the code that the tests execute has changed since then, the cell is older:
it is shown as that, and run again when asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pykvm.errors import HostError
from pykvm.lab.cache import Cache
from pykvm.lab.kernels import PreparedKernel
from pykvm.lab.kinds import KINDS, Kind
from pykvm.lab.modules import closure, modinfo
from pykvm.lab.results import GarbledResult, SuiteResult
from pykvm.lab.selections import SELECTIONS

FORMAT = 1
Again = Literal["", "older", "failed", "all"]
"""Which known cells to run again: none, those of an older state, those with bad or missing results, all."""

_SOURCES = {".py", ".c", ".h", ".S", ".inc", ".ld", ".toml"}
_FOLDERS = ("pykvm", "tests", "guests")
# Neither the lab itself nor pages about results change what a test in a lab sees.
_SELECTIONS = "pykvm/lab/selections.py"
_NO_MATTER = ("pykvm/lab/", "pykvm/report/", "pykvm/cli/lab", "tests/lab/", "tests/report/", "tests/unit/")


@dataclass(frozen=True)
class Saved:
    """What is known of one cell: the result of its last run, or why there can be none (``not_offered``).

    ``fingerprint`` and ``revision`` name the state of the checkout that it saw, ``when`` is UTC.
    """

    series: str
    release: str
    kind: str
    selection: str
    fingerprint: str
    revision: str
    when: str
    result: SuiteResult | None = None
    not_offered: str = ""

    @property
    def complete(self) -> bool:
        """Whether every chosen test passed or is explained."""
        return self.result is None or (self.result.state == "finished" and not self.result.bad)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        members = {name: getattr(self, name) for name in _TEXTS}
        return {"format": FORMAT, **members, "result": self.result.to_json() if self.result else None}

    @classmethod
    def from_json(cls, document: object) -> Saved:
        """What ``to_json`` made; GarbledResult for anything else."""
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise GarbledResult("not a cell of this version")
        texts = {name: document.get(name) for name in _TEXTS}
        if not all(isinstance(text, str) for text in texts.values()):
            raise GarbledResult("a name is no text")
        result = document.get("result")
        return cls(**texts, result=None if result is None else SuiteResult.from_json(result))  # type: ignore[arg-type]


_TEXTS = ("series", "release", "kind", "selection", "fingerprint", "revision", "when", "not_offered")


@dataclass(frozen=True)
class State:
    """The checkout as it is now."""

    fingerprint: str
    revision: str


def now() -> str:
    """The time for ``Saved.when``."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# --- the state of the checkout -------------------------------------------------------------------


def state_of(root: Path) -> State:
    """The state of the checkout at ``root``, as far as tests in labs execute it."""
    return State(fingerprint(root), revision(root))


def fingerprint(root: Path) -> str:
    """A digest of the sources that tests in a lab execute, and of what selects them."""
    digest = hashlib.sha256()
    for name in _FOLDERS:
        for above, folders, files in os.walk(root / name):
            folders.sort()
            for file in sorted(files):
                path = Path(above, file)
                inside = str(path.relative_to(root))
                matters = inside == _SELECTIONS or not inside.startswith(_NO_MATTER)
                if path.suffix in _SOURCES and matters:
                    digest.update(f"\0{inside}\0".encode())
                    digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def revision(root: Path) -> str:
    """git's name for the checkout, with a plus if sources differ from it; empty where git cannot tell."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *_FOLDERS)
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


# --- what is known -------------------------------------------------------------------------------


class Store:
    """The cells of one selection in the cache, a file each."""

    def __init__(self, cache: Cache, chosen: str) -> None:
        self._cache = cache
        self._folder = cache.root / "results" / chosen
        self._parts = ("results", chosen)

    def _path(self, series: str, kind: str) -> Path:
        return self._folder / f"{series}--{kind}.json"

    def load(self, series: str, kind: str) -> Saved | None:
        """The cell, or None if nothing is known or the file is not one of ours."""
        return _read(self._path(series, kind))

    def save(self, cell: Saved) -> None:
        """Replace what was known.  A reader sees the old cell or the new one."""
        folder = self._cache.folder(*self._parts)
        path = self._path(cell.series, cell.kind)
        scratch = folder / f".{path.name}.{os.getpid()}"
        try:
            scratch.write_text(json.dumps(cell.to_json(), indent=1) + "\n")
            scratch.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                scratch.unlink()
            raise HostError(f"Cannot save a result in {folder} ({error.strerror}).") from error

    def all(self) -> list[Saved]:
        """Every cell, by kernel and then in the order of the kinds."""
        found = [_read(path) for path in sorted(self._folder.glob("*.json"))]
        return sorted(filter(None, found), key=lambda cell: (series_key(cell.series), _kind_key(cell.kind)))


def widest(cache: Cache) -> list[Saved]:
    """Of every kernel and kind the cell with the widest selection; of two as wide, the later one."""
    wide = list(SELECTIONS)
    best: dict[tuple[str, str], tuple[int, str, Saved]] = {}
    for name in wide:
        for cell in Store(cache, name).all():
            rank = wide.index(cell.selection) if cell.selection in wide else -1
            place = (cell.series, cell.kind)
            if place not in best or (rank, cell.when) > best[place][:2]:
                best[place] = (rank, cell.when, cell)
    cells = [cell for _, _, cell in best.values()]
    return sorted(cells, key=lambda cell: (series_key(cell.series), _kind_key(cell.kind)))


def _read(path: Path) -> Saved | None:
    try:
        return Saved.from_json(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def series_key(series: str) -> tuple[int, ...]:
    """``6.12`` after ``6.1``."""
    return tuple(int(part) if part.isdigit() else 0 for part in series.split("."))


def _kind_key(kind: str) -> int:
    return list(KINDS).index(kind) if kind in KINDS else len(KINDS)


# --- what to do ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A cell to run."""

    kernel: PreparedKernel
    kind: Kind
    why: str


def why_not_offered(kernel: PreparedKernel, kind: Kind) -> str:
    """Why this kernel cannot be this kind: it lacks a module or a parameter.  Empty if it can."""
    modules = {module.name: module for module in closure(kernel.modules, ("kvm", kind.module))}
    for name in ("kvm", kind.module):
        if name not in modules:
            return f"the kernel has no module {name}"
    for name, setting in kind.parameters.items():
        known = {value.partition(":")[0] for key, value in modinfo(modules[name].data) if key == "parmtype"}
        for one in setting.split(","):
            parameter = one.partition("=")[0]
            if parameter not in known:
                return f"its {name} has no parameter {parameter}"
    return ""


def plan(
    store: Store, state: State, kernels: Sequence[PreparedKernel], kinds: Iterable[Kind], again: Again = ""
) -> list[Task]:
    """The cells to run, kernel by kernel; cells that cannot exist are saved as that."""
    tasks = []
    kinds = list(kinds)
    for kernel in kernels:
        for kind in kinds:
            why = why_not_offered(kernel, kind)
            if why:
                store.save(
                    Saved(
                        *(
                            kernel.series,
                            kernel.release,
                            kind.name,
                            "",
                            state.fingerprint,
                            state.revision,
                            now(),
                        ),
                        not_offered=why,
                    )
                )
                continue
            reason = why_run(store.load(kernel.series, kind.name), state, kernel, again)
            if reason:
                tasks.append(Task(kernel, kind, reason))
    return tasks


def why_run(known: Saved | None, state: State, kernel: PreparedKernel, again: Again) -> str:
    """Why a cell is to be run; empty if it is not."""
    if known is None or known.result is None:
        return "not run yet"
    if again == "all":
        return "asked for"
    if again == "failed" and not known.complete:
        return "failed before"
    if again in ("older", "failed") and is_older(known, state, kernel.release):
        return "older" if again == "older" else ""
    return ""


def is_older(known: Saved, state: State, release: str) -> bool:
    """Whether the cell saw another state of the checkout, or another kernel of its series."""
    return known.fingerprint != state.fingerprint or known.release != release
