"""Bochs as an emulator of labs: what lies in memory, what its configuration says, and one real boot."""

from __future__ import annotations

import itertools
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import capstone
import pytest

from pykvm.errors import HostError, UsageError
from pykvm.lab import bochs_build, bochs_images
from pykvm.lab.bochs import LARGEST_MEMORY, Bochs
from pykvm.lab.bochs_build import Built
from pykvm.lab.cache import Cache
from pykvm.lab.emulator import Boot, Launch
from pykvm.lab.kernels import PreparedKernel

SECTORS = 3
KERNEL = b"protected-mode kernel" * 100


def bz_image(*, protocol: int = 0x20F, mark: bytes = b"HdrS", longest: int = 2047) -> bytes:
    """The fields of a bzImage that a boot loader reads."""
    head = bytearray((1 + SECTORS) * 512)
    head[0x1F1] = SECTORS
    head[0x202:0x206] = mark
    struct.pack_into("<H", head, 0x206, protocol)
    struct.pack_into("<I", head, 0x238, longest)
    struct.pack_into("<I", head, 0x260, 50 << 20)
    return bytes(head) + KERNEL


@pytest.fixture
def boot(tmp_path: Path) -> Boot:
    folder = tmp_path / "a run"
    folder.mkdir()
    image, base, python = (tmp_path / name for name in ("vmlinuz", "base.cpio", "python.cpio"))
    image.write_bytes(bz_image())
    base.write_bytes(b"base!")
    python.write_bytes(b"python layer")
    kernel = PreparedKernel("6.1", "6.1.0-56-cloud-amd64", image, tmp_path, False)
    return Boot(folder, kernel, (base, python), ("console=ttyS0", "panic=-1"), 2048)


@pytest.fixture
def launch(boot: Boot, tmp_path: Path) -> Launch:
    built = tmp_path / "built"
    built.mkdir()
    (built / "VERSION").write_text("3.0\n")
    emulator = Bochs(Built(built))
    assert emulator.name == "Bochs 3.0"
    return emulator.launch(boot)


def configured(launch: Launch) -> dict[str, str]:
    """The configuration as Bochs reads it: a word, a colon, the rest of the line."""
    text = Path(launch.argv[-1]).read_text()
    return dict(line.split(": ", 1) for line in text.splitlines())


def ram(launch: Launch) -> dict[int, bytes]:
    """What Bochs puts at which address."""
    found = {}
    for number in range(1, 5):
        if value := configured(launch).get(f"optramimage{number}"):
            _, path, rest = value.split('"')
            found[int(rest.removeprefix(", address="), 16)] = Path(path).read_bytes()
    return found


def test_kernel_layers_and_command_line_lie_where_the_boot_protocol_wants_them(launch: Launch) -> None:
    images = ram(launch)
    setup = images[bochs_images.SETUP_AT]
    assert images[bochs_images.KERNEL_AT] == KERNEL
    layers_at, layers_size = struct.unpack_from("<II", setup, 0x218)
    assert images[layers_at] == b"base!\0\0\0python layer"
    assert layers_size == len(images[layers_at])
    assert layers_at % 4096 == 0
    assert setup[0x210] == 0xFF
    assert setup[0x211] & 0x80
    (text_at,) = struct.unpack_from("<I", setup, 0x228)
    text = setup[text_at - bochs_images.SETUP_AT :]
    assert text.startswith(b"console=ttyS0 panic=-1 tsc_early_khz=300000 ")
    assert text.endswith(b"\0")


def test_nothing_in_memory_lies_upon_another(launch: Launch) -> None:
    places = sorted((address, address + len(data)) for address, data in ram(launch).items())
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(places))
    assert places[0][1] <= bochs_images.CONVENTIONAL_END
    assert places[-1][1] <= 2047 << 20  # the BIOS has its ACPI tables above


