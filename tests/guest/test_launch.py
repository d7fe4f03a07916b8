"""Images and modes on real KVM and on the model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pykvm.errors import CapabilityError, ImageError, UsageError
from pykvm.guest import catalog, modes
from pykvm.guest.boot import BootMode
from pykvm.guest.devices import DeviceBus
from pykvm.guest.images import load_image
from pykvm.guest.launch import BootExtras, launch
from pykvm.guest.modes import MODES, launch_mode_test, why_mode_fails
from pykvm.guest.pc_devices import DebugExit, DebugText, PostCode, Serial16550
from pykvm.machine import IoOut, Registers, Segment
from pykvm.memory import GuestMemory
from tests.backends import on_kvm
from tests.patience import patient

MIB = 1 << 20


class Board:
    def __init__(self, **arguments):
        self.bus = DeviceBus(**arguments)
        self.text, self.serial, self.post = DebugText(), Serial16550(), PostCode()
        self.bus.attach_ports(DebugExit(), DebugExit.PORT)
        self.bus.attach_ports(self.text, 0xE9)
        self.bus.attach_ports(self.serial, 0x3F8, 8)
        self.bus.attach_ports(self.post, PostCode.PORT)


def run(guest):
    with guest:
        guest.runner.start()
        return guest.runner.wait(patient(20))


@pytest.fixture
def paged_without_long_mode(system):
    """Skips where the host cannot run 32-bit paging: found by the plainest paged guest there is, one 4 MiB
    identity page set up by hand.
    """
    with system.create_machine() as machine, GuestMemory(MIB) as memory:
        machine.create_slot(memory, 0)
        memory.write(0x1000, (0x83).to_bytes(4, "little"))  # present, writable, 4 MiB
        memory.write(0x2000, b"\xe6\x10")  # out 0x10, al
        vcpu = machine.create_vcpu()
        vcpu.set_cpuid(machine.supported_cpuid)
        special = vcpu.get_special_registers()
        special.cs = Segment(limit=0xFFFFFFFF, selector=8, type=0xB, db=1, g=1)
        special.ds = special.es = special.ss = Segment(limit=0xFFFFFFFF, selector=16, type=3, db=1, g=1)
        special.cr0, special.cr3, special.cr4 = 0x80000011, 0x1000, 0x10
        vcpu.set_special_registers(special)
        vcpu.set_registers(Registers(rip=0x2000))
        if not isinstance(vcpu.run(), IoOut):
            pytest.skip("this host's KVM runs paging in long mode only (docs/reference/hosts.md C.1)")


def check_mode(system, name, cpl):
    """The guest finishes well, and its stores are where the mode's addressing puts them."""
    guest = launch_mode_test(system, name, cpl=cpl)
    with guest:
        guest.runner.start()
        assert guest.runner.wait(patient(20)) == 1
        value = 0xC0FFEE01
        at = 0x20000 if name == "real" else 0x120000
        for _ in range(8):
            assert guest.memory.read(at, 4) == value.to_bytes(4, "little")
            at += 0x1004
            value = (value << 3 | value >> 29) & 0xFFFFFFFF
        assert guest.memory.read(at, 4) == bytes(4)
    assert why_mode_fails(system, name, cpl=cpl) is None


@pytest.mark.parametrize(
    ("name", "cpl"),
    [("real", 0)] + [(name, cpl) for name in ("protected16", "protected32", "long") for cpl in (0, 3)],
)
def test_mode(system, name, cpl):
    check_mode(system, name, cpl)


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("name", ["paged32", "pae"])
def test_paged_mode_below_long_mode(system, paged_without_long_mode, name, cpl):
    check_mode(system, name, cpl)


@pytest.mark.parametrize("cpl", [0, 3])
def test_five_level_paging(system, cpl):
    try:
        check_mode(system, "la57", cpl)
    except CapabilityError as error:
        with system.create_machine() as machine:
            leaf = [entry for entry in machine.supported_cpuid if (entry.function, entry.index) == (7, 0)]
        assert leaf[0].ecx >> 16 & 1 == 0
        pytest.skip(str(error))


def test_why_mode_fails_tells_wrong_stores_and_time_outs(system, monkeypatch):
    """A guest whose stores do not read back ends with status 3; one that hangs is given up."""
    monkeypatch.setattr(modes, "MODES", {**MODES, "long": BootMode.PROTECTED32})
    assert why_mode_fails(system, "long", timeout=1) is not None


