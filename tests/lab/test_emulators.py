"""Which emulator a kind gets, and QEMU's command line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pykvm.errors import HostError
from pykvm.lab import emulators, qemu
from pykvm.lab.cache import Cache
from pykvm.lab.emulator import Boot
from pykvm.lab.kinds import KINDS, kind
from pykvm.lab.qemu import Qemu, nested_vendor
from tests.lab.fake_emulator import kernel


def machine(folder: Path, *, flags: str, vendor: str = "", nested: str = "") -> tuple[Path, Path]:
    (folder / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse\nbugs\t\t: svm\n")
    if vendor:
        parameters = folder / "module" / f"kvm_{vendor}" / "parameters"
        parameters.mkdir(parents=True)
        (parameters / "nested").write_text(f"{nested}\n")
    return folder / "cpuinfo", folder / "module"


@pytest.mark.parametrize(
    ("flags", "vendor", "nested", "found"),
    [
        ("svm", "amd", "1", "amd"),
        ("vmx", "intel", "Y", "intel"),
        ("svm", "amd", "0", None),
        ("vmx", "intel", "N", None),
        ("", "amd", "1", None),
        ("svm", "", "", None),
        ("vmx", "amd", "1", None),
    ],
)
def test_nested_virtualization_takes_flag_module_and_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, vendor: str, nested: str, found: str | None
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    assert nested_vendor(*machine(tmp_path, flags=flags, vendor=vendor, nested=nested)) == found


def test_without_a_usable_device_there_is_no_nesting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert nested_vendor(*machine(tmp_path, flags="svm", vendor="amd", nested="1")) is None


@pytest.mark.parametrize(
    ("vendor", "name", "accel", "slug"),
    [
        ("amd", "amd-shadow", "auto", "qemu-kvm"),
        ("amd", "amd-npt", "emulate", "qemu-tcg"),
        ("intel", "amd-npt", "auto", "qemu-tcg"),
        (None, "amd-npt", "auto", "qemu-tcg"),
        ("intel", "intel-ept-nopml", "auto", "qemu-kvm"),
        ("intel", "intel-ept", "kvm", "qemu-kvm"),
    ],
)
def test_kvm_is_taken_where_it_can_carry_the_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str | None, name: str, accel: str, slug: str
) -> None:
    monkeypatch.setattr(qemu, "nested_vendor", lambda: vendor)
    monkeypatch.setattr(emulators, "qemu", lambda cache, note: (("qemu",), "10.0"))
    assert accel in ("auto", "emulate", "kvm")
    chosen = emulators.choose(Cache(tmp_path), kind(name), accel, lambda line: None)  # type: ignore[arg-type]
    assert chosen.slug == slug


@pytest.mark.parametrize("vendor", [None, "intel"])
def test_kvm_that_was_asked_for_and_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str | None
) -> None:
    monkeypatch.setattr(qemu, "nested_vendor", lambda: vendor)
    with pytest.raises(HostError, match="use --accel emulate"):
        emulators.choose(Cache(tmp_path), kind("amd-npt"), "kvm", lambda line: None)


def test_qemu_gets_all_layers_one_after_the_other(tmp_path: Path) -> None:
    folder = tmp_path / "run, one"
    folder.mkdir()
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 5000)
    boot = Boot(folder, kernel(tmp_path / "k"), (tmp_path / "a", tmp_path / "b"), ("quiet", "panic=-1"), 777)
    launch = Qemu(("qemu",), "10.0.13", "tcg").launch(boot)
    assert (folder / "initrd").read_bytes() == b"a" * 5000 + b"b" * 5000
    line = list(launch.argv)
    assert line[line.index("-append") + 1] == "quiet panic=-1"
    assert line[line.index("-m") + 1] == "777M"
    assert line[line.index("-cpu") + 1] == "max,+svm"
    assert line[line.index("-smp") + 1] == "1"
    assert f"file,id=wire,path={str(launch.wire).replace(',', ',,')}" in line
    assert launch.wire.exists()


def test_kinds_name_real_parameters_of_the_right_modules() -> None:
    for one in KINDS.values():
        assert set(one.parameters) <= {"kvm", one.module}
        assert one.name.startswith(one.vendor)
