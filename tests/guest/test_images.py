"""Image files: what the good ones give, and that the hostile ones give ImageError and nothing else."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pykvm.errors import ImageError
from pykvm.guest import catalog
from pykvm.guest.boot import BootMode
from pykvm.guest.images import load_image
from pykvm.guest.multiboot import prepare_multiboot
from pykvm.memory import GuestMemory

MIB = 1 << 20
CODE = b"\x90\xf4" * 8


def elf(bits: int = 32, code: bytes = CODE, **change: object) -> bytes:
    """An executable with one segment, by the formats of the System V ABI; ``change`` damages fields."""
    fields = {
        "ident": b"\x7fELF" + bytes([1 if bits == 32 else 2, 1, 1]) + bytes(9),
        "type": 2,
        "machine": 3 if bits == 32 else 62,
        "entry": 0x100004,
        "phoff": 52 if bits == 32 else 64,
        "phentsize": 32 if bits == 32 else 56,
        "phnum": 1,
        "segments": [(0x100000, 0x100000, None, len(code), len(code) + 0x100)],
    } | change
    word = "I" if bits == 32 else "Q"
    header = struct.pack(
        f"<16sHHI{word}{word}{word}IHHHHHH",
        *(fields["ident"], fields["type"], fields["machine"], 1, fields["entry"], fields["phoff"], 0, 0),
        *(0, fields["phentsize"], fields["phnum"], 0, 0, 0),
    )
    segments = fields["segments"]
    start = len(header) + len(segments) * (32 if bits == 32 else 56)
    table = b""
    for linear, gpa, offset, in_file, size in segments:
        offset = start if offset is None else offset
        if bits == 32:
            table += struct.pack("<8I", 1, offset, linear, gpa, in_file, size, 7, 1)
        else:
            table += struct.pack("<2I6Q", 1, 7, offset, linear, gpa, in_file, size, 1)
    return header + table + code


def multiboot_header(flags: int = 3, addresses: tuple[int, ...] = ()) -> bytes:
    magic = 0x1BADB002
    return struct.pack("<3I", magic, flags, -(magic + flags) & 0xFFFFFFFF) + struct.pack(
        f"<{len(addresses)}I", *addresses
    )


@pytest.mark.parametrize(("bits", "mode"), [(32, BootMode.PROTECTED32), (64, BootMode.LONG)])
def test_elf(bits, mode):
    image = load_image(elf(bits))
    assert (image.format, image.mode, image.entry) == ("elf", mode, 0x100004)
    (chunk,) = image.chunks
    assert (chunk.gpa, chunk.data, chunk.size) == (0x100000, CODE, len(CODE) + 0x100)


def test_elf_entry_is_physical():
    image = load_image(
        elf(64, entry=0xFFFFFFFF80100004, segments=[(0xFFFFFFFF80100000, 0x200000, None, 16, 16)])
    )
    assert image.entry == 0x200004


def test_mode_may_be_chosen():
    assert load_image(elf(64), mode=BootMode.LA57).mode is BootMode.LA57
    assert load_image(b"\xf4", mode=BootMode.PAE).mode is BootMode.PAE


def test_flat():
    image = load_image(b"\xf4\xf4", address=0x7C00, entry=0x7C01)
    assert (image.format, image.mode, image.entry) == ("flat", BootMode.REAL, 0x7C01)
    assert [(chunk.gpa, chunk.data) for chunk in image.chunks] == [(0x7C00, b"\xf4\xf4")]


def test_rom_ends_at_4_gib():
    image = load_image(bytes(0x2000), "rom")
    assert image.chunks[0].gpa == 0xFFFFE000
    assert image.entry == 0xFFFFFFF0


def test_multiboot_is_detected_before_elf():
    image = load_image(elf(32, multiboot_header() + bytes(16)))
    assert (image.format, image.mode) == ("multiboot", BootMode.PROTECTED32)
    assert load_image(catalog.load("multiboot").image).format == "multiboot"


def test_multiboot_addresses_without_elf():
    # Header 4 bytes into the file; loaded to 0x200000, 64 bytes in the file, zeroed up to 0x201000.
    fields = (0x200004, 0x200000, 0x200040, 0x201000, 0x200030)
    data = b"\x90" * 4 + multiboot_header(1 << 16, fields) + b"\xcc" * 100
    image = load_image(data)
    (chunk,) = image.chunks
    assert (image.entry, chunk.gpa, chunk.data, chunk.size) == (0x200030, 0x200000, data[:64], 0x1000)


def test_multiboot_load_end_zero_means_the_whole_file():
    data = multiboot_header(1 << 16, (0x200000, 0x200000, 0, 0, 0x200020)) + bytes(100)
    assert load_image(data).chunks[0].data == data


HUGE = (1 << 64) - 16
BAD_ELFS = {
    "header cut": elf()[:40],
    "header cut, 64-bit": elf(64)[:63],
    "only the magic": b"\x7fELF",
    "class 3": elf(ident=b"\x7fELF\x03\x01\x01" + bytes(9)),
    "big endian": elf(ident=b"\x7fELF\x01\x02\x01" + bytes(9)),
    "ARM": elf(machine=40),
    "x86-64 code in a 32-bit file": elf(machine=62),
    "relocatable": elf(type=1),
    "shared": elf(type=3),
    "no segments": elf(phnum=0),
    "65535 segments": elf(phnum=0xFFFF),
    "table beyond the file": elf(phoff=0x10000),
    "table far beyond the file": elf(64, phoff=HUGE),
    "entries of a wrong size": elf(phentsize=16),
    "entries of size 0": elf(phentsize=0),
    "segment beyond the file": elf(segments=[(0x100000, 0x100000, 0x1000, 16, 16)]),
    "segment longer than the file": elf(segments=[(0x100000, 0x100000, None, 0x1000, 0x1000)]),
    "offset wraps": elf(64, segments=[(0x100000, 0x100000, HUGE, 32, 32)]),
    "more in the file than in memory": elf(segments=[(0x100000, 0x100000, None, 16, 8)]),
    "address wraps": elf(64, entry=HUGE, segments=[(HUGE, HUGE, None, 16, 32)]),
    "address beyond 52 bits": elf(64, segments=[(0x100000, 1 << 52, None, 16, 16)]),
    "entry outside": elf(entry=0x300000),
    "segments overlap": elf(
        phnum=2, segments=[(0x100000, 0x100000, None, 16, 32), (0x100010, 0x100010, None, 16, 16)]
    ),
    "nothing to load": elf(segments=[(0x100000, 0x100000, None, 0, 0)]),
}


@pytest.mark.parametrize("data", BAD_ELFS.values(), ids=BAD_ELFS.keys())
def test_bad_elf_files(data):
    with pytest.raises(ImageError):
        load_image(data, "elf")


BAD_MULTIBOOTS = {
    "no header": elf(),
    "empty ELF": b"\x7fELF" + bytes(100),
    "wrong checksum": struct.pack("<3I", 0x1BADB002, 3, 5) + elf(),
    "header not aligned": b"\x90" + multiboot_header(1 << 16, (0x200000, 0x200000, 0, 0, 0x200000)),
    "header too late": bytes(8192)
    + multiboot_header(1 << 16, (0x202000, 0x200000, 0, 0, 0x202020))
    + bytes(64),
    "unknown required features": elf(32, multiboot_header(1 << 5) + bytes(16)),
    "64-bit ELF": elf(64, multiboot_header() + bytes(16)),
    "header at the end": bytes(8) + multiboot_header(1 << 16),
    "starts before the file": multiboot_header(1 << 16, (0x200010, 0x200000, 0, 0, 0x200020)) + bytes(64),
    "header before the load address": multiboot_header(1 << 16, (0x1FF000, 0x200000, 0, 0, 0x200020))
    + bytes(64),
    "ends before it starts": multiboot_header(1 << 16, (0x200000, 0x200000, 0x100000, 0, 0x200020))
    + bytes(64),
    "ends beyond the file": multiboot_header(1 << 16, (0x200000, 0x200000, 0x300000, 0, 0x200020))
    + bytes(64),
    "beyond 4 GiB": multiboot_header(1 << 16, (0xFFFFFFF0, 0xFFFFFFF0, 0, 0, 0xFFFFFFF0)) + bytes(64),
    "entry outside": multiboot_header(1 << 16, (0x200000, 0x200000, 0, 0, 0x100)) + bytes(64),
}


@pytest.mark.parametrize("data", BAD_MULTIBOOTS.values(), ids=BAD_MULTIBOOTS.keys())
def test_bad_multiboot_files(data):
    with pytest.raises(ImageError):
        load_image(data, "multiboot")


@pytest.mark.parametrize("size", [1, 4095, 4097, (16 << 20) + 4096])
def test_bad_roms(size):
    with pytest.raises(ImageError):
        load_image(bytes(size), "rom")


@pytest.mark.parametrize(
    "arguments",
    [{"address": -1}, {"address": 1 << 52}, {"address": MIB}, {"entry": 0x7FFF}, {"entry": 0x9000}],
)
def test_bad_flat_addresses(arguments):
    with pytest.raises(ImageError):
        load_image(b"\xf4", "flat", **arguments)


@pytest.mark.parametrize("format", ["auto", "flat", "elf", "multiboot", "rom"])
def test_empty_files(format):
    with pytest.raises(ImageError, match="empty"):
        load_image(b"", format)


def test_unknown_format():
    with pytest.raises(ImageError, match="multiboot"):
        load_image(b"\xf4", "tape")


def test_image_that_does_not_fit_changes_nothing():
    with GuestMemory(MIB) as memory:
        with pytest.raises(ImageError, match="give it more"):
            load_image(elf()).place(memory)
        with pytest.raises(ImageError, match="give it more"):
            load_image(elf(64, phnum=2, entry=0x1000, segments=[
                (0x1000, 0x1000, None, 16, 16), (1 << 40, 1 << 40, None, 16, 1 << 50)
            ])).place(memory)  # fmt: skip
        assert memory.allocated == 0


GOOD = [elf(32), elf(64), elf(32, multiboot_header() + bytes(16)), bytes(4096)]
GOOD.append(multiboot_header(1 << 16, (0x200000, 0x200000, 0, 0, 0x200020)) + bytes(64))


def accept_or_refuse(data: bytes, format: str) -> None:
    """Everything that may be done with an untrusted file."""
    try:
        image = load_image(data, format)
    except ImageError:
        return
    with GuestMemory(4 * MIB) as memory:
        try:
            if image.format == "multiboot":
                prepare_multiboot(memory, image, cmdline="x", modules=[(b"module", "name")])
            else:
                image.place(memory)
        except ImageError:
            return
        for chunk in image.chunks:
            assert memory.read(chunk.gpa, len(chunk.data)) == chunk.data


@settings(max_examples=300, deadline=None)
@given(
    base=st.sampled_from(GOOD),
    changes=st.lists(st.tuples(st.integers(0, 199), st.binary(min_size=1, max_size=8)), max_size=6),
    cut=st.integers(0, 5000),
    format=st.sampled_from(["auto", "elf", "multiboot", "rom", "flat"]),
)
def test_damaged_images_are_refused_or_load(base, changes, cut, format):
    data = bytearray(base)
    for at, content in changes:
        data[at : at + len(content)] = content
    accept_or_refuse(bytes(data[: cut or None]), format)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300), format=st.sampled_from(["auto", "elf", "multiboot", "rom", "flat"]))
@example(data=b"\x7fELF\x02\x01" + b"\xff" * 100, format="elf")
def test_random_bytes_are_refused_or_load(data, format):
    accept_or_refuse(data, format)


# --- multiboot information -----------------------------------------------------------------------


def words(memory, at, count):
    return struct.unpack(f"<{count}I", memory.read(at, 4 * count))


def text(memory, at):
    return memory.read(at, 100).split(b"\0")[0].decode()


def test_multiboot_information_as_the_specification_lays_it_out():
    kernel = load_image(
        elf(32, multiboot_header() + bytes(16), segments=[(4 * MIB, 4 * MIB, None, 28, MIB)], entry=4 * MIB)
    )
    with GuestMemory(32 * MIB) as memory:
        state = prepare_multiboot(
            memory,
            kernel,
            cmdline="kernel arguments",
            modules=[(b"NR_CPUS=1\n", "environment"), (b"x" * 5000, "")],
        )
        assert (state.registers.rax, state.registers.rip) == (0x2BADB002, 4 * MIB)
        info = words(memory, state.registers.rbx, 17)
        assert info[0] & 0b1001001101 == 0b1001001101  # memory, command line, modules, map, loader name
        assert info[1] == 0x9F000 // 1024
        assert info[2] == 31 * 1024
        assert text(memory, info[4]) == "kernel arguments"
        assert info[5] == 2
        start, end, name, _ = words(memory, info[6], 4)
        assert memory.read(start, end - start) == b"NR_CPUS=1\n"
        assert text(memory, name) == "environment"
        second = words(memory, info[6] + 16, 4)
        assert memory.read(second[0], second[1] - second[0]) == b"x" * 5000
        assert start % 4096 == second[0] % 4096 == 0
        regions = [struct.unpack("<IQQI", memory.read(info[12] + at, 24)) for at in range(0, info[11], 24)]
        assert regions == [(20, 0, 0x9F000, 1), (20, 0x9F000, MIB - 0x9F000, 2), (20, MIB, 31 * MIB, 1)]
        assert text(memory, info[16]) == "pykvm"
        # Test kernels use page 0 and 4 to 18 MiB without asking.
        used = [state.registers.rbx, info[4], info[6], info[12], info[16], start, name, *second[:3]]
        assert all(0x1000 <= at < 4 * MIB or at >= 18 * MIB for at in used)


def test_multiboot_places_avoid_the_kernel():
    low = load_image(
        elf(
            32,
            multiboot_header() + bytes(16),
            segments=[(0x10000, 0x10000, None, 28, 0x80000)],
            entry=0x10000,
        )
    )
    with GuestMemory(8 * MIB) as memory:
        state = prepare_multiboot(memory, low, cmdline="c", modules=[(b"m" * 0x100000, "big")])
        info = words(memory, state.registers.rbx, 17)
        for at in (state.registers.rbx, info[4], info[6], info[12], words(memory, info[6], 1)[0]):
            assert not 0x10000 <= at < 0x90000
        assert memory.read(0x10000, 28) == multiboot_header() + bytes(16)


def test_modules_that_do_not_fit():
    kernel = load_image(elf(32, multiboot_header() + bytes(16)))
    with GuestMemory(4 * MIB) as memory, pytest.raises(ImageError, match="room"):
        prepare_multiboot(memory, kernel, modules=[(bytes(4 * MIB), "too big")])
