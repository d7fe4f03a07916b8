"""The archive: what apt is asked for, what its answers become, and what is said when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pykvm.errors import HostError
from pykvm.lab import apt, archive
from pykvm.lab.archive import Archive, ArchiveUnreachableError, Package, parse_stanzas
from pykvm.lab.cache import Cache
from tests.cli.runner import environment
from tests.lab.fake_apt import STANZAS, URIS, FakeApt, archive_of

BUSYBOX = Package(
    "busybox-static", "1:1.37.0-6+b9", 955316, "pool/main/b/busybox/busybox-static_1.37.0-6+b9_amd64.deb"
)
UPDATE = "apt-get --quiet --option=APT::Update::Error-Mode=any update"


def say(text: str, descriptor: int = 1) -> str:
    """A script that prints the text."""
    return f"cat >&{descriptor} <<'END'\n{text}\nEND\n"


# --- lists ---------------------------------------------------------------------------------------


def test_lists_are_fetched_once_and_again_after_a_day(cache: Cache, fake_apt: FakeApt) -> None:
    first = archive_of(cache)
    assert first.age is None
    first.update()
    first.update()
    archive_of(cache).update()
    assert fake_apt.calls == [UPDATE]
    assert first.age == pytest.approx(0, abs=60)
    yesterday = time.time() - 25 * 3600
    os.utime(cache.root / "apt" / "updated-all", (yesterday, yesterday))
    archive_of(cache).update()
    assert fake_apt.calls == [UPDATE, UPDATE]


def test_another_mirror_has_lists_of_its_own(cache: Cache, fake_apt: FakeApt) -> None:
    archive_of(cache).update()
    archive_of(cache, PYKVM_LAB_MIRROR="http://near.example/debian/").update()
    assert len(fake_apt.calls) == 2
    sources = (cache.root / "apt/sources/all.list").read_text()
    assert " http://near.example/debian trixie main\n" in sources
    assert " http://deb.debian.org/debian-security trixie-security main\n" in sources


def test_apt_is_kept_away_from_the_system(cache: Cache, fake_apt: FakeApt) -> None:
    fake_apt.program("apt-get", f'cp "$APT_CONFIG" "{fake_apt.folder}/used"')
    fake_apt.program("apt-config", say('Acquire::http::Proxy "http://proxy:3142";\nAcquire::Retries "9";'))
    archive_of(cache).update()
    lines = (fake_apt.folder / "used").read_text().splitlines()
    own = [line for line in lines if line.startswith("Dir")]
    assert {line.split()[0] for line in own} >= {
        "Dir",
        "Dir::State::status",
        "Dir::Etc",
        "Dir::Etc::parts",
        "Dir::Etc::sourceparts",
        "Dir::Etc::preferencesparts",
    }
    assert all(str(cache.root) in line or '"/dev/null"' in line or '""' in line for line in own)
    assert (cache.root / "apt/status").read_text() == ""
    assert 'Acquire::http::Proxy "http://proxy:3142";' in lines  # but its proxy is the way out
    assert 'Acquire::Retries "9";' not in lines


def test_all_sources_are_signed_and_for_amd64(cache: Cache, fake_apt: FakeApt) -> None:
    archive_of(cache).update()
    lines = (cache.root / "apt/sources/all.list").read_text().splitlines()
    assert [line.split()[4] for line in lines] == [
        "bookworm", "bookworm-security", "trixie", "trixie-security", "trixie-backports",
    ]  # fmt: skip
    key = fake_apt.folder / "keys" / "debian-archive-keyring.gpg"
    assert all(line.startswith(f"deb [arch=amd64 signed-by={key}] http") for line in lines)


# --- questions -----------------------------------------------------------------------------------


def test_stanzas_become_packages() -> None:
    kernel, busybox = parse_stanzas(STANZAS)  # the third one is virtual
    assert busybox == BUSYBOX
    assert busybox.deb == "busybox-static_1%3a1.37.0-6+b9_amd64.deb"
    assert kernel.version == "7.1.13-1~bpo13+1"
    assert kernel.size == 13297444


def test_packages_are_chosen_by_their_whole_name(cache: Cache, fake_apt: FakeApt) -> None:
    fake_apt.program(
        "apt-cache",
        'case "$arguments" in *pkgnames) printf "%s\\n" busybox-static busybox xbusybox-static; exit;; esac\n'
        + say(STANZAS),
    )
    assert BUSYBOX in archive_of(cache).packages("busybox-.*")
    assert fake_apt.calls[1:] == ["apt-cache pkgnames", "apt-cache show --no-all-versions busybox-static"]


def test_no_fitting_package_is_no_question(cache: Cache, fake_apt: FakeApt) -> None:
    assert archive_of(cache).packages("linux-.*") == []
    assert fake_apt.calls[1:] == ["apt-cache pkgnames"]


def test_a_closure_is_resolved_within_one_suite(cache: Cache, fake_apt: FakeApt) -> None:
    fake_apt.program("apt-get", say(URIS))
    data, qemu = archive_of(cache).closure(["qemu-system-x86"])
    assert qemu == Package(
        "qemu-system-x86",
        "1:10.0.13+ds-0+deb13u1",
        10278596,
        "pool/main/q/qemu/qemu-system-x86_10.0.13+ds-0+deb13u1_amd64.deb",
    )
    assert data.deb == "qemu-system-data_1%3a10.0.13+ds-0+deb13u1_all.deb"
    assert fake_apt.sources == ["all", "trixie"]
    assert "--no-install-recommends" in fake_apt.calls[1]


def test_what_was_worked_out_is_remembered_until_the_lists_change(cache: Cache, fake_apt: FakeApt) -> None:
    first = archive_of(cache)
    first.update()
    first.remember("a", [1])
    first.remember("b", 2)
    assert (archive_of(cache).remembered("a"), archive_of(cache).remembered("b")) == ([1], 2)
    archive_of(cache).update(force=True)
    assert archive_of(cache).remembered("a") is None


def test_a_broken_memory_is_none(cache: Cache) -> None:
    (cache.folder("apt") / "remembered.json").write_text("[")
    assert archive_of(cache).remembered("a") is None


# --- fetching ------------------------------------------------------------------------------------


def test_debs_are_fetched_by_version_and_removed_when_used(cache: Cache, fake_apt: FakeApt) -> None:
    fake_apt.program("apt-get", f"echo deb >'{BUSYBOX.deb}'")
    own = archive_of(cache)
    with own.fetch([BUSYBOX]) as (deb,):
        assert deb.read_text() == "deb\n"
    assert not deb.exists()
    assert fake_apt.calls == ["apt-get --quiet download busybox-static=1:1.37.0-6+b9"]


def test_a_deb_stays_for_the_next_try_if_its_use_fails(cache: Cache, fake_apt: FakeApt) -> None:
    fake_apt.program("apt-get", f"echo deb >'{BUSYBOX.deb}'")
    with pytest.raises(ZeroDivisionError), archive_of(cache).fetch([BUSYBOX]) as (deb,):
        _ = 1 / 0
    assert deb.exists()


def test_what_is_left_of_other_downloads_goes(cache: Cache, fake_apt: FakeApt) -> None:
    fake_apt.program("apt-get", f"echo deb >'{BUSYBOX.deb}'")
    stranger = cache.folder("apt", "debs") / "other_1_amd64.deb"
    stranger.touch()
    part = cache.folder("apt", "debs") / BUSYBOX.deb
    part.write_text("the first half")
    with archive_of(cache).fetch([BUSYBOX]):
        assert not stranger.exists()


def test_an_interrupted_download_is_left_for_apt_to_complete(cache: Cache, fake_apt: FakeApt) -> None:
    fake_apt.program("apt-get", f"cp '{BUSYBOX.deb}' ../seen; exit 0")
    (cache.folder("apt", "debs") / BUSYBOX.deb).write_text("the first half")
    with archive_of(cache).fetch([BUSYBOX]):
        pass
    assert (cache.root / "apt" / "seen").read_text() == "the first half"


def test_a_missing_deb_is_told(cache: Cache, fake_apt: FakeApt) -> None:
    with pytest.raises(HostError, match="ended without busybox-static"), archive_of(cache).fetch([BUSYBOX]):
        pass


def test_fetching_tells_how_far_it_is(
    cache: Cache, fake_apt: FakeApt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "TELL_EVERY", 0.0)
    fake_apt.program("apt-get", f"head -c 3000000 /dev/zero >'{BUSYBOX.deb}'; sleep 0.4")
    told: list[str] = []
    with archive_of(cache, told).fetch([BUSYBOX], "busybox"):
        pass
    assert told == ["busybox: 3 of 1 MB"]


def test_a_second_process_waits_and_says_so(cache: Cache, fake_apt: FakeApt) -> None:
    fake_apt.program("apt-get", f"echo deb >'{BUSYBOX.deb}'")
    told: list[str] = []
    with archive_of(cache).fetch([BUSYBOX]):
        other = threading.Thread(target=lambda: archive_of(cache, told).update())
        other.start()
        while not told:
            time.sleep(0.001)
        assert len(fake_apt.calls) == 1
    other.join(20)
    assert "waiting" in told[0]
    assert len(fake_apt.calls) == 2


def test_unpacking_runs_nothing_of_the_package(cache: Cache, fake_apt: FakeApt, tmp_path: Path) -> None:
    archive_of(cache).unpack(tmp_path / "a.deb", tmp_path / "root")
    assert fake_apt.calls == [f"dpkg-deb --extract {tmp_path}/a.deb {tmp_path}/root"]
    assert (tmp_path / "root/usr/unpacked").exists()


def test_a_source_package_is_its_upstream_part(cache: Cache, fake_apt: FakeApt, tmp_path: Path) -> None:
    (tmp_path / "bochs-3.0").mkdir()
    (tmp_path / "bochs-3.0" / "configure").touch()
    pack = f"tar -C '{tmp_path}' -cf bochs_3.0.orig.tar.gz bochs-3.0"
    fake_apt.program("apt-get", f'case "$arguments" in *source*bochs) {pack};; esac')
    tree = archive_of(cache).fetch_source("bochs", tmp_path / "source")
    assert [item.name for item in tree.iterdir()] == ["configure"]
    assert fake_apt.sources == ["source", "source"]


def test_a_missing_source_is_told(cache: Cache, fake_apt: FakeApt, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="left no tarball"):
        archive_of(cache).fetch_source("bochs", tmp_path / "source")


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "problem",
    [
        "E: Failed to fetch http://a/InRelease  Could not resolve 'a'",
        "W: Failed to fetch http://a/InRelease  Could not connect to a:80 (1.2.3.4), connection timed out",
        "E: Failed to fetch http://a/x.deb  Unable to connect to a:80:",
        "Err:1 http://a sid InRelease\n  Temporary failure resolving 'a'",
    ],
)
def test_no_network_is_one_sentence(cache: Cache, fake_apt: FakeApt, problem: str) -> None:
    fake_apt.program("apt-get", f"{say(problem, 2)}exit 100")
    with pytest.raises(ArchiveUnreachableError, match=r"could not be reached.*PYKVM_LAB_MIRROR") as caught:
        archive_of(cache).update()
    assert "\n" not in str(caught.value)
    assert "Failed to fetch" not in str(caught.value)
    assert archive_of(cache).age is None


def test_another_failure_names_its_cause(cache: Cache, fake_apt: FakeApt) -> None:
    fake_apt.program("apt-get", "echo 'W: noise'; echo 'E: The repository is not signed.' >&2; exit 100")
    with pytest.raises(HostError, match=r"The repository is not signed; .*clean --lists") as caught:
        archive_of(cache).update()
    assert not isinstance(caught.value, ArchiveUnreachableError)


@pytest.mark.parametrize("program", ["apt-get", "dpkg-deb"])
def test_a_missing_program_names_its_package(cache: Cache, fake_apt: FakeApt, program: str) -> None:
    fake_apt.remove(program)
    with pytest.raises(HostError, match=f"{program}, which is not there; install the package"):
        archive_of(cache).unpack(Path("/a.deb"), cache.folder("x")) if program == "dpkg-deb" else archive_of(
            cache
        ).update()


def test_a_missing_keyring_names_its_package(
    cache: Cache, fake_apt: FakeApt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(apt, "KEYRING_FOLDER", tmp_path)
    with pytest.raises(HostError, match="install the package debian-archive-keyring"):
        archive_of(cache).update()


def test_a_program_that_hangs_is_ended(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(HostError, match="sleep did not end within 0 s"):
        apt.run(["/bin/sleep", "100"], timeout=0.1)
    assert time.monotonic() - start < 20


def test_an_interrupted_wait_ends_the_program(tmp_path: Path) -> None:
    started: list[int] = []
    popen = subprocess.Popen

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:

        def remember(*arguments: object, **options: object) -> object:
            process = popen(*arguments, **options)  # type: ignore[call-overload]
            started.append(process.pid)
            return process

        patch.setattr(subprocess, "Popen", remember)
        with pytest.raises(KeyboardInterrupt):
            apt.run(["/bin/sleep", "100"], timeout=100, watch=interrupt)
    assert not Path(f"/proc/{started[0]}").exists()


def test_a_program_ends_with_a_killed_pykvm(tmp_path: Path) -> None:
    script = f"echo $$ >'{tmp_path}/pid'; exec sleep 100"
    code = f"from pykvm.lab import apt; apt.run(['/bin/sh', '-c', {script!r}], timeout=100)"
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment())
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        child = Path("/proc", (tmp_path / "pid").read_text().strip())
        assert child.exists()
    finally:
        parent.kill()
        parent.wait()
    while child.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- the pool ------------------------------------------------------------------------------------

CONTENTS = bytes(range(256)) * 4096


class _Pool(BaseHTTPRequestHandler):
    """One file; ``cut`` ends answers early, ``ranges`` says whether parts can be asked for."""

    cut = 0
    ranges = True

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        server = self.server
        assert isinstance(server, _Server)
        server.asked.append((self.command, self.headers.get("Range", "")))
        if self.path != "/debian/pool/main/l/linux/a_1~bpo13+1_amd64.deb":
            self.send_error(server.refusal)
            return
        start = 0
        if server.ranges and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(CONTENTS):
                self.send_error(416)
                return
            self.send_response(206)
        else:
            self.send_response(200)
        piece = CONTENTS[start:]
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        if body:
            self.wfile.write(piece[: server.cuts.pop(0)] if server.cuts else piece)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Pool)
        self.asked: list[tuple[str, str]] = []
        self.cuts: list[int] = []
        self.ranges = True
        self.refusal = 404

    @property
    def mirror(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/debian"


PATH = "pool/main/l/linux/a_1~bpo13+1_amd64.deb"


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def archive_at(cache: Cache, pool: _Server) -> Archive:
    return archive_of(cache, PYKVM_LAB_MIRROR=pool.mirror)


def test_a_file_of_the_pool_comes_whole_and_goes_when_used(cache: Cache, pool: _Server) -> None:
    with archive_at(cache, pool).fetch_pool(PATH) as file:
        assert file.read_bytes() == CONTENTS
    assert list(cache.folder("apt", "pool").iterdir()) == []


def test_a_broken_connection_is_taken_up_where_it_broke(cache: Cache, pool: _Server) -> None:
    pool.cuts = [100_000, 200_000]
    with archive_at(cache, pool).fetch_pool(PATH) as file:
        assert file.read_bytes() == CONTENTS
    assert [asked for _, asked in pool.asked] == ["", "bytes=100000-", "bytes=300000-"]


def test_what_an_earlier_process_fetched_is_not_fetched_again(cache: Cache, pool: _Server) -> None:
    (cache.folder("apt", "pool") / (PATH.rpartition("/")[2] + ".part")).write_bytes(CONTENTS[:500_000])
    with archive_at(cache, pool).fetch_pool(PATH) as file:
        assert file.read_bytes() == CONTENTS
    assert pool.asked == [("GET", "bytes=500000-")]


@pytest.mark.parametrize("left", [len(CONTENTS), len(CONTENTS) + 5])
def test_a_leftover_that_cannot_be_completed_is_fetched_anew(cache: Cache, pool: _Server, left: int) -> None:
    (cache.folder("apt", "pool") / (PATH.rpartition("/")[2] + ".part")).write_bytes(bytes(left))
    with archive_at(cache, pool).fetch_pool(PATH) as file:
        assert file.read_bytes() == CONTENTS


def test_a_server_without_ranges_sends_it_all(cache: Cache, pool: _Server) -> None:
    pool.ranges = False
    (cache.folder("apt", "pool") / (PATH.rpartition("/")[2] + ".part")).write_bytes(CONTENTS[:5000])
    with archive_at(cache, pool).fetch_pool(PATH) as file:
        assert file.read_bytes() == CONTENTS


def test_a_connection_that_breaks_again_and_again_is_given_up(cache: Cache, pool: _Server) -> None:
    pool.cuts = [1000] * 10
    with pytest.raises(ArchiveUnreachableError), archive_at(cache, pool).fetch_pool(PATH):
        pass
    assert len(pool.asked) == 4


def test_the_size_of_a_file_of_the_pool(cache: Cache, pool: _Server) -> None:
    own = archive_at(cache, pool)
    assert own.pool_size(PATH) == len(CONTENTS)
    assert own.pool_size("pool/gone.deb") is None
    with pytest.raises(HostError, match="is gone from the archive"), own.fetch_pool("pool/gone.deb"):
        pass
    pool.refusal = 503
    with pytest.raises(ArchiveUnreachableError, match="status 503"):
        own.pool_size("pool/gone.deb")


def test_a_pool_out_of_reach_is_one_sentence(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    own = archive_of(cache, PYKVM_LAB_MIRROR="http://127.0.0.1:9/debian")
    with pytest.raises(ArchiveUnreachableError, match="refused"):
        own.pool_size(PATH)


# --- the real one --------------------------------------------------------------------------------


@pytest.mark.lab
@pytest.mark.timeout(600)
def test_a_small_package_of_the_real_archive(cache: Cache, tmp_path: Path) -> None:
    own = Archive(cache)
    (package,) = [item for item in own.closure(["hello"]) if item.name == "hello"]
    with own.fetch([package]) as (deb,):
        assert deb.stat().st_size == package.size
        own.unpack(deb, tmp_path / "root")
    done = subprocess.run(
        [tmp_path / "root/usr/bin/hello"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "Hello, world!\n" or "GLIBC" in done.stderr
