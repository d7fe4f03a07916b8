"""Kernels: discovered in the archive's lists, unpacked, found again, chosen by series or release."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pykvm.errors import HostError, UsageError
from pykvm.lab import kernels
from pykvm.lab.archive import Archive, ArchiveUnreachableError
from pykvm.lab.cache import Cache
from pykvm.lab.kernels import newest_of_each_series, offer, offered, prepare, prepared, provide, select
from tests.lab.fake_archive import CLOUD, FakeArchive, kernel_archive, package


def ready(cache: Cache, text: str) -> kernels.PreparedKernel:
    archive = kernel_archive(cache)
    return prepare(cache, archive, offer(archive, text), archive.told.append)


# --- what the archive offers ---------------------------------------------------------------------


def test_series_are_discovered_and_the_newest_of_each_is_taken(cache: Cache) -> None:
    found = {kernel.series: kernel for kernel in offered(kernel_archive(cache))}
    assert list(found) == ["6.1", "6.12", "7.1", "7.2"]
    assert found["6.12"].release == f"6.12.117+deb13{CLOUD}"
    assert [item.name for item in found["6.12"].packages] == [f"linux-image-6.12.117+deb13{CLOUD}"]
    assert found["6.12"].download == 27_000_000


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        (["image-6.1.0-9", "image-6.1.0-56"], "6.1.0-56"),
        (["image-6.12.9+deb13", "image-6.12.117+deb13"], "6.12.117+deb13"),
        (["image-6.12.115+deb13.1", "image-6.12.115+deb13"], "6.12.115+deb13.1"),
        (["binary-7.9.1+deb13", "image-7.10.0+deb13"], "7.9.1+deb13"),
        (["image-6.12.1+deb13", "modules-6.12.2+deb13"], "6.12.1+deb13"),
    ],
)
def test_releases_are_ordered_by_their_numbers(names: list[str], newest: str) -> None:
    packages = [package(f"linux-{name}{CLOUD}") for name in names]
    assert newest_of_each_series(packages)[0][0] == newest + CLOUD


@pytest.mark.parametrize(
    "name",
    [
        "linux-image-cloud-amd64",
        "linux-image-6.12.117+deb13-amd64",
        "linux-image-6.12.117+deb13-cloud-amd64-unsigned",
        "linux-headers-6.12.117+deb13-cloud-amd64",
        "linux-image-5.10.0-1-cloud-amd64",
        "linux-modules-7.2.12+deb13-cloud-amd64",
    ],
)
def test_other_packages_are_no_kernels(name: str) -> None:
    assert newest_of_each_series([package(name)]) == []


def test_a_split_kernel_is_its_image_and_its_modules(cache: Cache) -> None:
    found = offer(kernel_archive(cache), "7.2")
    assert [item.name.split("-")[1] for item in found.packages] == ["binary", "modules"]
    assert found.download == 50_000_000
    assert (found.source, found.missing) == ("index", "")


def test_modules_that_no_list_has_come_from_the_pool(cache: Cache) -> None:
    found = offer(kernel_archive(cache), "7.1")
    assert found.source == "pool"
    assert found.packages[1].filename == (
        f"pool/main/l/linux/linux-modules-7.1.13+deb13{CLOUD}_7.1.13-1~bpo13+1_amd64.deb"
    )
    assert found.download == 13_000_000 + 500
    assert "checks their signatures" in kernels.trust_remark(found)


def test_modules_that_even_the_pool_lacks_are_listed_as_missing(cache: Cache) -> None:
    archive = kernel_archive(cache, pool=False)
    (found,) = [kernel for kernel in offered(archive) if kernel.series == "7.1"]
    assert "neither in the archive's lists nor in its pool" in found.missing
    with pytest.raises(HostError, match=r"7\.1 cannot be had: linux-modules-7.1"):
        offer(archive, "7.1")
    with pytest.raises(HostError, match="cannot be had"):
        prepare(cache, archive, found, archive.told.append)


def test_offers_are_worked_out_once_and_known_without_a_network(cache: Cache) -> None:
    first = kernel_archive(cache)
    found = offered(first)
    later = FakeArchive(cache)
    assert offered(later) == found
    later.reachable = False
    assert kernels.remembered(later) == found
    assert kernels.remembered(Archive(Cache(cache.root / "other"))) == []


# --- preparing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("series", ["6.1", "6.12", "7.1", "7.2"])
def test_a_prepared_kernel_is_its_image_and_its_modules(cache: Cache, series: str) -> None:
    kernel = ready(cache, series)
    assert kernel.series == series
    assert kernel.image.read_text() == f"image {kernel.release}"
    assert [path.name for path in kernel.modules.rglob("*.ko*")] == ["kvm.ko.xz"]  # no network drivers
    names = {path.name for path in kernel.folder.iterdir()}
    assert names - {"config"} == {"vmlinuz", "modules", "kernel.json"}  # no documentation, no symbols
    assert kernel.folder == cache.root / "kernels" / kernel.release
    assert prepared(cache) == [kernel]


def test_only_modules_that_nobody_vouches_for_are_enforced(cache: Cache) -> None:
    assert {series: ready(cache, series).enforce for series in ("6.12", "7.1", "7.2")} == {
        "6.12": False,
        "7.1": True,
        "7.2": False,
    }
    assert [kernel.enforce for kernel in prepared(cache)] == [False, True, False]  # also when read again


def test_a_prepared_kernel_needs_no_fetching(cache: Cache) -> None:
    archive = kernel_archive(cache)
    chosen = offer(archive, "6.12")
    for _ in range(2):
        prepare(cache, archive, chosen, archive.told.append)
    assert archive.fetched == [f"linux-image-6.12.117+deb13{CLOUD}"]


def test_an_interrupted_preparation_leaves_no_kernel_and_can_be_repeated(cache: Cache) -> None:
    archive = kernel_archive(cache)
    archive.breaks_after = 1  # after the image, before the modules of the pool
    with pytest.raises(ArchiveUnreachableError):
        prepare(cache, archive, offer(archive, "7.1"), archive.told.append)
    assert prepared(cache) == []
    assert list(cache.folder("kernels").iterdir()) == []
    archive.breaks_after = None
    assert prepare(cache, archive, offer(archive, "7.1"), archive.told.append).image.is_file()


def test_nothing_but_plain_files_comes_out_of_a_package(cache: Cache, tmp_path: Path) -> None:
    archive = kernel_archive(cache)
    (tmp_path / "secret.ko").write_text("mine")
    unpack = archive.unpack

    def unpack_with_link(deb: Path, folder: Path) -> None:
        unpack(deb, folder)
        for modules in folder.glob("usr/lib/modules/*/kernel"):
            (modules / "evil.ko").symlink_to(tmp_path / "secret.ko")
            os.mkfifo(modules / "pipe.ko")

    archive.unpack = unpack_with_link  # type: ignore[method-assign]
    kernel = prepare(cache, archive, offer(archive, "7.1"), archive.told.append)
    assert [path.name for path in kernel.modules.rglob("*.ko*")] == ["kvm.ko.xz"]


def test_a_kernel_that_is_a_link_out_of_the_package_is_refused(cache: Cache, tmp_path: Path) -> None:
    archive = kernel_archive(cache)
    (tmp_path / "modules").mkdir()

    def unpack_link(deb: Path, folder: Path) -> None:
        release = f"7.1.13+deb13{CLOUD}"
        (folder / "boot").mkdir(parents=True, exist_ok=True)
        (folder / "boot" / f"vmlinuz-{release}").touch()
        place = folder / "usr/lib/modules" / release
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "kernel").is_symlink():
            (place / "kernel").symlink_to(tmp_path / "modules")

    archive.unpack = unpack_link  # type: ignore[method-assign]
    with pytest.raises(HostError, match="packages lack"):
        prepare(cache, archive, offer(archive, "7.1"), archive.told.append)


def test_a_newer_kernel_takes_the_place_of_the_older_of_its_series(cache: Cache) -> None:
    archive = kernel_archive(cache)
    newest = archive.listed.pop(2)
    older = prepare(cache, archive, offer(archive, "6.12"), archive.told.append)
    other = prepare(cache, archive, offer(archive, "6.1"), archive.told.append)
    archive.listed.append(newest)
    archive.remember("kernels", None)
    newer = prepare(cache, archive, offer(archive, "6.12"), archive.told.append)
    assert older.release != newer.release
    assert prepared(cache) == [other, newer]


def test_a_replaced_kernel_stays_while_a_lab_uses_it(cache: Cache) -> None:
    archive = kernel_archive(cache)
    newest = archive.listed.pop(2)
    older = prepare(cache, archive, offer(archive, "6.12"), archive.told.append)
    archive.listed.append(newest)
    archive.remember("kernels", None)
    with cache.use(older.folder):
        newer = prepare(cache, archive, offer(archive, "6.12"), archive.told.append)
    assert prepared(cache) == [older, newer]
    assert select(cache, "6.12") == newer


# --- choosing ------------------------------------------------------------------------------------


def test_a_kernel_is_chosen_by_series_or_release(cache: Cache) -> None:
    kernel, other = ready(cache, "6.12"), ready(cache, "6.1")
    assert select(cache, "6.12") == kernel
    assert select(cache, kernel.release) == kernel
    assert select(cache, "6.1") == other
    assert select(cache, "6.18") is None


@pytest.mark.parametrize("text", ["", "6", "newest", "../6.12", "v6.12"])
def test_what_is_no_version_is_refused(cache: Cache, text: str) -> None:
    with pytest.raises(UsageError, match=r"is no kernel; write a series such as 6\.12"):
        select(cache, text)


def test_a_series_that_does_not_exist_names_those_that_do(cache: Cache) -> None:
    with pytest.raises(UsageError, match=r"no kernel 6\.13; it has the series 6\.1, 6\.12, 7\.1, 7\.2"):
        offer(kernel_archive(cache), "6.13")


@pytest.mark.parametrize("damage", ["vmlinuz", "modules", "kernel.json"])
def test_a_damaged_kernel_does_not_count(cache: Cache, damage: str) -> None:
    kernel = ready(cache, "6.12")
    (kernel.folder / damage).rename(kernel.folder / "gone")
    assert prepared(cache) == []
    archive = kernel_archive(cache)
    with pytest.raises(HostError, match="clean --kernels"):
        prepare(cache, archive, offer(archive, "6.12"), archive.told.append)


def test_what_is_prepared_is_provided_without_the_archive(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = ready(cache, "6.12")
    monkeypatch.setattr(kernels, "Archive", lambda *_: pytest.fail("asked the archive"))
    assert provide(cache, "6.12", print) == kernel
    assert provide(cache, kernel.release, print) == kernel


def test_what_is_not_prepared_is_fetched_on_the_way(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "Archive", lambda cache, note: kernel_archive(cache))
    assert provide(cache, "6.1", print).release == f"6.1.0-56{CLOUD}"


def test_without_a_network_the_prepared_ones_are_named(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    ready(cache, "6.12")
    archive = FakeArchive(cache)
    archive.reachable = False
    monkeypatch.setattr(kernels, "Archive", lambda cache, note: archive)
    with pytest.raises(ArchiveUnreachableError, match=r"need no fetching: 6\.12\."):
        provide(cache, "7.2", print)
