"""Building Bochs, with a source of a few lines and a compiler that copies a file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pykvm.errors import HostError
from pykvm.lab import bochs_build
from pykvm.lab.cache import Cache
from tests.lab.fake_archive import FakeArchive, package

SOURCE = {
    "memory/memory_stub.cc": "{\n  if (0) {\n    map();\n",
    "iodev/serial.cc": """\
    bx_pc_system.activate_timer(BX_SER_THIS s[port].tx_timer_index,
                                BX_SER_THIS s[port].databyte_usec,
                                0);
      bx_pc_system.activate_timer(BX_SER_THIS s[port].tx_timer_index,
                                  BX_SER_THIS s[port].databyte_usec,
                                  0);
    bx_pc_system.activate_timer(BX_SER_THIS s[port].rx_timer_index,
                                BX_SER_THIS s[port].databyte_usec,
""",
    "cpu/cpuid.h": "  virtual int rdmsr(Bit32u index, Bit64u *msr) { return -1; }\n",
    "cpu/vmx.cc": """\
  if (! check_CR4(guest.cr4)) {
  BX_CPU_THIS_PTR cr4.set32((Bit32u) guest.cr4);
  BX_CPU_THIS_PTR in_vmx_guest = true;
  if (! check_CR4(host_state->cr4)) {
  BX_CPU_THIS_PTR cr4.set32((Bit32u) host_state->cr4);
""",
    "pc_system.cc": "int bx_pc_system_c::Reset(unsigned type)\n{\n  set_enable_a20(1);\n",
    "bxversion.h": '#define VERSION       "3.0"\n',
    "config.h": "",
    "COPYING": "LGPL",
    "configure": "#!/bin/sh\nprintf 'all:\\n\\tcp /bin/true bochs\\n' > Makefile\n",
}
BIOS = {"bochsbios": {"usr/share/bochs/BIOS-bochs-latest": b"BIOS"}}

needs_make = pytest.mark.skipif(
    not (shutil.which("make") and shutil.which("strip")), reason="make or strip is not installed"
)


class SourceArchive(FakeArchive):
    """The archive with a source package of Bochs."""

    def __init__(self, cache: Cache, source: dict[str, str]) -> None:
        super().__init__(cache, [package("bochsbios")], BIOS)
        self.source = source
        self.sources = 0

    def fetch_source(self, name: str, folder: Path) -> Path:
        assert name == "bochs"
        self.sources += 1
        return write(self.source, folder / "tree" / "bochs-3.0")


def write(source: dict[str, str], tree: Path) -> Path:
    for name, text in source.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return tree


def test_the_patches(tmp_path: Path) -> None:
    tree = write(SOURCE, tmp_path)
    bochs_build.patch(tree)
    assert "if (host >= guest) {\n    map();" in (tree / "memory/memory_stub.cc").read_text()
    serial = (tree / "iodev/serial.cc").read_text()
    assert serial.count("tx_timer_index,\n                                1,\n") == 1
    assert serial.count("databyte_usec") == 1, "the receiver goes on as it was"
    vmx = (tree / "cpu/vmx.cc").read_text().splitlines()
    assert vmx[0].strip() == "BX_CPU_THIS_PTR cr4.set_LA57((guest.cr4 >> 12) & 1);"
    assert vmx[3].strip() == "BX_CPU_THIS_PTR linaddr_width = BX_CPU_THIS_PTR cr4.get_LA57() ? 57 : 48;"
    assert vmx[5].strip() == "handleInterruptMaskChange();"
    assert "cr4.set_LA57((host_state->cr4 >> 12) & 1);" in vmx[6]
    assert "0x1a0" in (tree / "cpu/cpuid.h").read_text()
    assert "the guest was reset" in (tree / "pc_system.cc").read_text()


@pytest.mark.parametrize("file", sorted({one.file for one in bochs_build.PATCHES}))
def test_a_source_that_has_changed_is_refused(tmp_path: Path, file: str) -> None:
    tree = write(SOURCE | {file: "something else\n"}, tmp_path)
    with pytest.raises(HostError, match=f"changed in {file}"):
        bochs_build.patch(tree)


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ({"make"}, r"g\+\+ is missing; install with 'apt install g\+\+'"),
        (set[str](), r"g\+\+ and make are missing; install with 'apt install g\+\+ make'"),
    ],
)
def test_a_missing_compiler_is_named(there: set[str], says: str) -> None:
    with pytest.raises(HostError, match=says):
        bochs_build.check_compiler(lambda program: f"/usr/bin/{program}" if program in there else None)


@needs_make
def test_it_is_built_once(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bochs_build, "check_compiler", lambda: None)
    archive = SourceArchive(cache, SOURCE)
    notes: list[str] = []
    assert bochs_build.find(cache) is None
    built = bochs_build.prepare(cache, notes.append, archive)
    assert built == bochs_build.find(cache) == bochs_build.prepare(cache, notes.append, archive)
    assert archive.sources == 1
    assert built.version == "3.0"
    assert built.bios.read_bytes() == b"BIOS"
    assert built.program.stat().st_mode & 0o111
    assert [path.name for path in (cache.root / "tools").iterdir()] == [built.folder.name], (
        "the work is freed"
    )
    assert notes[-1] == "Bochs is built."


@needs_make
def test_an_interrupted_build_goes_on(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time the source is there, patched and configured, and only make runs."""
    monkeypatch.setattr(bochs_build, "check_compiler", lambda: None)
    steps = "@test -e again || { touch again; echo error: disk; false; }"
    broken = f"#!/bin/sh\nprintf 'all:\\n\\t{steps}\\n\\tcp /bin/true bochs\\n' > Makefile\n"
    archive = SourceArchive(cache, SOURCE | {"configure": broken})
    with pytest.raises(HostError, match=r"failed in make \(error: disk\); the log is .*make\.log"):
        bochs_build.prepare(cache, lambda line: None, archive)
    assert bochs_build.find(cache) is None
    assert bochs_build.prepare(cache, lambda line: None, archive).program.is_file()
    assert archive.sources == 1


@needs_make
def test_a_step_that_hangs_is_ended(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    with pytest.raises(HostError, match="run the command again to go on"):
        bochs_build._run(("sleep", "60"), folder, {}, 0.3, lambda: None)


def test_another_recipe_is_another_build(monkeypatch: pytest.MonkeyPatch) -> None:
    before = bochs_build.recipe()
    monkeypatch.setattr(bochs_build, "CONFIGURE", (*bochs_build.CONFIGURE, "--enable-smp"))
    assert bochs_build.recipe() != before
