"""``pykvm run`` with small guests written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from pykvm.backends import open_system
from pykvm.cli import host_profile
from pykvm.cli.session import Session
from pykvm.guest import catalog
from tests.cli.runner import Result, execute, invoke
from tests.patience import patient

IMAGES = Path(catalog.__file__).parent / "images"
SOON = f"{patient(10):g}s"
"""For --timeout: a guest that ends at once has ended by then."""
HALT = b"\xf4"
EXIT_5 = b"\xb0\x05\xe6\xf4"  # mov al, 5 ; out 0xf4, al
SPIN = b"\xeb\xfe"


def out(port: int, *values: int) -> bytes:
    """mov dx, port ; for each value: mov al, value ; out dx, al (16-bit code)."""
    return b"\xba" + port.to_bytes(2, "little") + b"".join(bytes([0xB0, value, 0xEE]) for value in values)


@pytest.fixture(autouse=True, params=[pytest.param("kvm", marks=pytest.mark.kvm), "model"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the commands of this process open, whatever they are told."""
    name: str = request.param
    monkeypatch.setattr(host_profile, "open_system", lambda _: open_system(name))
    monkeypatch.setattr(Session, "tell_choice", lambda *_: None)  # nothing was chosen by itself
    return name


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "guest.bin"


def run(capfd: pytest.CaptureFixture[str], image: Path, code: bytes, *options: str) -> Result:
    image.write_bytes(code)
    return invoke(capfd, "run", str(image), "--timeout", SOON, *options)


def test_serial_goes_to_the_terminal_and_the_status_comes_from_the_guest(
    capfd: pytest.CaptureFixture[str], image: Path
) -> None:
    result = run(capfd, image, out(0x3F8, *b"hi\n") + EXIT_5)
    assert (result.status, result.out, result.err) == (11, "hi\n", "")


def test_with_json_serial_goes_to_standard_error(capfd: pytest.CaptureFixture[str], image: Path) -> None:
    result = run(capfd, image, out(0x3F8, *b"hi\n") + EXIT_5, "--json")
    assert result.status == 11
    assert result.err == "hi\n"
    assert result.document["serial"] == "hi\n"
    assert result.document["status"] == 11


@pytest.mark.parametrize(
    ("name", "port"), [("com1", 0x3F8), ("com2", 0x2F8), ("com3", 0x3E8), ("com4", 0x2E8)]
)
def test_the_serial_port_can_be_chosen(
    capfd: pytest.CaptureFixture[str], image: Path, name: str, port: int
) -> None:
    result = run(capfd, image, out(port, *b"x") + HALT, "--serial", name)
    assert (result.status, result.out) == (0, "x")


def test_post_codes_are_recorded_on_a_chosen_port(capfd: pytest.CaptureFixture[str], image: Path) -> None:
    result = run(capfd, image, out(0x190, 1, 2, 0xFF) + HALT, "--post-port", "0x190", "--json")
    assert result.document["post_codes"] == [1, 2, 255]


def test_a_multiboot_kernel_gets_its_command_line(capfd: pytest.CaptureFixture[str]) -> None:
    image = IMAGES / "multiboot.bin"
    result = invoke(capfd, "run", str(image), "--append", "one two", "--timeout", SOON, "--json")
    assert result.document["format"] == "multiboot"
    assert result.document["serial"].strip() == f"{image} one two"


def test_a_rom_starts_at_the_reset_vector(capfd: pytest.CaptureFixture[str]) -> None:
    result = invoke(capfd, "run", str(IMAGES / "rom.bin"), "--format", "rom", "--timeout", SOON)
    assert "reset vector" in result.out


@pytest.mark.parametrize("backend", [pytest.param("kvm", marks=pytest.mark.kvm)], indirect=True)
def test_irqchip_makes_a_halt_wait_in_the_kernel(capfd: pytest.CaptureFixture[str], image: Path) -> None:
    result = run(capfd, image, HALT, "--irqchip", "--timeout", "200ms")
    assert result.status == 124


def test_a_halt_is_status_0(capfd: pytest.CaptureFixture[str], image: Path) -> None:
    assert run(capfd, image, HALT).status == 0


