"""Kernel modules: order, compression, signatures.  The samples are ELF files that ``as`` made."""

from __future__ import annotations

import lzma
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from pykvm.errors import HostError
from pykvm.lab.modules import closure, modinfo

pytestmark = pytest.mark.skipif(shutil.which("as") is None, reason="the samples need binutils' assembler")

MARK = b"~Module signature appended~\n"


def module(folder: Path, name: str, depends: str = "") -> bytes:
    fields = ("license=GPL", f"depends={depends}", f"name={name}")
    source = '.section .modinfo,"a"\n' + "".join(f'.asciz "{field}"\n' for field in fields)
    target = folder / "made.o"
    subprocess.run(["as", "-o", target, "-"], input=source.encode(), check=True, timeout=30)
    return target.read_bytes()


def test_modinfo_is_read_from_the_section(tmp_path: Path) -> None:
    assert dict(modinfo(module(tmp_path, "kvm_amd", "kvm,ccp"))) == {
        "license": "GPL",
        "depends": "kvm,ccp",
        "name": "kvm_amd",
    }


def test_each_comes_after_what_it_needs(tmp_path: Path) -> None:
    tree = tmp_path / "modules"
    (tree / "kvm").mkdir(parents=True)
    (tree / "kvm" / "kvm-amd.ko").write_bytes(module(tmp_path, "kvm_amd", "kvm,ccp"))
    (tree / "kvm" / "kvm.ko.xz").write_bytes(lzma.compress(module(tmp_path, "kvm", "irqbypass")))
    (tree / "irqbypass.ko.xz").write_bytes(lzma.compress(module(tmp_path, "irqbypass")))
    (tree / "ccp.ko").write_bytes(module(tmp_path, "ccp"))
    (tree / "unrelated.ko").write_bytes(module(tmp_path, "unrelated"))
    found = closure(tree, ["virtio_pci", "kvm_amd", "kvm"])  # virtio_pci is built into this kernel
    assert [one.name for one in found] == ["irqbypass", "kvm", "ccp", "kvm_amd"]
    assert all(one.data.startswith(b"\x7fELF") for one in found)


def test_a_missing_dependency_names_both_and_the_remedy(tmp_path: Path) -> None:
    tree = tmp_path / "modules"
    tree.mkdir()
    (tree / "kvm-amd.ko").write_bytes(module(tmp_path, "kvm_amd", "ccp"))
    with pytest.raises(HostError, match=r"ccp that kvm_amd needs; run 'pykvm lab clean --kernels'"):
        closure(tree, ["kvm_amd"])


def test_the_signature_goes_and_nothing_else(tmp_path: Path) -> None:
    plain = module(tmp_path, "kvm")
    signature = b"s" * 300
    tail = struct.pack(">BBBBB3xI", 0, 0, 2, 0, 0, len(signature))  # struct module_signature
    (tmp_path / "kvm.ko").write_bytes(plain + signature + tail + MARK)
    (found,) = closure(tmp_path, ["kvm"])
    assert found.signed
    assert found.unsigned.data == plain
    assert not found.unsigned.signed
    assert found.unsigned.unsigned.data == plain
