"""One boot of a lab, from the host's side, with a guest that a script plays."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pykvm.errors import HostError, LabDiedError, LabTimeoutError, UsageError
from pykvm.lab import layers, session
from pykvm.lab.cache import Cache, Cleaned
from pykvm.lab.emulator import Boot, Launch
from pykvm.lab.kinds import kind
from tests.lab import newc
from tests.lab.fake_emulator import FakeEmulator, kernel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """A cache whose layers are small."""
    monkeypatch.setattr(session, "busybox", lambda cache, note: Path("/bin/true"))
    monkeypatch.setattr("pykvm.lab.layers._applets", lambda busybox: ["sh"])
    monkeypatch.setattr("pykvm.lab.environment.python_files", list)
    monkeypatch.setattr("pykvm.lab.environment.checkout", lambda: None)
    return Cache(tmp_path / "cache")


class Taken:
    """What reached the sinks."""

    def __init__(self) -> None:
        self.stdout = b""
        self.stderr = b""
        self.records: list[bytes] = []

    def sinks(self) -> session.Sinks:
        def out(data: bytes) -> None:
            self.stdout += data

        def err(data: bytes) -> None:
            self.stderr += data

        return session.Sinks(out, err, self.records.append)


def spec(tmp_path: Path, **changes: Any) -> session.RunSpec:
    return session.RunSpec(
        **{
            "kernel": kernel(tmp_path / "kernel"),
            "kind": kind("amd-npt"),
            "command": ("true",),
            "timeout": 30.0,
            **changes,
        }
    )


def left_running(cache: Cache) -> list[str]:
    """Command lines of processes that know the cache."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(cache.root) in line:
            found.append(line)
    return found


def test_output_records_files_and_status_come_back(cache: Cache, tmp_path: Path) -> None:
    script = """
import io, tarfile
ready()
send(Frame.STDOUT, b"one "); send(Frame.STDERR, b"two"); send(Frame.STDOUT, b"three")
send(Frame.RECORD, b"{}")
packed = io.BytesIO()
with tarfile.open(mode="w:gz", fileobj=packed) as archive:
    entry = tarfile.TarInfo("./deep/result.txt"); entry.size = 6
    archive.addfile(entry, io.BytesIO(b"result"))
data = packed.getvalue()
send(Frame.FILES, data[:20]); send(Frame.FILES, data[20:])
send(Frame.EXIT, b"42")
time.sleep(60)
"""
    taken = Taken()
    started = time.monotonic()
    result = session.run(cache, FakeEmulator(script), spec(tmp_path, out=tmp_path / "out"), taken.sinks())
    assert (result.status, result.emulator, result.slug, result.release) == (
        42,
        "Fake 1.0",
        "fake",
        "9.9.1-cloud",
    )
    assert (taken.stdout, taken.stderr, taken.records) == (b"one three", b"two", [b"{}"])
    assert (tmp_path / "out" / "deep" / "result.txt").read_text() == "result"
    assert time.monotonic() - started < 50, "nobody waits for the guest's power-off"
    assert not left_running(cache)
    assert list((cache.root / "runs").iterdir()) == []