def test_a_guest_that_does_not_end_times_out(capfd: pytest.CaptureFixture[str], image: Path) -> None:
    result = run(capfd, image, SPIN, "--timeout", "100ms")
    assert result.status == 124
    assert "--timeout" in result.err


def test_a_triple_fault_is_an_error_of_the_guest(capfd: pytest.CaptureFixture[str], image: Path) -> None:
    image.write_bytes(b"\x0f\x0b")  # ud2 in long mode without an IDT
    result = invoke(capfd, "run", str(image), "--mode", "long", "--timeout", SOON)
    assert result.status == 7
    assert "Traceback" not in result.err


@pytest.mark.parametrize("log", ["bitmap", "manual", "ring"])
def test_log_tells_what_the_guest_wrote(
    capfd: pytest.CaptureFixture[str], image: Path, log: str, backend: str
) -> None:
    # mov byte [0x5000], 1 ; mov byte [0x6000], 1 ; mov byte [0x9fff], 1: gfns 5, 6 and 9
    code = b"\xc6\x06\x00\x50\x01\xc6\x06\x00\x60\x01\xc6\x06\xff\x9f\x01" + HALT
    document = run(capfd, image, code, "--log", log, "--json").document
    written = [{"slot": 0, "first_gfn": 5, "pages": 2}, {"slot": 0, "first_gfn": 9, "pages": 1}]
    # Nested paging reports code that was fetched, too (hosts.md B.9): here gfn 8.
    with_code = [written[0], {"slot": 0, "first_gfn": 8, "pages": 2}]
    right = [{"tracker": log, "pages": 3, "runs": written}]
    if backend == "kvm":
        right.append({"tracker": log, "pages": 4, "runs": with_code})
    assert document["dirty"] in right


def test_trace_exits_lists_what_nobody_answers(capfd: pytest.CaptureFixture[str], image: Path) -> None:
    code = b"\xe5\x99\xe7\x99" + HALT  # in ax, 0x99 ; out 0x99, ax
    result = run(capfd, image, code, "--trace-exits", "--json")
    assert result.document["unanswered"] == {"in 0x99": 1, "out 0x99": 1}
    assert result.document["exits"] == {"IoIn": 1, "IoOut": 1, "Halted": 1}
    assert "data=b'\\xff\\xff'" in result.err  # what was read is all ones, and written back


def test_load_address_and_entry(capfd: pytest.CaptureFixture[str], image: Path) -> None:
    code = SPIN + out(0x3F8, *b"e") + HALT
    result = run(capfd, image, code, "--load-address", "0x1000", "--entry", "0x1002")
    assert (result.status, result.out) == (0, "e")


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        (b"", (), "empty"),
        (b"x", ("--format", "elf"), "ELF"),
        (b"x", ("--format", "multiboot"), "multiboot header"),
        (b"x", ("--format", "rom"), "multiple of 4096"),
        (HALT, ("--entry", "0x9000"), "outside the image"),
    ],
)
def test_a_bad_image_is_status_2(
    capfd: pytest.CaptureFixture[str], image: Path, content: bytes, options: tuple[str, ...], sentence: str
) -> None:
    result = run(capfd, image, content, *options)
    assert result.status == 2
    assert sentence in result.err


def test_an_image_that_never_ends_is_refused(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pykvm.cli.run.LARGEST_FILE", 1 << 22)
    result = invoke(capfd, "run", "/dev/zero", "--timeout", "1s")
    assert result.status == 2
    assert "/dev/zero is longer than 4 MiB" in result.err


def test_the_exit_status_of_the_process_is_the_guests(image: Path) -> None:
    image.write_bytes(out(0xE9, *b"bye") + EXIT_5)
    result = execute("run", str(image))
    assert (result.status, result.out, result.err) == (11, "bye", "")


def test_a_guest_that_resets_by_the_keyboard_controller_ends(
    capfd: pytest.CaptureFixture[str], image: Path
) -> None:
    wait = b"\xe4\x64\xa8\x02\x75\xfa"  # in al, 0x64 ; test al, 2 ; jnz back: until the controller listens
    result = run(capfd, image, wait + b"\xb0\xfe\xe6\x64" + SPIN)  # mov al, 0xfe ; out 0x64, al
    assert (result.status, result.err) == (0, "")
