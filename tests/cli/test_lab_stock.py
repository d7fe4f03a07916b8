"""``pykvm lab list``, ``prepare`` and ``clean`` on an archive from memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pykvm.cli import lab_list, lab_prepare
from pykvm.errors import HostError
from pykvm.lab import bochs_build
from pykvm.lab.archive import Package
from pykvm.lab.bochs_build import Built
from pykvm.lab.cache import Cache, Note
from pykvm.lab.kernels import prepared
from tests.cli.runner import Result, invoke
from tests.cli.test_documents import check_keys
from tests.lab.fake_archive import CLOUD, FakeArchive, kernel_archive, package
from tests.lab.test_toolbox import archive_of as tool_archive

Run = Callable[..., Result]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("PYKVM_LAB_CACHE", str(tmp_path / "lab"))
    monkeypatch.delenv("PYKVM_LAB_QEMU", raising=False)
    for module in (lab_list, lab_prepare):
        monkeypatch.setattr(module, "why_not_kvm", lambda kind: "there is none")
    return Cache()


@pytest.fixture
def archive(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> FakeArchive:
    """Kernels, QEMU and busybox; Bochs is built in no time."""
    own, tools = kernel_archive(cache), tool_archive(cache)
    own.listed += tools.listed
    own.files |= tools.files

    def open_archive(cache: Cache, note: Note) -> FakeArchive:
        own._note = note
        return own

    def build(cache: Cache, note: Note, archive: object = None) -> Built:
        def make(scratch: Path) -> None:
            scratch.mkdir()
            (scratch / "bochs").write_bytes(bytes(5000))
            (scratch / "VERSION").write_text("3.0\n")

        return Built(cache.provide(cache.root / "tools" / f"bochs-{bochs_build.recipe()}", make))

    for module in (lab_list, lab_prepare):
        monkeypatch.setattr(module, "Archive", open_archive)
    monkeypatch.setattr(bochs_build, "prepare", build)
    return own


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], archive: FakeArchive) -> Run:
    return lambda *arguments: invoke(capfd, "lab", *arguments)


def series(cache: Cache) -> list[str]:
    return [kernel.series for kernel in prepared(cache)]


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


# --- list ----------------------------------------------------------------------------------------


def test_list_says_what_there_is_and_what_it_costs(run: Run) -> None:
    result = run("list")
    assert result.status == 0
    assert lines_with(result.out, "6.12.117+deb13", "fetch 25.7 MiB", "default")
    assert lines_with(result.out, "7.2.12+deb13", "fetch 47.7 MiB")
    assert lines_with(result.out, "qemu", "fetch 11.4 MiB")
    assert lines_with(result.out, "bochs", "fetch 3.84 MiB, build about")
    assert lines_with(result.out, "amd-shadow", "QEMU", "to prepare")
    assert lines_with(result.out, "intel-ept ", "Bochs", "to prepare")
    assert "would fetch 130 MiB" in result.out


def test_list_says_what_is_prepared(run: Run) -> None:
    run("prepare")
    result = run("list")
    assert lines_with(result.out, "6.12.117+deb13", "prepared")
    assert lines_with(result.out, "qemu", "10.0.13", "prepared")
    assert lines_with(result.out, "amd-shadow", "QEMU", "prepared")
    assert lines_with(result.out, "intel-ept ", "Bochs", "to prepare")


def test_list_says_whose_modules_are_held_to_their_signatures(run: Run) -> None:
    for _ in range(2):
        remarks = {item["series"]: item["remark"] for item in run("list", "--json").document["kernels"]}
        assert "checks their signatures" in remarks.pop("7.1")
        assert not any(remarks.values())
        run("prepare", "--kernel", "all")


def test_list_names_newer_kernels(run: Run, archive: FakeArchive) -> None:
    newest = archive.listed.pop(2)
    run("prepare")
    archive.listed.append(newest)
    archive.remember("kernels", None)
    (kernel,) = [item for item in run("list", "--json").document["kernels"] if item["series"] == "6.12"]
    assert (kernel["state"], kernel["release"]) == ("outdated", f"6.12.96+deb13{CLOUD}")
    assert kernel["newest"] == f"6.12.117+deb13{CLOUD}"
    assert lines_with(run("list").out, "6.12.96+deb13", "update 25.7 MiB")


def test_list_says_why_a_kernel_is_not_to_be_had(run: Run, archive: FakeArchive) -> None:
    archive.pool.clear()
    (kernel,) = [item for item in run("list", "--json").document["kernels"] if item["series"] == "7.1"]
    assert kernel["state"] == "unavailable"
    assert "neither in the archive's lists nor in its pool" in kernel["remark"]


def test_list_without_a_network_shows_what_is_here(run: Run, archive: FakeArchive) -> None:
    run("prepare")
    archive.reachable = False
    result = run("list")
    assert result.status == 0
    assert "could not be reached" in result.err
    assert lines_with(result.out, "6.12.117+deb13", "prepared")
    assert lines_with(result.out, "7.2.12+deb13", "fetch")  # remembered


def test_list_without_a_network_and_without_anything(run: Run, archive: FakeArchive) -> None:
    archive.reachable = False
    result = run("list")
    assert result.status == 0
    assert "could not be reached" in result.err
    assert "No kernel is prepared" in result.out
    assert "would fetch" not in result.out


def test_without_apt_what_is_prepared_is_listed_and_stays(run: Run, archive: FakeArchive) -> None:
    run("prepare")
    archive.reachable, archive.problem = False, HostError("There is no apt-get.")
    for name in ("list", "prepare"):
        result = run(name)
        assert result.status == 0
        assert "There is no apt-get." in result.err
        assert lines_with(result.out, "6.12.117+deb13", "prepared")


def test_list_offline_asks_nobody(run: Run, archive: FakeArchive) -> None:
    assert run("list", "--offline").status == 0
    assert archive.updates == 0


def test_another_qemu_is_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKVM_LAB_QEMU", "/opt/qemu")
    assert lines_with(run("list").out, "qemu", "PYKVM_LAB_QEMU=/opt/qemu", "prepared")


def test_this_machines_kvm_is_shown_where_it_can_carry_a_kind(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab_list, "why_not_kvm", lambda kind: "" if kind.vendor == "intel" else "not AMD")
    result = run("list")
    assert lines_with(result.out, "intel-ept ", "QEMU on this KVM")
    assert not lines_with(result.out, "amd-npt ", "QEMU on this KVM")


# --- prepare -------------------------------------------------------------------------------------


def test_prepare_alone_is_the_stable_kernel_and_qemu(run: Run, cache: Cache) -> None:
    result = run("prepare")
    assert result.status == 0
    assert series(cache) == ["6.12"]
    assert {path.name for path in cache.entries("tools")} == {"qemu", "busybox"}
    assert "1 kernel ready" in result.out


def test_prepare_takes_kernels_and_kinds(run: Run, cache: Cache) -> None:
    document = run("prepare", "--kernel", "6.1", "--kernel", "7.1", "--kvm", "intel-ept", "--json").document
    assert [(item["series"], item["enforce"]) for item in document["kernels"]] == [
        ("6.1", False),
        ("7.1", True),
    ]
    assert [item["name"] for item in document["tools"]] == ["busybox", "bochs"]
    assert series(cache) == ["6.1", "7.1"]


def test_prepare_all_leaves_out_what_is_not_to_be_had(run: Run, cache: Cache, archive: FakeArchive) -> None:
    archive.pool.clear()
    result = run("prepare", "--all")
    assert result.status == 0
    assert series(cache) == ["6.1", "6.12", "7.2"]
    assert "Linux 7.1 is left out" in result.err
    assert len(cache.entries("tools")) == 3


def test_prepare_goes_on_where_it_was_interrupted(run: Run, cache: Cache, archive: FakeArchive) -> None:
    archive.breaks_after = 4  # busybox and QEMU, with a library each
    result = run("prepare", "--kernel", "6.1", "--kernel", "6.12")
    assert result.status == 3
    assert "The connection broke" in result.err
    archive.breaks_after = None
    assert run("prepare", "--kernel", "6.1", "--kernel", "6.12").status == 0
    assert len(archive.fetched) == len(set(archive.fetched)) + 1  # the library was part of two tools
    assert series(cache) == ["6.1", "6.12"]


def test_what_is_prepared_is_not_prepared_again(run: Run, archive: FakeArchive) -> None:
    run("prepare")
    fetched = list(archive.fetched)
    assert run("prepare").status == 0
    assert archive.fetched == fetched


def test_prepare_without_a_network_is_content_with_what_is_here(run: Run, archive: FakeArchive) -> None:
    run("prepare")
    archive.reachable = False
    result = run("prepare")
    assert result.status == 0
    assert "is prepared and stays" in result.err
    assert run("prepare", "--kernel", "6.1").status == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--kernel", "newest"], "is no kernel"),
        (["--kernel", "6.13"], "has no kernel 6.13"),
        (["--kvm", "arm"], "Invalid value"),
    ],
)
def test_prepare_refuses_what_there_is_not(run: Run, arguments: list[str], sentence: str) -> None:
    result = run("prepare", *arguments)
    assert result.status == 2
    assert sentence in result.err


def test_prepare_fetches_the_newest_of_a_series(run: Run, cache: Cache, archive: FakeArchive) -> None:
    newest = archive.listed.pop(2)
    run("prepare")
    archive.listed.append(newest)
    archive.remember("kernels", None)
    run("prepare")
    assert [kernel.release for kernel in prepared(cache)] == [f"6.12.117+deb13{CLOUD}"]


# --- clean ---------------------------------------------------------------------------------------


def test_clean_alone_takes_what_comes_back_without_a_network(run: Run, cache: Cache) -> None:
    run("prepare")
    (cache.folder("layers") / "a.cpio").write_bytes(bytes(8192))
    assert run("clean", "--json").document["removed"] == [str(cache.root / "layers" / "a.cpio")]
    assert series(cache) == ["6.12"]


def test_clean_says_how_much_it_freed(run: Run, cache: Cache) -> None:
    (cache.folder("layers") / "a.cpio").write_bytes(bytes(2 << 20))
    assert "Would free 2 MiB" in run("clean", "--dry-run").out
    result = run("clean")
    assert "Freed 2 MiB" in result.out
    assert "layers/a.cpio" in result.out
    assert "Freed 0 B" in run("clean").out


def test_clean_all_leaves_results(run: Run, cache: Cache) -> None:
    run("prepare", "--all")
    for part in ("layers", "runs", "results"):
        cache.folder(part, "a")
    run("clean", "--all")
    assert [part for part in cache.usage() if cache.entries(part)] == ["results"]
    run("clean", "--results")
    assert not cache.entries("results")


def test_clean_names_what_a_running_lab_uses(run: Run, cache: Cache) -> None:
    run("prepare")
    with cache.run_folder():
        result = run("clean", "--all")
        assert result.status == 0
        assert len(lines_with(result.err, "stays: a running lab")) == 4  # kernel, QEMU, busybox, its folder
        assert series(cache) == ["6.12"]


def test_clean_of_nothing_frees_nothing(run: Run) -> None:
    assert "Freed 0 B" in run("clean", "--all").out


# --- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["list", "prepare", "clean"])
def test_json_has_the_documented_keys(run: Run, name: str) -> None:
    result = run(name, "--json")
    assert result.status == 0
    check_keys(f"pykvm lab {name}", result.document)


def test_sizes_of_tools_are_those_of_their_closures(run: Run, archive: FakeArchive) -> None:
    extra: Package = package("libfoo", size=7_000_000)
    before = run("list", "--json").document["tools"]
    archive.listed.append(extra)
    assert run("list", "--json").document["tools"] == before  # worked out once
    archive.remember("tool qemu", None)
    after = {tool["name"]: tool["download"] for tool in run("list", "--json").document["tools"]}
    assert after["qemu"] == 12_000_000 + 7_000_000