def test_the_rom_enters_the_setup() -> None:
    code = bochs_images.boot_rom()
    assert code[:3] == b"\x55\xaa\x04"
    assert len(code) == 4 * 512
    assert sum(code) % 256 == 0  # else the BIOS passes it by
    steps = [
        f"{name} {operands}".strip()
        for _, _, name, operands in capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_16).disasm_lite(
            code[3:], 0, 9
        )
    ]
    segments = [f"mov {name}, ax" for name in ("ds", "es", "ss", "fs", "gs")]
    assert steps == ["cli", "mov ax, 0x9000", *segments, "mov sp, 0xde00", "ljmp 0x9020:0"]
    assert bochs_images.video_rom()[3] == 0xCB  # retf


def test_the_configuration(launch: Launch, boot: Boot) -> None:
    found = configured(launch)
    assert found["memory"] == "guest=2048, host=2048"  # one piece of memory, or RAM images are misread
    assert "model=corei7_icelake_u" in found["cpu"]
    assert 'add_features="la57"' in found["cpu"]
    assert found["display_library"] == "nogui"
    assert found["panic"] == "action=fatal"
    assert found["com1"].endswith(f'mode=file, dev="{launch.console}"')
    assert found["com2"].endswith(f'mode=file, dev="{launch.wire}"')
    assert launch.console.parent == launch.wire.parent == boot.folder
    assert launch.wire.exists()  # the session opens it before Bochs writes to it


def test_a_path_that_bochs_cannot_read_is_refused(boot: Boot, tmp_path: Path) -> None:
    odd = tmp_path / "a $HOME"
    odd.mkdir()
    with pytest.raises(HostError, match="PYKVM_LAB_CACHE"):
        Bochs(Built(odd)).launch(Boot(odd, boot.kernel, boot.layers, boot.append, boot.memory))


@pytest.mark.parametrize(("memory", "says"), [(LARGEST_MEMORY + 1, "at most 2048 MiB"), (64, "--memory")])
def test_memory_that_cannot_be_is_refused(boot: Boot, memory: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Bochs(Built(boot.folder)).launch(Boot(boot.folder, boot.kernel, boot.layers, boot.append, memory))


def test_a_command_line_that_is_too_long_is_refused(boot: Boot) -> None:
    with pytest.raises(UsageError, match="command line is too long"):
        Bochs(Built(boot.folder)).launch(
            Boot(boot.folder, boot.kernel, boot.layers, ("x" * 2048,), boot.memory)
        )


@pytest.mark.parametrize("image", [bz_image(mark=b"MZ\0\0"), bz_image(protocol=0x204), b"\x7fELF"])
def test_what_is_no_kernel_is_refused(image: bytes) -> None:
    with pytest.raises(HostError, match="no Linux kernel"):
        bochs_images.split(image, "vmlinuz")


@pytest.mark.lab
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("intel-ept", {"ept": "Y", "eptad": "Y", "pml": "Y", "unrestricted_guest": "Y"}),
        ("intel-shadow", {"ept": "N", "eptad": "N", "pml": "N", "unrestricted_guest": "N"}),
    ],
)
def test_a_lab_of_intels_kvm(kind: str, expected: dict[str, str]) -> None:
    """Boots it, built first if it was not, and asks the module what it is and KVM for VMs in all modes."""
    if bochs_build.find(Cache()) is None and not (shutil.which("g++") and shutil.which("make")):
        pytest.skip("Bochs is not built, and g++ or make is not installed")
    show = "cd /sys/module/kvm_intel/parameters && grep -H . ept eptad pml unrestricted_guest; pykvm info"
    options = ["lab", "run", "--kernel", "6.1", "--kvm", kind, "--accel", "emulate", "--timeout", "20m"]
    done = subprocess.run(
        [sys.executable, "-m", "pykvm", *options, "--", "sh", "-c", show],
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert dict(line.split(":") for line in lines[: len(expected)]) == expected
    modes = [line for line in lines if " native " in line]
    assert any(line.startswith("long, 5-level paging") for line in modes)
