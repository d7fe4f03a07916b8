"""The layers of a lab's file system, each a cpio archive; all but the last are kept in the cache.

    base        busybox, /init, the kernel's modules              per kernel and modules
    python      interpreter, standard library, packages           per environment
    project     the checkout that pykvm runs from                 per state of the checkout
    run         the command, its files                            per run, in the run's own folder

A layer's name is a digest of what went into it (paths, sizes, times), so a changed file makes a new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import py_compile
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from pykvm.errors import HostError, UsageError
from pykvm.lab import environment
from pykvm.lab.cache import Cache, Note
from pykvm.lab.cpio import CpioWriter
from pykvm.lab.init import BASE_FILES, BASE_FOLDERS, BASE_LINKS, BOOT
from pykvm.lab.kernels import PreparedKernel
from pykvm.lab.modules import closure

WORK = "/lab/work"
OUT = "/lab/out"
COMMAND = "/lab/command.json"
_FORMAT = "1"  # counts up when a layer is written differently


def _digest(*parts: object) -> str:
    return hashlib.sha256(os.fsencode("\0".join(map(str, (_FORMAT, *parts))))).hexdigest()[:20]


def _state(files: Iterable[Path]) -> str:
    """Changes whenever a file comes, goes, grows or is written."""
    lines = []
    for path in files:
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue  # an editor's or a compiler's scratch file, gone since it was listed
        lines.append(f"{path}\t{found.st_size}\t{found.st_mtime_ns}\t{found.st_mode}")
    return _digest(*lines)


def _environment() -> tuple[list[Path], str]:
    """The environment's files and their state; HostError if this user cannot read them."""
    try:
        files = environment.python_files()
        return files, _state(files)
    except OSError as error:
        raise HostError(
            f"A lab gets a copy of this Python, and {error.filename} cannot be read ({error.strerror}); "
            "use an interpreter that your user can read."
        ) from None


def base(
    cache: Cache, kernel: PreparedKernel, busybox: Path, wanted: Sequence[str]
) -> tuple[Path, tuple[str, ...]]:
    """The first layer, and the names of the modules in it in the order in which they load."""
    modules = closure(kernel.modules, wanted)
    name = _digest(
        kernel.release, kernel.enforce, busybox, *BASE_FILES.items(), *(module.name for module in modules)
    )
    target = cache.folder("layers") / f"base-{kernel.release}-{name}.cpio"

    def make(scratch: Path) -> None:
        with scratch.open("wb") as output, CpioWriter(output) as archive:
            for folder in BASE_FOLDERS:
                archive.folder(folder, 0o1777 if folder == "/tmp" else 0o755)
            for link, to in BASE_LINKS.items():
                archive.link(link, to)
            archive.device("/dev/console", 5, 1)
            archive.file("/usr/bin/busybox", busybox.read_bytes(), 0o755)
            for applet in _applets(busybox):
                archive.link(f"/usr/bin/{applet}", "busybox")
            for file, (text, mode) in BASE_FILES.items():
                archive.file(file, text.encode(), mode)
            for module in modules:
                chosen = module if kernel.enforce else module.unsigned
                archive.file(f"/lab/modules/{module.name}.ko", chosen.data)

    return cache.provide(target, make), tuple(module.name for module in modules)


def _applets(busybox: Path) -> list[str]:
    try:
        done = subprocess.run([busybox, "--list"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise HostError(
            f"The lab's busybox cannot run here ({error}); run 'pykvm lab clean --tools' and try again."
        ) from None
    return done.stdout.split()


def python(cache: Cache, note: Note) -> Path:
    """The layer with the environment that runs now; ``note`` hears of it when it has to be packed."""
    files, state = _environment()
    target = cache.folder("layers") / f"python-{state}.cpio"

    def make(scratch: Path) -> None:
        note("Packing this Python environment for labs; this is done once.")
        with scratch.open("wb") as output, CpioWriter(output) as archive:
            _add_all(archive, files)
            for library in environment.shared_libraries(files):
                archive.copy(library, environment.merged(library))

    return cache.provide(target, make)


def project(cache: Cache) -> Path | None:
    """The layer with the checkout that pykvm runs from; None if it is installed like any other package."""
    folder = environment.checkout()
    if folder is None:
        return None
    files = environment.project_files(folder)
    target = cache.folder("layers") / f"project-{_state(files)}.cpio"

    def make(scratch: Path) -> None:
        with scratch.open("wb") as output, CpioWriter(output) as archive:
            _add_all(archive, files)

    return cache.provide(target, make)


def _add_all(archive: CpioWriter, files: Sequence[Path]) -> None:
    """All files, and bytecode for sources that have none, since an emulated processor compiles slowly."""
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # as in _state
            archive.copy(path)
    with tempfile.TemporaryDirectory() as scratch:
        compiled = Path(scratch, "compiled.pyc")
        for path in files:
            if path.suffix != ".py" or path.is_symlink():
                continue
            name = importlib.util.cache_from_source(str(path))
            if name in archive:
                continue
            try:
                py_compile.compile(str(path), str(compiled), dfile=str(path), doraise=True)
            except (py_compile.PyCompileError, ValueError, FileNotFoundError):
                continue  # templates and samples that are not meant to compile, and what is gone again
            archive.file(name, compiled.read_bytes())


def run(target: Path, command: str, boot: str, put: Sequence[Path]) -> Path:
    """The layer of one run: ``command`` (JSON for the agent), ``boot`` (for /init), the ``put`` files.

    Raises UsageError for what cannot be put there, OSError if ``target`` cannot be written.
    """
    names: set[str] = set()
    with target.open("wb") as output, CpioWriter(output) as archive:
        archive.folder(WORK)
        archive.folder(OUT)
        archive.file(COMMAND, command.encode())
        archive.file(BOOT, os.fsencode(boot))
        for given in put:
            source = Path(os.path.abspath(given))  # '..' has a name of its own then
            if not (source.is_file() or (source.is_dir() and source.name)):
                raise UsageError(f"--put {given}: there is no such file or folder.")
            if source.name in names:
                raise UsageError(
                    f"--put: two files named {source.name} would overwrite each other in the lab."
                )
            names.add(source.name)
            try:
                _add_tree(archive, source, f"{WORK}/{source.name}")
            except (PermissionError, FileNotFoundError) as error:
                raise UsageError(f"--put {given}: cannot read {error.filename} ({error.strerror}).") from None
            except ValueError as error:
                raise UsageError(f"--put {given}: {error}.") from None
    return target


def _add_tree(archive: CpioWriter, source: Path, name: str) -> None:
    if not source.is_dir():
        archive.copy(source.resolve(), name)
        return

    def refuse(error: OSError) -> None:
        raise error

    archive.folder(name)
    for above, folders, files in os.walk(source, onerror=refuse):
        inside = f"{name}/{Path(above).relative_to(source)}".removesuffix("/.")
        for entry in (*folders, *files):
            archive.copy(Path(above, entry), f"{inside}/{entry}")
