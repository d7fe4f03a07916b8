"""Builds Bochs from Debian's source package, once: Debian's own build of it has no VMX.

The compiler's work is kept while it is unfinished, so an interrupted build goes on where it was.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pykvm.errors import HostError
from pykvm.lab.archive import Archive
from pykvm.lab.cache import Cache, remove
from pykvm.lab.tether import tethered

Note = Callable[[str], None]
Watch = Callable[[], None]

DOWNLOAD_BYTES: Final = 4_030_000
"""Source and BIOS, roughly; the lists of the source packages are 10 MB more when they are fetched first."""
BUILD_SECONDS: Final = 240
"""On two cores of about 2020, roughly."""

CONFIGURE: Final = (
    "--enable-cpu-level=6",
    "--enable-x86-64",
    "--enable-vmx=2",
    "--enable-svm",
    "--enable-avx",
    "--enable-evex",
    "--enable-protection-keys",
    "--enable-cet",
    "--enable-monitor-mwait",
    "--enable-perfmon",
    "--enable-memtype",
    "--enable-pci",
    "--enable-all-optimizations",
    "--enable-repeat-speedups",
    "--enable-fast-function-calls",
    "--enable-handlers-chaining",
    "--enable-trace-linking",
    "--disable-large-ramfile",
    "--disable-assert-checks",
    "--disable-smp",
    "--disable-debugger",
    "--disable-plugins",
    "--disable-readline",
    "--disable-xpm",
    "--disable-docbook",
    "--with-nogui",
)
FLAGS: Final = "-O3 -fomit-frame-pointer -fno-plt -w"

_BIOS: Final = "usr/share/bochs/BIOS-bochs-latest"
_OBJECTS: Final = 300  # roughly what make compiles
_CONFIGURE_TIMEOUT: Final = 600.0
_MAKE_TIMEOUT: Final = 3600.0
_TELL_EVERY: Final = 10.0
_VERSION = re.compile(r'^#define\s+VERSION\s+"(\d+(?:\.\d+)*)', re.MULTILINE)


@dataclass(frozen=True)
class Patch:
    """A regular expression that matches ``times`` times in a source file, and what the matches become."""

    file: str
    pattern: str
    replacement: str
    times: int = 1


PATCHES: Final = (
    # RAM images are read in one go, which is right only if guest memory is one piece of host memory.
    Patch("memory/memory_stub.cc", r"\n  if \(0\) \{\n", "\n  if (host >= guest) {\n"),
    # A byte leaves the serial port after a microsecond instead of 87: the wire carries megabytes.
    Patch(
        "iodev/serial.cc",
        r"(activate_timer\(BX_SER_THIS s\[port\]\.tx_timer_index,\s*)BX_SER_THIS s\[port\]\.databyte_usec,",
        r"\g<1>1,",
        2,
    ),
    # IA32_MISC_ENABLE says that string instructions are fast, or Linux copies memory without them, which is
    # slower here.  MPERF and APERF, which Linux reads at each tick, are 0 without a word in the log.
    Patch(
        "cpu/cpuid.h",
        r"virtual int rdmsr\(Bit32u index, Bit64u \*msr\) \{ return -1; \}",
        """virtual int rdmsr(Bit32u index, Bit64u *msr) {
    *msr = (index == 0x1a0);
    return (index == 0x1a0 || index == 0xe7 || index == 0xe8) ? 1 : -1;
  }""",
    ),
    # A guest that resets itself has ended; the BIOS cannot even start it again, since it writes the locked
    # IA32_FEATURE_CONTROL.
    Patch(
        "pc_system.cc",
        r"int bx_pc_system_c::Reset\(unsigned type\)\n\{\n",
        r"""\g<0>  static bool started = false;
  if (started) {
    bx_user_quit = 1;
    BX_FATAL(("the guest was reset"));
  }
  started = true;
