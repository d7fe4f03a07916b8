"""The lab cache: atomic builds among processes that wait, die and clean up."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pykvm.errors import HostError
from pykvm.lab.cache import ARCHIVE_GATE, PARTS, Cache, Cleaned, default_root, size_of
from tests.cli.runner import environment

LONG_AGO = 1_000_000.0


def entry(cache: Cache, part: str, name: str, size: int = 8192, age: float = LONG_AGO) -> Path:
    """Something that was built and last used ``age`` seconds ago."""
    path = cache.folder(part) / name
    path.write_bytes(bytes(size))
    then = time.time() - age
    os.utime(path, (then, then))
    return path


@contextmanager
def another_process(cache: Cache, body: str) -> Iterator[subprocess.Popen[str]]:
    """A process that does ``body`` with a ``cache`` of the same root and says 'ready'; killed in the end."""
    code = f"""
import time
from pathlib import Path
from pykvm.lab.cache import Cache
cache = Cache(Path({str(cache.root)!r}))
{body}
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.communicate()


# --- where ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PYKVM_LAB_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/pykvm/lab"),
        ({"XDG_CACHE_HOME": "relative"}, "~/.cache/pykvm/lab"),
        ({}, "~/.cache/pykvm/lab"),
    ],
)
def test_the_root_is_where_the_environment_says(variables: dict[str, str], expected: str) -> None:
    assert default_root(variables) == Path(expected).expanduser()


def test_a_root_that_cannot_be_made_is_told_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="PYKVM_LAB_CACHE"):
        Cache(tmp_path / "file" / "cache").folder("layers")


def test_a_user_without_a_home_is_told_the_remedy() -> None:
    with pytest.raises(HostError, match="PYKVM_LAB_CACHE"):
        default_root({"PYKVM_LAB_CACHE": "~no-such-user/cache"})