def test_output_takes_no_disk_once_it_was_passed_on(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that prints for hours must not fill the disk."""
    monkeypatch.setattr(session, "_WIRE_KEPT", 1 << 20)
    script = """
ready()
for number in range(16): send(Frame.STDOUT, bytes([number]) * (1 << 20))
until = time.monotonic() + 10
while (used := os.stat(sys.argv[2]).st_blocks * 512) > 2 << 20 and time.monotonic() < until: time.sleep(0.05)
send(Frame.EXIT, b"0" if used <= 2 << 20 else b"1")
"""
    taken = Taken()
    assert session.run(cache, FakeEmulator(script), spec(tmp_path), taken.sinks()).status == 0
    assert taken.stdout == b"".join(bytes([number]) * (1 << 20) for number in range(16))


def test_the_guest_is_asked_for_what_the_run_needs(cache: Cache, tmp_path: Path) -> None:
    emulator = FakeEmulator("ready(); send(Frame.EXIT, b'0')")
    asked = spec(tmp_path, kernel=kernel(tmp_path / "kernel", enforce=True))
    session.run(cache, emulator, asked, Taken().sinks())
    (boot,) = emulator.boots
    assert boot.memory == 1234
    assert "module.sig_enforce=1" in boot.append
    assert boot.layers[-1].parent == boot.folder


def test_an_unknown_parameter_is_no_kind(cache: Cache, tmp_path: Path) -> None:
    script = "ready(kvm={'halt_poll_ns': '200000'}); time.sleep(60)"
    with pytest.raises(LabDiedError, match="kvm has no parameter 'tdp_mmu', so it cannot be amd-npt-oldmmu"):
        session.run(cache, FakeEmulator(script), spec(tmp_path, kind=kind("amd-npt-oldmmu")), Taken().sinks())


@pytest.mark.parametrize(("value", "fits"), [("N", True), ("0", True), ("Y", False)])
def test_the_kind_is_held_against_the_guests_parameters(
    cache: Cache, tmp_path: Path, value: str, fits: bool
) -> None:
    script = f"ready(kvm_amd={{'npt': {value!r}}}); time.sleep(0.3); send(Frame.EXIT, b'0')"
    asked = spec(tmp_path, kind=kind("amd-shadow"))
    if fits:
        assert session.run(cache, FakeEmulator(script), asked, Taken().sinks()).status == 0
    else:
        with pytest.raises(LabDiedError, match=r"kvm_amd\.npt is Y although 0 was asked for"):
            session.run(cache, FakeEmulator(script), asked, Taken().sinks())


def test_a_command_that_takes_too_long_is_ended(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(LabTimeoutError, match=r"within 0\.5 s") as caught:
        session.run(
            cache, FakeEmulator("ready(); time.sleep(60)"), spec(tmp_path, timeout=0.5), Taken().sinks()
        )
    assert caught.value.exit_status == 123
    assert not left_running(cache)


def test_a_guest_that_falls_silent_is_dead_and_one_that_speaks_is_not(cache: Cache, tmp_path: Path) -> None:
    silent = "ready(); time.sleep(60)"
    with pytest.raises(LabDiedError, match=r"it stood still, with nothing to hear from it for 1 s\."):
        session.run(cache, FakeEmulator(silent), spec(tmp_path, silence=1.0), Taken().sinks())
    speaks = """
ready()
for _ in range(5): time.sleep(0.5); send(Frame.RECORD, b"{}")
send(Frame.EXIT, b"0")
"""
    assert session.run(cache, FakeEmulator(speaks), spec(tmp_path, silence=2.0), Taken().sinks()).status == 0


def test_a_guest_that_never_starts_its_command_is_dead(cache: Cache, tmp_path: Path) -> None:
    emulator = FakeEmulator("console.write(b'booting\\n'); time.sleep(60)", boot_timeout=1.0)
    with pytest.raises(LabDiedError, match="did not start its command within 1 s"):
        session.run(cache, emulator, spec(tmp_path), Taken().sinks())
    assert not left_running(cache)


def test_a_guest_that_dies_leaves_its_console_and_a_diagnosis(cache: Cache, tmp_path: Path) -> None:
    script = "ready(); send(Frame.STDOUT, b'last'); console.write(b'Kernel panic - not syncing: told so\\n')"
    taken = Taken()
    with pytest.raises(LabDiedError, match="its kernel panicked: told so") as caught:
        session.run(cache, FakeEmulator(script), spec(tmp_path), taken.sinks())
    assert caught.value.exit_status == 125
    assert taken.stdout == b"last"
    assert "told so" in Path(caught.value.console).read_text()
    assert sorted(p.name for p in Path(caught.value.console).parent.iterdir() if p.name[0] != ".") == [
        "console.log",
        "emulator.log",
    ], "the large files of the run do not stay"


def test_a_problem_in_the_guest_is_passed_on(cache: Cache, tmp_path: Path) -> None:
    script = "ready(); send(Frame.PROBLEM, b'the guest has no /dev/kvm: SVM disabled'); time.sleep(60)"
    with pytest.raises(LabDiedError, match="no /dev/kvm: SVM disabled"):
        session.run(cache, FakeEmulator(script), spec(tmp_path), Taken().sinks())


def test_garbage_on_the_wire_is_no_hang(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(LabDiedError, match="cannot be read"):
        session.run(
            cache, FakeEmulator("wire.write(b'login: '); time.sleep(60)"), spec(tmp_path), Taken().sinks()
        )


def test_files_may_not_leave_their_folder(cache: Cache, tmp_path: Path) -> None:
    script = """
import io, tarfile
packed = io.BytesIO()
with tarfile.open(mode="w:gz", fileobj=packed) as archive:
    archive.addfile(tarfile.TarInfo("../escaped"))
    link = tarfile.TarInfo("link"); link.type = tarfile.SYMTYPE; link.linkname = "/etc"
    archive.addfile(link)
    archive.addfile(tarfile.TarInfo("good"))
ready(); send(Frame.FILES, packed.getvalue()); send(Frame.EXIT, b"5")
"""
    told: list[str] = []
    sinks = session.Sinks(lambda data: None, lambda data: None, note=told.append)
    out = tmp_path / "out"
    assert session.run(cache, FakeEmulator(script), spec(tmp_path, out=out), sinks).status == 5
    assert not (tmp_path / "escaped").exists()
    assert [path.name for path in out.iterdir()] == ["good"]
    assert ["escaped" in told[-2], "link" in told[-1]] == [True, True]


def test_a_console_is_written_where_it_was_asked_for(cache: Cache, tmp_path: Path) -> None:
    script = "console.write(b'hello\\n'); ready(); send(Frame.EXIT, b'0')"
    session.run(cache, FakeEmulator(script), spec(tmp_path, console=tmp_path / "log"), Taken().sinks())
    assert (tmp_path / "log").read_text() == "hello\n"


@pytest.mark.parametrize("where", ["out", "console"])
def test_a_place_that_cannot_be_written_is_told_before_the_boot(
    cache: Cache, tmp_path: Path, where: str
) -> None:
    (tmp_path / "file").touch()
    emulator = FakeEmulator("ready(); send(Frame.EXIT, b'0')")
    asked = spec(tmp_path, **{where: tmp_path / "file" / "inside"})
    with pytest.raises(UsageError, match=r"Cannot write .*file.* \(Not a directory\)"):
        session.run(cache, emulator, asked, Taken().sinks())
    assert not emulator.boots


def test_a_console_log_that_cannot_be_written_costs_nothing_else(cache: Cache, tmp_path: Path) -> None:
    """The folder goes away while the lab runs."""
    (tmp_path / "logs").mkdir()
    emulator = FakeEmulator(f"import shutil; shutil.rmtree({str(tmp_path / 'logs')!r}); ready(); "
                            "send(Frame.EXIT, b'7')")  # fmt: skip
    told: list[str] = []
    sinks = session.Sinks(lambda data: None, lambda data: None, note=told.append)
    asked = spec(tmp_path, console=tmp_path / "logs" / "console")
    assert session.run(cache, emulator, asked, sinks).status == 7
    assert "Cannot write the console log" in told[-1]


def test_a_full_disk_is_told_with_the_remedy(cache: Cache, tmp_path: Path) -> None:
    class Full(FakeEmulator):
        def launch(self, boot: Boot) -> Launch:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(HostError, match=r"No space left on device.*pykvm lab clean"):
        session.run(cache, Full(""), spec(tmp_path), Taken().sinks())
    assert cache.entries("runs") == []


def test_the_kernel_stays_while_the_lab_starts(cache: Cache, tmp_path: Path) -> None:
    """``pykvm lab clean --kernels`` of another process, before this lab counts as running."""
    boots = kernel(cache.folder("kernels", "9.9.1-cloud"))
    asked: list[Cleaned] = []

    class Cleaning(FakeEmulator):
        @property
        def modules(self) -> tuple[str, ...]:  # type: ignore[override]
            assert not cache.running()
            asked.append(cache.clean(["kernels"]))
            return ("wire",)

    emulator = Cleaning("ready(); send(Frame.EXIT, b'0')")
    session.run(cache, emulator, spec(tmp_path, kernel=boots), Taken().sinks())
    assert asked[0].in_use == (boots.folder,)
    assert boots.folder.exists()


def put(tmp_path: Path, *sources: Path) -> dict[str, newc.Entry]:
    """What --put makes of these in the run's layer, below the working folder."""
    target = layers.run(tmp_path / "run.cpio", "{}", "", sources)
    inside = f"{layers.WORK.strip('/')}/"
    found = newc.read(target.read_bytes())
    return {name.removeprefix(inside): entry for name, entry in found.items() if name.startswith(inside)}


def test_put_takes_files_and_folders_by_their_own_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "some folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "file, too").write_bytes(b"contents")
    os.mkfifo(folder / "pipe")
    monkeypatch.chdir(folder / "deep")
    found = put(tmp_path, Path(".."))
    assert list(found) == ["some folder", "some folder/deep", "some folder/file, too"]
    assert found["some folder/file, too"].data == b"contents"


def test_put_refuses_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "missing", tmp_path / "pipe", Path("/"), Path("/dev/null")):
        with pytest.raises(UsageError, match="there is no such file or folder"):
            put(tmp_path, source)