""",
    ),
    # VM entry and exit may change CR4.LA57 even in long mode; Bochs takes that for a fault of its own, stops,
    # and would go on with the width of linear addresses of the other side.
    Patch(
        "cpu/vmx.cc",
        r"  if \(! check_CR4\((guest\.|host_state->)cr4\)\) \{",
        r"  BX_CPU_THIS_PTR cr4.set_LA57((\1cr4 >> 12) & 1);\n\g<0>",
        2,
    ),
    Patch(
        "cpu/vmx.cc",
        r"  BX_CPU_THIS_PTR cr4\.set32\(\(Bit32u\) (?:guest\.|host_state->)cr4\);",
        r"\g<0>\n  BX_CPU_THIS_PTR linaddr_width = BX_CPU_THIS_PTR cr4.get_LA57() ? 57 : 48;",
        2,
    ),
    # The host's interrupts end a guest whose RFLAGS.IF is clear, too.  VM entry decides about that before it
    # notes that this is a guest, so that such a guest ran for ever and the host stood still.
    Patch(
        "cpu/vmx.cc",
        r"  BX_CPU_THIS_PTR in_vmx_guest = true;\n",
        r"\g<0>  handleInterruptMaskChange();\n",
    ),
)


@dataclass(frozen=True)
class Built:
    """A folder with the program, the BIOS and the licence."""

    folder: Path

    @property
    def program(self) -> Path:
        return self.folder / "bochs"

    @property
    def bios(self) -> Path:
        return self.folder / "bios.bin"

    @property
    def version(self) -> str:
        return (self.folder / "VERSION").read_text().strip()


def recipe() -> str:
    """Changes whenever the build is done differently."""
    return hashlib.sha256(repr((CONFIGURE, FLAGS, PATCHES, _BIOS)).encode()).hexdigest()[:12]


def find(cache: Cache) -> Built | None:
    """Bochs if it was built."""
    built = Built(cache.root / "tools" / f"bochs-{recipe()}")
    return built if built.program.is_file() else None


def prepare(cache: Cache, note: Note, archive: Archive | None = None) -> Built:
    """Bochs, built if it was not, which takes minutes.

    Raises HostError if there is no compiler, no archive, or the build fails.
    """
    if found := find(cache):
        return found
    check_compiler()
    target = cache.folder("tools") / f"bochs-{recipe()}"

    def make(scratch: Path) -> None:
        _build(cache.folder("tools") / f".{target.name}.work", scratch, archive or Archive(cache, note), note)

    cache.provide(target, make, note)
    return Built(target)


def check_compiler(search: Callable[[str], str | None] = shutil.which) -> None:
    """HostError names the compiler or make if one is missing, and how to install it."""
    missing = [program for program in ("g++", "make") if search(program) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise HostError(
            f"Labs with Intel's KVM run in Bochs, which is built here once, and {' and '.join(missing)} "
            f"{verb} missing; install with 'apt install {' '.join(missing)}'."
        )


def patch(tree: Path) -> None:
    """Change the source; HostError if it is not the one that the patches are for."""
    for one in PATCHES:
        path = tree / one.file
        text, times = re.subn(one.pattern, one.replacement, path.read_text())
        if times != one.times:
            raise HostError(
                f"Debian's Bochs has changed in {one.file}, so this pykvm cannot build it; update pykvm, "
                "or use the kinds of AMD's KVM."
            )
        path.write_text(text)


def _build(work: Path, scratch: Path, archive: Archive, note: Note) -> None:
    tree = work / "bochs"
    if not (work / "configured").exists():
        remove(work)
        note("Fetching the source of Bochs (4 MB).")
        archive.fetch_source("bochs", work / "source").rename(tree)
        patch(tree)
        with archive.fetch(archive.closure(["bochsbios"]), "bochsbios") as debs:
            for deb in debs:
                archive.unpack(deb, work / "bios")
        note("Configuring Bochs.")
        environment = {"CFLAGS": FLAGS, "CXXFLAGS": FLAGS}
        _run(("./configure", *CONFIGURE), tree, environment, _CONFIGURE_TIMEOUT, lambda: None)
        (work / "configured").touch()
    jobs = len(os.sched_getaffinity(0))
    note(f"Building Bochs with {jobs} jobs, once; this takes some minutes.")
    told = time.monotonic()

    def tell() -> None:
        nonlocal told
        if time.monotonic() - told >= _TELL_EVERY:
            told = time.monotonic()
            done = sum(1 for _ in tree.rglob("*.o"))
            note(f"Building Bochs: {min(99, 100 * done // _OBJECTS)} %.")

    _run(("make", f"-j{jobs}"), tree, {}, _MAKE_TIMEOUT, tell)
    scratch.mkdir()
    _run(("strip", "-o", str(scratch / "bochs"), "bochs"), tree, {}, 60.0, lambda: None)
    shutil.copyfile(work / "bios" / _BIOS, scratch / "bios.bin")
    shutil.copyfile(tree / "COPYING", scratch / "COPYING")
    found = _VERSION.search((tree / "bxversion.h").read_text() + (tree / "config.h").read_text())
    (scratch / "VERSION").write_text((found[1] if found else "3") + "\n")
    remove(work)
    note("Bochs is built.")


def _run(
    command: Sequence[str],
    folder: Path,
    environment: dict[str, str],
    timeout: float,
    watch: Callable[[], None],
) -> None:
    """Run a step of the build with its output in a log beside; the whole group of processes ends with it."""
    log = folder.parent / f"{Path(command[0]).name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            tethered(command),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "LC_ALL": "C", **environment},
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + timeout
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise HostError(
                        f"Building Bochs took more than {timeout:.0f} s; run the command again to go on."
                    )
                watch()
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        worst = next((line for line in lines if "error" in line.lower()), "".join(lines[-1:]))
        step = Path(command[0]).name
        raise HostError(f"Building Bochs failed in {step} ({worst or 'it said nothing'}); the log is {log}.")
