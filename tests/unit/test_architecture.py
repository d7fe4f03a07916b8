"""Who may import whom: docs/architecture.md's table, checked against the syntax trees of all modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "pykvm"

ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "x86": {"errors"},
    "abi": {"errors"},
    "memory": {"errors", "abi"},
    "machine": {"errors", "x86", "memory"},
    "guest": {"errors", "x86", "memory", "machine"},
    "kvm": {"errors", "x86", "abi", "memory", "machine"},
    "profiles": {"errors"},
    "model": {"errors", "x86", "memory", "machine", "profiles"},
    "probe": {"errors", "x86", "memory", "machine", "kvm", "profiles"},
    "track": {"errors", "abi", "memory", "machine"},
    "migrate": {"errors", "abi", "memory", "machine", "guest", "track"},
    "report": {"machine"},
    "backends": {"errors", "machine", "kvm", "model", "profiles"},
    "observe": {"errors", "x86", "abi"},
    "lab": {"errors"},
    "crosscheck": {"errors", "x86", "memory", "machine", "guest", "track", "observe"},
}
"""Every room and the rooms below it; ``cli`` stands on top and may import all of them."""

LIBRARIES = {
    "click": {"cli"},
    "rich": {"cli", "report"},
    "cffi": {"abi"},
    "capstone": {"x86", "guest", "model"},
    "ptrace": {"observe"},
    "hypothesis": {"crosscheck"},
}
"""Third-party libraries that belong to few rooms; numpy may be used everywhere."""

VALUES_ONLY = {"pykvm.machine", "pykvm.machine.dirty", "pykvm.machine.exits", "pykvm.machine.statistics"}


def room_of(path: Path) -> str:
    top = path.relative_to(PACKAGE).parts[0]
    return top.removesuffix(".py")


def imported(source: str) -> Iterator[str]:
    """Full names of the imported modules, wherever in the file the statement stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports within pykvm are absolute"
            assert node.module is not None
            if node.module == "pykvm":
                yield from (f"pykvm.{alias.name}" for alias in node.names)
            else:
                yield node.module


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if room_of(path) not in ("__init__", "__main__"))


def violations(path: Path, source: str) -> list[str]:
    room = room_of(path)
    found = []
    for name in imported(source):
        parts = name.split(".")
        if parts[0] != "pykvm":
            if room not in LIBRARIES.get(parts[0], {room}):
                found.append(name)
            continue
        other = parts[1]
        if room == "cli" or other == room or other.startswith("__"):
            continue
        if other not in ROOMS[room]:
            found.append(name)
        elif room == "report" and name not in VALUES_ONLY:
            found.append(f"{name} (report takes value types only)")
    return found


def test_every_module_belongs_to_a_room() -> None:
    assert {room_of(path) for path in MODULES} <= {*ROOMS, "cli"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    assert violations(path, path.read_text()) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 500


def test_the_rules_have_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ROOMS):
        ready = {room for room in ROOMS if room not in done and ROOMS[room] <= done}
        assert ready, f"a cycle among {set(ROOMS) - done}"
        done |= ready


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("kvm/x.py", "from pykvm.model.mmu import Mmu"),
        ("model/x.py", "import pykvm.kvm"),
        ("machine/x.py", "from pykvm import kvm"),
        ("guest/x.py", "def f():\n    from pykvm.kvm import KvmVm"),
        ("report/x.py", "from pykvm.machine.protocols import Machine"),
        ("migrate/x.py", "from pykvm.backends import open_system"),
        ("kvm/x.py", "import click"),
        ("kvm/x.py", "from cffi import FFI"),
    ],
)
def test_a_forbidden_import_is_found(place: str, source: str) -> None:
    assert violations(PACKAGE / place, source)


def test_an_allowed_import_is_not() -> None:
    assert violations(PACKAGE / "kvm/x.py", "from pykvm import errors\nimport pykvm.abi\nimport numpy") == []
