"""The Python environment as a list of files, and the layers made of it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from pykvm.errors import HostError
from pykvm.lab import elf, environment, layers
from pykvm.lab.cache import Cache
from pykvm.lab.cpio import CpioWriter
from tests.lab import newc
from tests.lab.fake_emulator import kernel


@pytest.fixture(scope="module")
def files() -> list[Path]:
    return environment.python_files()


def test_it_holds_interpreter_standard_library_and_packages(files: list[Path]) -> None:
    named = set(map(str, files))
    assert sys.executable in named
    assert os.path.realpath(sys.executable) in named
    for module in ("json", "click", "cffi", "_cffi_backend", "numpy", "capstone", "ptrace", "pytest"):
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        assert spec.origin in named, module
    assert str(Path(sysconfig.get_path("scripts"), "pykvm")) in named


def test_it_leaves_out_what_no_guest_needs(files: list[Path]) -> None:
    names = {path.name for path in files}
    assert "ruff" not in names
    assert not any(path.parts[-2:] == ("mypy", "main.py") for path in files)
    assert not any(name.endswith(".opt-1.pyc") or name.startswith("_tkinter.") for name in names)
    assert sum(path.stat().st_size for path in files if path.is_file()) < 400 << 20


def test_every_library_that_an_extension_loads_is_there(files: list[Path]) -> None:
    libraries = environment.shared_libraries(files)
    present = {environment.merged(path) for path in libraries} | set(map(str, files))
    spec = importlib.util.find_spec("_ctypes")
    assert spec is not None
    assert spec.origin is not None
    listed = subprocess.run(
        ["ldd", spec.origin], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    for line in listed.splitlines():
        if "=> /" in line:
            path = line.split("=> ")[1].split()[0]
            assert environment.merged(Path(path)) in present
            assert environment.merged(Path(os.path.realpath(path))) in present


def test_system_libraries_have_the_name_that_a_merged_system_gives_them(tmp_path: Path) -> None:
    assert environment.merged(Path("/usr/lib/x/liba.so")) == "/usr/lib/x/liba.so"
    if Path("/lib").is_symlink():
        assert environment.merged(Path("/lib/libnone.so")) == "/usr/lib/libnone.so"
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert environment.merged(tmp_path / "link" / "liba.so") == str(tmp_path / "real" / "liba.so")


def test_distributions_follow_requirements_but_not_foreign_extras() -> None:
    names = {one.metadata["Name"].lower() for one in environment.distributions()}
    assert {"pykvm-harness", "click", "pycparser", "pytest", "pluggy"} <= names
    assert not names & environment.LEFT_OUT
    assert "unicorn" not in names, "the bench extra"


def test_a_pykvm_that_is_not_installed_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(HostError, match=r"\./scripts/test"):
        environment.distributions()


# --- layers --------------------------------------------------------------------------------------


def test_what_lies_in_the_current_folder_is_not_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = environment.python_files()
    left = tmp_path / "pykvm_harness.egg-info"
    left.mkdir()
    (left / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: pykvm-harness\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert environment.python_files() == expected


def test_the_checkout_comes_with_bytecode_for_every_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "checkout" / "pykvm" / "new.py"
    source.parent.mkdir(parents=True)
    source.write_text("VALUE = 1\n")
    (source.parent / "broken.py").write_text("def\n")
    monkeypatch.setattr(environment, "checkout", lambda: tmp_path / "checkout")
    cache = Cache(tmp_path / "cache")
    layer = layers.project(cache)
    assert layer is not None
    found = newc.read(layer.read_bytes())
    assert found[str(source).strip("/")].data == b"VALUE = 1\n"
    compiled = found[importlib.util.cache_from_source(str(source)).strip("/")].data
    # PEP 552: magic, flags, the source's time and size, which the import system compares.
    assert compiled[:4] == importlib.util.MAGIC_NUMBER
    assert int.from_bytes(compiled[8:12], "little") == int(source.stat().st_mtime)
    assert int.from_bytes(compiled[12:16], "little") == source.stat().st_size
    assert str(source.parent / "broken.py").strip("/") in found
    assert layers.project(cache) == layer, "nothing changed, so nothing is packed again"
    source.write_text("VALUE = 22\n")
    assert layers.project(cache) != layer


def test_the_base_layer_starts_modules_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busybox = tmp_path / "busybox"
    busybox.write_text("#!/bin/sh\nprintf 'sh\\nmount\\n'\n")
    busybox.chmod(0o755)
    layer, modules = layers.base(Cache(tmp_path / "cache"), kernel(tmp_path / "k"), busybox, ["kvm"])
    found = newc.read(layer.read_bytes())
    assert modules == ()  # the kernel of the fake has no module files at all
    assert found["init"].fields["mode"] == stat.S_IFREG | 0o755
    assert found["usr/bin/mount"].data == b"busybox"
    assert found["lib"].data == b"usr/lib"
    assert found["tmp"].fields["mode"] & 0o7777 == 0o1777


def test_folders_are_put_with_all_that_is_in_them(tmp_path: Path) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "file").write_text("x")
    (tmp_path / "data" / "link").symlink_to("deep/file")
    (tmp_path / "pointer").symlink_to("data/deep/file")
    layer = layers.run(tmp_path / "run.cpio", "{}", "A=1\n", [tmp_path / "data", tmp_path / "pointer"])
    found = newc.read(layer.read_bytes())
    assert found["lab/work/data/deep/file"].data == b"x"
    assert found["lab/work/data/link"].data == b"deep/file"
    assert found["lab/work/pointer"].data == b"x", "a file that is put by a link is the file"
    assert found["lab/boot"].data == b"A=1\n"


def test_the_loader_is_read_from_the_program(tmp_path: Path) -> None:
    found = elf.loader(Path(os.path.realpath(sys.executable)))
    listed = subprocess.run(
        ["ldd", sys.executable], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    assert found is not None
    assert found in listed
    (tmp_path / "script").write_text("#!/bin/sh\n")
    assert elf.loader(tmp_path / "script") is None


def test_an_interpreter_that_cannot_be_read_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> list[Path]:
        raise PermissionError(13, "Permission denied", "/root/python3")

    monkeypatch.setattr(environment, "python_files", refused)
    with pytest.raises(HostError, match=r"/root/python3 cannot be read \(Permission denied\)"):
        layers.python(Cache(tmp_path), print)


def test_a_file_that_vanishes_while_the_layer_is_made_is_no_reason_to_stop(tmp_path: Path) -> None:
    """Editors and compilers write scratch files into a checkout all the time."""
    there, gone = tmp_path / "there.py", tmp_path / "there.cpython-311.pyc.1234"
    there.write_text("1")
    assert layers._state([there, gone]) == layers._state([there])
    target = tmp_path / "layer"
    with target.open("wb") as output, CpioWriter(output) as archive:
        layers._add_all(archive, [there, gone, tmp_path / "gone.py"])
    names = [Path(name).name for name, entry in newc.read(target.read_bytes()).items() if entry.data]
    assert names == ["there.py", Path(importlib.util.cache_from_source(str(there))).name]


def test_names_that_are_no_text_have_a_state(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff")
    path.touch()
    assert layers._state([path]) != layers._state([])
