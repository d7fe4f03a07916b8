"""The Python environment that runs now, as a list of files: interpreter, standard library, packages, shared
libraries.

A lab has the same files at the same absolute paths, so that scripts' first lines, editable installs and
compiled bytecode go on working.  Only what pykvm and its tests need is taken: the installed distributions
that pykvm's own metadata leads to, not all of site-packages.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from pykvm.errors import HostError
from pykvm.lab import elf

DISTRIBUTION = "pykvm-harness"
LEFT_OUT = frozenset({"mypy", "ruff", "setuptools", "types-cffi"})
"""Of the test extra: tools that judge sources and build the binding, which no guest needs."""

_STANDARD_LEFT_OUT = frozenset(
    {
        "test",
        "tests",
        "site-packages",
        "dist-packages",
        "idlelib",
        "tkinter",
        "ensurepip",
        "lib2to3",
        "turtledemo",
    }
)
_PACKAGE_LEFT_OUT = frozenset({"tests", "f2py", "include"})
_SCRIPTS = ("pykvm", "pytest")
_PROJECT = (
    "pykvm",
    "tests",
    "guests",
    "scripts",
    "docs",
    "pyproject.toml",
    "README.md",
    "setup.py",
    "Vagrantfile",
)
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")
_LIST_TIMEOUT = 30.0
_NEVER_ELF = frozenset({".py", ".pyc", ".txt", ".h", ".md"})


def _stale_bytecode(path: Path) -> bool:
    """Bytecode of other interpreters and other optimisation levels, which this one does not read."""
    if path.suffix != ".pyc":
        return False
    return ".opt-" in path.name or f".{sys.implementation.cache_tag}" not in path.name


def _walk(folder: Path, left_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    for above, folders, files in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if name not in left_out and not name.startswith("config-")
        )
        here = Path(above)
        yield from (here / name for name in folders if (here / name).is_symlink())
        for name in sorted(files):
            path = here / name
            if not _stale_bytecode(path) and not name.startswith("_tkinter."):
                yield path


def _links(path: Path) -> Iterator[Path]:
    """``path`` and, if it is a link, what it leads to, step by step."""
    while True:
        yield path
        if not path.is_symlink():
            return
        path = Path(os.path.normpath(path.parent / path.readlink()))


def _interpreter() -> Iterator[Path]:
    yield from _links(Path(sys.executable))
    for name in ("python", "python3"):
        beside = Path(sys.executable).with_name(name)
        if beside.exists():
            yield from _links(beside)
    configuration = Path(sys.prefix, "pyvenv.cfg")
    if configuration.exists():
        yield configuration
    for key in ("stdlib", "platstdlib"):
        # In a venv platstdlib names the venv's own, empty one.
        folder = Path(sysconfig.get_path(key, vars={"base": sys.base_prefix, "platbase": sys.base_prefix}))
        yield from _walk(folder, _STANDARD_LEFT_OUT)


def _requirements(distribution: importlib.metadata.Distribution) -> Iterator[str]:
    own = _canonical(distribution.metadata["Name"]) == DISTRIBUTION
    for line in distribution.requires or ():
        requirement, _, marker = line.partition(";")
        if "extra" in marker and not (own and "test" in marker):
            continue
        if found := _NAME.match(requirement.strip()):
            yield found[0]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions() -> list[importlib.metadata.Distribution]:
    """pykvm and the installed distributions that it needs to run and to be tested, without ``LEFT_OUT``."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [DISTRIBUTION]
    while waiting:
        name = _canonical(waiting.pop())
        if name in found or name in LEFT_OUT:
            continue
        try:
            distribution = _installed(name)
        except importlib.metadata.PackageNotFoundError:
            if name == DISTRIBUTION:
                raise HostError(
                    "A lab runs the Python environment that pykvm is installed in, and here it is not; "
                    "start ./scripts/test once, or install it with pip."
                ) from None
            continue  # an optional one, or one for another platform
        found[name] = distribution
        waiting += _requirements(distribution)
    return list(found.values())


def _installed(name: str) -> importlib.metadata.Distribution:
    """The installed distribution; PackageNotFoundError if there is none.

    ``python -m pykvm`` in a checkout finds the .egg-info first that lies there, which lists no files.
    """
    first = importlib.metadata.distribution(name)
    found = importlib.metadata.distributions(name=name)
    return next((each for each in found if each.read_text("RECORD") is not None), first)


def _packages() -> Iterator[Path]:
    scripts = Path(sysconfig.get_path("scripts"))
    yield from (scripts / name for name in _SCRIPTS if (scripts / name).exists())
    inside = Path(sys.prefix)
    for distribution in distributions():
        for file in distribution.files or ():
            path = Path(os.path.normpath(str(distribution.locate_file(file))))
            if path.parent == scripts or not path.is_relative_to(inside) or not path.is_file():
                continue
            if not _PACKAGE_LEFT_OUT & set(file.parts) and not _stale_bytecode(path):
                yield path


def python_files() -> list[Path]:
    """All files of the environment but shared libraries of the system, in a fixed order."""
    return list(dict.fromkeys((*_interpreter(), *_packages())))


def checkout() -> Path | None:
    """The folder of the sources if pykvm runs from a checkout, else None."""
    spec = importlib.util.find_spec("pykvm")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).resolve().parents[1]
    return folder if (folder / "pyproject.toml").is_file() and (folder / "tests").is_dir() else None


def project_files(folder: Path) -> list[Path]:
    """The files of a checkout that a lab has: the package, tests, guests, scripts, documents."""
    found: list[Path] = []
    for name in _PROJECT:
        path = folder / name
        if path.is_dir():
            found += _walk(path)
        elif path.exists():
            found.append(path)
    return found


def shared_libraries(files: Iterable[Path]) -> list[Path]:
    """What the ELF files among ``files`` load from the rest of the system, links and what they lead to.

    The dynamic loader lists it itself (``ld.so --list``).  HostError if it cannot be asked.
    """
    files = list(files)
    start = elf.loader(Path(os.path.realpath(sys.executable)))
    if start is None:
        return []  # a static interpreter has nothing to load
    found = dict.fromkeys(_links(Path(start)))
    for path in files:
        if path.suffix in _NEVER_ELF or path.is_symlink() or not elf.is_elf(path):
            continue
        try:
            done = subprocess.run(
                [start, "--list", str(path)],
                capture_output=True,
                text=True,
                timeout=_LIST_TIMEOUT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise HostError(f"{start} cannot list the interpreter's libraries ({error}).") from None
        for match in _LIBRARY.finditer(done.stdout):
            library = Path(os.path.normpath(match[1]))
            found |= dict.fromkeys((*_links(library), Path(os.path.realpath(library))))
    return sorted(set(found) - set(files))


def merged(path: Path) -> str:
    """A system file's name where /lib, /lib64 and /bin are links into /usr, as they are in a lab."""
    name = os.path.join(os.path.realpath(path.parent), path.name)
    return (
        name if name.startswith("/usr/") or not name.startswith(("/lib", "/bin", "/sbin")) else f"/usr{name}"
    )