def test_a_root_that_cannot_be_written_is_told_with_the_remedy(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere, so access(2) and open(2) are asked to say no."""
    path = entry(cache, "layers", "a")
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    for use in (lambda: cache.folder("layers"), lambda: cache.run_folder().__enter__()):
        with pytest.raises(HostError, match=r"Permission denied.*PYKVM_LAB_CACHE"):
            use()

    def refuse(*arguments: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(HostError, match=r"Permission denied.*PYKVM_LAB_CACHE"):
        cache.clean(["layers"])
    assert path.exists()


# --- building ------------------------------------------------------------------------------------


def test_what_is_built_appears_when_it_is_whole(cache: Cache) -> None:
    path = cache.root / "tools" / "a"
    with cache.build(path) as scratch:
        assert scratch is not None
        scratch.mkdir()
        (scratch / "half").touch()
        assert not path.exists()
        assert cache.entries("tools") == []
    assert [item.name for item in path.iterdir()] == ["half"]
    assert [item.name for item in path.parent.iterdir()] == ["a"]  # neither lock nor scratch stays


def test_what_is_there_is_not_built_again(cache: Cache) -> None:
    path = cache.root / "layers" / "a"
    assert cache.provide(path, lambda scratch: scratch.touch()) == path
    with cache.build(path) as scratch:
        assert scratch is None
    cache.provide(path, lambda scratch: pytest.fail("built twice"))


def test_a_failed_build_leaves_nothing(cache: Cache) -> None:
    path = cache.root / "layers" / "a"

    def make(scratch: Path) -> None:
        scratch.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.provide(path, make)
    assert list(path.parent.iterdir()) == []


def test_a_full_disk_is_one_sentence(cache: Cache) -> None:
    def make(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(HostError, match=r"no room left .*pykvm lab clean"):
        cache.provide(cache.root / "layers" / "a", make)


def test_of_two_processes_one_builds_and_the_other_waits(cache: Cache) -> None:
    path = cache.root / "layers" / "a"
    body = f"""
with cache.build(Path({str(path)!r})) as scratch:
    print("ready", flush=True)
    input()
    scratch.write_text("by the first")
"""
    with another_process(cache, body) as child:
        told: list[str] = []
        waiter = threading.Thread(
            target=lambda: cache.provide(path, lambda scratch: pytest.fail("built twice"), told.append)
        )
        waiter.start()
        while not told:
            time.sleep(0.001)
        assert waiter.is_alive()
        assert not path.exists()
        child.communicate("go on\n")
        waiter.join(20)
        assert not waiter.is_alive()
    assert path.read_text() == "by the first"
    assert "waiting" in told[0]


def test_a_killed_builder_leaves_nothing_that_counts(cache: Cache) -> None:
    path = cache.root / "layers" / "a"
    body = f"""
with cache.build(Path({str(path)!r})) as scratch:
    scratch.write_text("half")
    print("ready", flush=True)
    time.sleep(100)
"""
    with another_process(cache, body):
        assert list(path.parent.glob(".*.part"))
    assert list(path.parent.glob(".*.part"))  # killed: nobody cleaned up
    assert not path.exists()
    with cache.build(path) as scratch:
        assert scratch is not None
        assert not list(path.parent.glob(".*.part"))
        scratch.write_text("whole")
    assert [item.name for item in path.parent.iterdir()] == ["a"]


def test_many_builders_of_one_thing_build_it_once(cache: Cache) -> None:
    path = cache.root / "layers" / "a"
    built = []

    def make(scratch: Path) -> None:
        built.append(1)
        scratch.touch()

    builders = [threading.Thread(target=cache.provide, args=(path, make)) for _ in range(16)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(20)
    assert built == [1]
    assert [item.name for item in path.parent.iterdir()] == ["a"]


def test_a_lock_has_one_holder_however_often_its_file_comes_and_goes(cache: Cache) -> None:
    place = cache.folder("layers") / "a"
    inside, worst = 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, worst
        for _ in range(50):
            with cache.lock(place):
                with guard:
                    inside += 1
                    worst = max(worst, inside)
                time.sleep(0)
                with guard:
                    inside -= 1

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert worst == 1


# --- runs ----------------------------------------------------------------------------------------


def test_a_run_folder_goes_with_its_run(cache: Cache) -> None:
    with cache.run_folder() as run:
        (run.path / "initrd").touch()
        (run.path / "sub").mkdir()
    assert cache.entries("runs") == []


def test_a_run_folder_goes_with_a_failed_run_too(cache: Cache) -> None:
    with pytest.raises(ZeroDivisionError), cache.run_folder():
        _ = 1 / 0
    assert cache.entries("runs") == []


def test_a_run_keeps_what_it_is_told_to(cache: Cache) -> None:
    with cache.run_folder() as run:
        for name in ("console.log", "initrd"):
            (run.path / name).touch()
        run.keep("console.log")
    with cache.run_folder():
        pass  # the next run does not take it for a leftover
    assert {item.name for item in run.path.iterdir()} == {"console.log", ".keep"}


def test_the_folder_of_a_killed_run_goes_at_the_next_start(cache: Cache) -> None:
    body = """
hold = cache.run_folder()
run = hold.__enter__()
(run.path / "initrd").write_bytes(bytes(5000))
print("ready", flush=True)
time.sleep(100)
"""
    with another_process(cache, body):
        with cache.run_folder() as mine:
            assert len(cache.entries("runs")) == 2  # it is alive, so it stays
        (dead,) = cache.entries("runs")
    with cache.run_folder() as mine:
        assert cache.entries("runs") == [mine.path]
        assert not dead.exists()


def test_cleaning_waits_until_a_beginning_run_holds_its_folder(cache: Cache) -> None:
    """Between the two a folder looks like that of a dead run."""
    (begun := cache.folder("runs") / "begun").mkdir()
    body = """
import fcntl, os
door = os.open(cache.root / "runs", os.O_RDONLY)
fcntl.flock(door, fcntl.LOCK_EX)
print("ready", flush=True)
input()
hold = os.open(cache.root / "runs" / "begun", os.O_RDONLY)
fcntl.flock(hold, fcntl.LOCK_EX)
os.close(door)
time.sleep(100)
"""
    with another_process(cache, body) as child:
        cleaned: list[Cleaned] = []
        cleaner = threading.Thread(target=lambda: cleaned.append(cache.clean(["runs"])))
        cleaner.start()
        cleaner.join(0.3)
        assert cleaner.is_alive()
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
        cleaner.join(20)
        assert cleaned[0].in_use == (begun,)
        assert begun.exists()


def test_what_could_not_be_removed_is_not_said_to_be_gone(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache.folder("tools", "a")
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: None)
    cleaned = cache.clean(["tools"])
    assert (cleaned.removed, cleaned.in_use) == ((), (path,))


def test_only_the_newest_kept_runs_stay(cache: Cache) -> None:
    kept = []
    for number in range(12):
        path = cache.folder("runs", f"20260101-{number:06}-1-aa")
        (path / ".keep").touch()
        kept.append(path)
    with cache.run_folder():
        pass
    assert cache.entries("runs") == kept[2:]


def test_starting_a_run_prunes_layers(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(Cache, "prune", lambda self: called.append(1))
    with cache.run_folder():
        assert called == [1]


# --- room ----------------------------------------------------------------------------------------


def test_what_was_not_used_for_the_longest_time_goes_first(cache: Cache) -> None:
    old, older, newest = (
        entry(cache, "layers", name, age=LONG_AGO * age) for name, age in (("a", 2), ("b", 3), ("c", 1))
    )
    cleaned = cache.prune(limit=20_000)
    assert cleaned.removed == (older,)
    assert cleaned.freed == 8192
    assert old.exists()
    assert newest.exists()


def test_what_was_just_used_is_not_pruned(cache: Cache) -> None:
    path = entry(cache, "layers", "a")
    cache.provide(path, lambda scratch: pytest.fail("it is there"))
    assert cache.prune(limit=0).removed == ()


@pytest.mark.parametrize("how", ["prune", "clean", "dry run", "discard"])
def test_what_a_running_lab_uses_stays(cache: Cache, how: str) -> None:
    used, folder, free = (entry(cache, "layers", name) for name in "abc")
    folder.unlink()
    folder.mkdir()
    os.utime(folder, (0, 0))
    body = f"""
use = cache.use(Path({str(used)!r}), Path({str(folder)!r}))
use.__enter__()
print("ready", flush=True)
time.sleep(100)
"""
    actions = {
        "prune": lambda: cache.prune(limit=0, grace=0),
        "clean": lambda: cache.clean(["layers"]),
        "dry run": lambda: cache.clean(["layers"], dry_run=True),
        "discard": lambda: cache.discard([used, folder, free]),
    }
    with another_process(cache, body):
        cleaned = actions[how]()
        assert set(cleaned.in_use) == {used, folder}
        assert cleaned.removed == (free,)
        assert used.exists()
        assert folder.exists()
        assert free.exists() == (how == "dry run")
    assert set(actions[how]().removed) >= {used, folder}  # the user is dead


@pytest.mark.parametrize("part", ["kernels", "tools"])
def test_kernels_and_tools_stay_while_any_lab_runs(cache: Cache, part: str) -> None:
    path = entry(cache, part, "a")
    body = """
hold = cache.run_folder()
hold.__enter__()
print("ready", flush=True)
time.sleep(100)
"""
    with another_process(cache, body):
        assert cache.running()
        assert cache.clean([part], dry_run=True).in_use == (path,)
        assert cache.clean([part]).in_use == (path,)
        assert cache.discard([path]).in_use == (path,)
    assert not cache.running()  # it is dead, and so is its hold
    assert cache.clean([part]).removed == (path,)


def test_using_what_is_gone_is_one_sentence(cache: Cache) -> None:
    with pytest.raises(HostError, match="run the command again"), cache.use(cache.root / "layers" / "a"):
        pass


def test_cleaning_frees_what_usage_shows(cache: Cache) -> None:
    for part in PARTS:
        entry(cache, part, "a")
    before = cache.usage()
    assert before == {part: size_of(cache.root / part) for part in PARTS}
    assert all(before.values())
    assert cache.clean(PARTS, dry_run=True).freed == cache.clean(PARTS).freed == 8192 * len(PARTS)
    assert all(not cache.entries(part) for part in PARTS)


def test_cleaning_takes_one_part_alone(cache: Cache) -> None:
    layer, kernel = entry(cache, "layers", "a"), entry(cache, "kernels", "b")
    assert cache.clean(["layers"]).removed == (layer,)
    assert kernel.exists()


def test_cleaning_removes_what_dead_builders_left(cache: Cache) -> None:
    leftovers = [entry(cache, "tools", ".bochs.1234abcd.part"), entry(cache, "tools", ".bochs.work")]
    assert cache.clean(["tools"], dry_run=True).freed == 2 * 8192
    assert all(path.exists() for path in leftovers)
    assert cache.clean(["tools"]).freed == 2 * 8192
    assert not any(path.exists() for path in leftovers)


def test_pruning_leaves_what_a_builder_can_go_on_with(cache: Cache) -> None:
    unfinished = entry(cache, "layers", ".a.work")
    scratch = entry(cache, "layers", ".a.1234abcd.part")
    cache.prune(limit=0)
    assert unfinished.exists()
    assert not scratch.exists()


def test_cleaning_leaves_a_living_builder_alone(cache: Cache) -> None:
    with cache.build(cache.root / "layers" / "a") as scratch:
        assert scratch is not None
        scratch.touch()
        assert cache.clean(["layers"]).freed == 0
        assert scratch.exists()
    assert cache.entries("layers")


def test_the_lists_stay_while_somebody_fetches(cache: Cache) -> None:
    lists = entry(cache, "apt", "lists")
    with cache.lock(cache.folder("apt") / ARCHIVE_GATE):
        cleaned = cache.clean(["apt"])
        assert cleaned.in_use == (cache.root / "apt",)
        assert lists.exists()
    assert cache.clean(["apt"]).removed == (lists,)


def test_read_only_folders_can_be_removed(cache: Cache) -> None:
    folder = cache.folder("tools", "a", "inner")
    (folder / "file").touch()
    folder.chmod(0o500)
    cache.clean(["tools"])
    assert cache.entries("tools") == []


def test_a_file_of_two_names_counts_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(8192))
    alone = size_of(tmp_path)
    os.link(tmp_path / "a", tmp_path / "b")
    assert size_of(tmp_path) == alone
    assert size_of(tmp_path / "missing") == 0


def test_nothing_is_removed_through_a_link(cache: Cache, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    (cache.folder("layers") / "a").symlink_to(outside)
    cache.clean(["layers"])
    assert cache.entries("layers") == []
    assert (outside / "file").exists()