def test_rom_starts_at_the_reset_vector(system):
    board = Board()
    assert run(launch(system, load_image(catalog.load("rom").image, "rom"), board.bus)) == 1
    assert board.text.output == b"Hello from the reset vector.\n"
    assert board.post.codes == [1]


def test_rom_is_read_only_and_shadowed_below_1_mib(system):
    image = catalog.load("rom").image
    with launch(system, load_image(image, "rom"), Board().bus) as guest:
        assert guest.memory.read(MIB - len(image), len(image)) == image
        slot = guest.machine.slots[1]
        assert slot.gpa == (1 << 32) - len(image)
        assert slot.flags.name == "READONLY"


def test_multiboot_kernel_prints_its_command_line(system):
    board = Board()
    image = load_image(catalog.load("multiboot").image)
    extras = BootExtras(cmdline="root=none quiet")
    assert run(launch(system, image, board.bus, extras=extras)) == 1
    assert board.serial.output == b"root=none quiet\n"


def test_multiboot_kernel_has_a_page_for_its_apic_and_no_x2apic(system):
    with launch(system, load_image(catalog.load("multiboot").image), Board().bus) as guest:
        assert [slot.gpa for slot in guest.machine.slots.values()] == [0, 0xFEE00000]


@on_kvm
def test_multiboot_kernel_with_an_interrupt_controller(system):
    board = Board()

    def prepare(machine):
        machine.create_irqchip()

    image = load_image(catalog.load("multiboot").image)
    guest = launch(
        system, image, board.bus, vcpus=2, irqchip=True, prepare=prepare, extras=BootExtras(cmdline="x")
    )
    assert run(guest) == 1
    assert board.serial.output == b"x\n"


# out 0x80, al with AL = DIL (the vCPU's number), then out 0xf4, al; for 16-, 32- and 64-bit code alike:
# mov eax, edi is 89 f8 everywhere.
NUMBERED = b"\x89\xf8\xe6\x80\xe6\xf4\xeb\xfe"


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("mode", [BootMode.PROTECTED16, BootMode.PROTECTED32, BootMode.LONG])
def test_flat_image_in_mode(system, mode, cpl):
    board = Board()
    image = load_image(NUMBERED, address=0x9000, mode=mode)
    assert run(launch(system, image, board.bus, cpl=cpl, memory=MIB + 4096 * 300)) == 1
    assert board.post.codes == [0]


def test_flat_image_in_real_mode_on_two_vcpus(system):
    board = Board()
    code = b"\x89\xf8\xe6\x80\xf4"  # out 0x80 with the number, hlt
    assert run(launch(system, load_image(code), board.bus, vcpus=2)) == 0
    assert sorted(board.post.codes) == [0, 1]


def test_unknown_ports_are_counted_while_tracing(system):
    board = Board(trace=True)
    code = b"\xe5\x42\xe7\x42\x89\xc2\xb0\x00\xe6\xf4\xeb\xfe"  # in ax, 0x42; out 0x42, ax; ...; out 0xf4, al
    assert run(launch(system, load_image(code), board.bus)) == 1
    assert board.bus.unknown_ports == {0x42: 2}


def test_example_in_the_documentation_works(system, capsys):
    text = (Path(__file__).parents[2] / "docs" / "guests.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(example, "docs/guests.md", "exec"), {})
    assert capsys.readouterr().out == "vCPU 0 rang 7\n0\n"


@pytest.mark.parametrize("memory", [0, 4096, MIB + 1, (3 << 30) + 4096])
def test_bad_memory_sizes(system, memory):
    with pytest.raises(UsageError):
        launch(system, load_image(b"\xf4"), DeviceBus(), memory=memory)


def test_image_and_tables_must_fit(system):
    image = load_image(bytes(MIB - 0x9000), address=0x8000, mode=BootMode.LONG)
    with pytest.raises(ImageError, match="too small"):
        launch(system, image, DeviceBus(), memory=MIB)


def test_further_vcpus_of_a_kernel_need_an_interrupt_controller(system):
    with pytest.raises(UsageError, match="interrupt controller"):
        launch(system, load_image(catalog.load("multiboot").image), DeviceBus(), vcpus=2)
