"""An archive that plays packages from memory: no apt, no network, and a count of what was fetched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pykvm.errors import HostError
from pykvm.lab.archive import Archive, ArchiveUnreachableError, Package
from pykvm.lab.cache import Cache

CLOUD = "-cloud-amd64"


def package(name: str, version: str = "1", size: int = 1000) -> Package:
    return Package(name, version, size, f"pool/{name}_{version}_amd64.deb")


class FakeArchive(Archive):
    """``listed`` packages unpack to what ``files`` has under their names; ``pool`` maps paths to names."""

    def __init__(
        self,
        cache: Cache,
        listed: Sequence[Package] = (),
        files: Mapping[str, Mapping[str, bytes]] | None = None,
        pool: Mapping[str, str] | None = None,
    ) -> None:
        self.told: list[str] = []
        super().__init__(cache, self.told.append, {})
        self.listed = list(listed)
        self.files = dict(files or {})
        self.pool = dict(pool or {})
        self.fetched: list[str] = []
        self.updates = 0
        self.reachable = True
        self.problem: HostError = ArchiveUnreachableError("Debian's archive could not be reached.")
        self.breaks_after: int | None = None

    def update(self, *, force: bool = False) -> None:
        if not self.reachable:
            raise self.problem
        self.updates += 1

    def packages(self, pattern: str) -> list[Package]:
        self.update()
        return self.listed

    def closure(self, names: Sequence[str], suite: str = "trixie") -> list[Package]:
        self.update()
        return [item for item in self.listed if item.name in names or item.name.startswith("lib")]

    @contextlib.contextmanager
    def fetch(self, packages: Sequence[Package], what: str = "packages") -> Iterator[list[Path]]:
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(self._deb(item.name)) for item in packages]

    @contextlib.contextmanager
    def _deb(self, name: str) -> Iterator[Path]:
        if not self.reachable:
            raise ArchiveUnreachableError("Debian's archive could not be reached.")
        if self.breaks_after == len(self.fetched):
            raise ArchiveUnreachableError("The connection broke.")
        self.fetched.append(name)
        yield Path(f"/{name}.deb")

    def pool_size(self, path: str) -> int | None:
        return 500 if path in self.pool else None

    @contextlib.contextmanager
    def fetch_pool(self, path: str) -> Iterator[Path]:
        if path not in self.pool:
            raise HostError(f"{path} is gone from the archive.")
        with self._deb(self.pool[path]) as deb:
            yield deb

    def unpack(self, deb: Path, folder: Path) -> None:
        for place, contents in self.files.get(deb.stem, {}).items():
            path = folder / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents)


def one_package_kernel(release: str, folder: str = "usr/lib") -> dict[str, bytes]:
    """What linux-image has up to 6.18; the modules lie in lib before 6.12."""
    return {
        f"boot/vmlinuz-{release}": b"image " + release.encode(),
        f"boot/config-{release}": b"CONFIG_KVM=m\n",
        f"boot/System.map-{release}": bytes(100),
        f"{folder}/modules/{release}/kernel/arch/x86/kvm/kvm.ko.xz": b"kvm",
        f"{folder}/modules/{release}/kernel/drivers/net/e1000.ko.xz": bytes(100),
        f"usr/share/doc/linux-image-{release}/copyright": b"GPL",
    }


def kernel_archive(cache: Cache, *, pool: bool = True) -> FakeArchive:
    """6.1 and 6.12 (two versions) in one package each, 7.2 in two, 7.1 with its modules only in the pool."""
    releases = ["6.1.0-56", "6.12.96+deb13", "6.12.117+deb13"]
    listed = [package(f"linux-image-{release}{CLOUD}", size=27_000_000) for release in releases]
    files: dict[str, Mapping[str, bytes]] = {
        item.name: one_package_kernel(
            item.name.removeprefix("linux-image-"), "lib" if "6.1.0" in item.name else "usr/lib"
        )
        for item in listed
    }
    for release in (f"7.1.13+deb13{CLOUD}", f"7.2.12+deb13{CLOUD}"):
        version = f"1:{release.partition('+')[0]}-1~bpo13+1"
        old = release.startswith("7.1")
        image = f"boot/vmlinuz-{release}" if old else f"usr/lib/modules/{release}/vmlinuz"
        listed += [
            package(f"linux-image-{release}", version, 1916),
            package(f"linux-binary-{release}", version, 13_000_000),
        ]
        if not old:
            listed.append(package(f"linux-modules-{release}", version, 37_000_000))
        files[f"linux-binary-{release}"] = {image: b"image " + release.encode()}
        files[f"linux-modules-{release}"] = {
            f"usr/lib/modules/{release}/kernel/arch/x86/kvm/kvm.ko.xz": b"kvm"
        }
    name = f"linux-modules-7.1.13+deb13{CLOUD}"
    place = f"pool/main/l/linux/{name}_7.1.13-1~bpo13+1_amd64.deb"
    return FakeArchive(cache, listed, files, {place: name} if pool else {})