def test_put_refuses_a_file_too_large_without_reading_it(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match=r"huge: .*4 GiB"):
        put(tmp_path, tmp_path / "huge")


def test_put_says_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "secret").touch()
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UsageError, match=r"cannot read .*secret \(Permission denied\)"):
        put(tmp_path, tmp_path / "secret")


def test_two_files_of_one_name_are_refused(cache: Cache, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same").touch()
    asked = spec(tmp_path, put=(tmp_path / "a" / "same", tmp_path / "b" / "same"))
    with pytest.raises(UsageError, match="two files named same"):
        session.run(cache, FakeEmulator("time.sleep(60)"), asked, Taken().sinks())


INTERRUPTED = """
import sys
from pathlib import Path
from pykvm.lab import environment, layers, session
from pykvm.lab.cache import Cache
from pykvm.lab.kinds import kind
sys.path.insert(0, sys.argv[2])
from tests.lab.fake_emulator import FakeEmulator, kernel
session.busybox = lambda cache, note: Path("/bin/true")
layers._applets = lambda busybox: ["sh"]
environment.python_files = lambda: []
environment.checkout = lambda: None
folder = Path(sys.argv[1])
spec = session.RunSpec(kernel(folder / "kernel"), kind("amd-npt"), ("true",), 60.0)
sinks = session.Sinks(lambda data: print(data.decode(), flush=True), print)
emulator = FakeEmulator("ready(); send(Frame.STDOUT, b'up'); time.sleep(60)")
session.run(Cache(folder / "cache"), emulator, spec, sinks)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_it_nothing_is_left_running(tmp_path: Path, number: signal.Signals) -> None:
    checkout = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path), checkout],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        cache = Cache(tmp_path / "cache")
        assert left_running(cache)
        os.kill(process.pid, number)
        process.wait(timeout=20)
    deadline = time.monotonic() + 10
    while left_running(cache) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left_running(cache)
    with cache.run_folder() as fresh:
        left = [path for path in fresh.path.parent.iterdir() if path != fresh.path and path.name[0] != "."]
    assert not left, "the next run removes what a killed one left"


def test_an_emulator_adds_module_parameters_to_the_kinds() -> None:
    """Bochs has no working APIC virtualization; what the kind says stays first."""
    assert session._parameters(kind("amd-shadow"), FakeEmulator("")) == {
        "kvm": "halt_poll_ns=0",
        "kvm_amd": "npt=0,avic=0",
    }


@pytest.mark.parametrize(
    ("name", "module", "values", "says"),
    [
        ("amd-npt", "kvm_amd", {"npt": "0"}, r"kvm_amd\.npt is 0 although 1 was asked for"),
        ("intel-ept", "kvm_intel", {"ept": "Y", "eptad": "Y", "pml": "N"}, r"kvm_intel\.pml is N"),
        ("intel-ept-nopml", "kvm_intel", {"ept": "Y", "eptad": "N", "pml": "N"}, r"kvm_intel\.eptad is N"),
    ],
)
def test_what_the_processor_lacks_is_no_kind_either(
    cache: Cache, tmp_path: Path, name: str, module: str, values: dict[str, str], says: str
) -> None:
    """KVM clears a default that its processor cannot do, and such a lab must not pass for the kind."""
    script = f"ready({module}={values!r}); time.sleep(60)"
    with pytest.raises(LabDiedError, match=says):
        session.run(cache, FakeEmulator(script), spec(tmp_path, kind=kind(name)), Taken().sinks())
