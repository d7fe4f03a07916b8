"""Bochs as a lab's emulator: it emulates VMX with EPT, accessed and dirty bits, and PML, on any machine.

The processor is an Ice Lake, the first one with 5-level paging, which Bochs' model of it needs to be told.
Newer models (Sapphire Rapids) promise AMX and then fault when Linux enables it.  The guest's seconds are
counted in instructions, so that its timers and its speed go together whatever the host does; idle time costs
next to nothing.  The wire is the second serial port, backed by a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pykvm.errors import HostError, UsageError
from pykvm.lab import bochs_build, bochs_images
from pykvm.lab.bochs_images import Image
from pykvm.lab.cache import Cache
from pykvm.lab.emulator import Boot, Launch

PROCESSOR = "corei7_icelake_u"
FEATURES = ("la57",)
HERTZ = 300_000_000
"""Instructions per second of guest time: about twice what a host does, and low enough for kvm_intel to use
the VMX preemption timer, which it gives up above 429 MHz of time stamp counter."""

LARGEST_MEMORY = 2048  # MiB; Bochs' own limit

_APPEND = (
    f"tsc_early_khz={HERTZ // 1000}",  # CPUID names the frequency of the real processor
    "edd=off",  # there is no disk to ask the BIOS about
    "no5lvl",  # for the host; its guests have 5-level paging nevertheless
)


@dataclass(frozen=True)
class Bochs:
    """A Bochs that ``bochs_build`` made."""

    built: bochs_build.Built

    @property
    def name(self) -> str:
        return f"Bochs {self.built.version}"

    @property
    def slug(self) -> str:
        return "bochs"

    @property
    def wire_device(self) -> str:
        return "/dev/ttyS1"

    @property
    def modules(self) -> tuple[str, ...]:
        return ()

    @property
    def parameters(self) -> Mapping[str, str]:
        """Bochs' virtual-interrupt delivery loses interrupts of KVM's LAPIC and fails some entries."""
        return {"kvm_intel": "enable_apicv=0"}

    @property
    def default_memory(self) -> int:
        return LARGEST_MEMORY

    @property
    def boot_timeout(self) -> float:
        return 300.0

    def launch(self, boot: Boot) -> Launch:
        """Write RAM, ROMs and configuration below ``boot.folder``.

        Raises UsageError for more memory than Bochs has or less than the layers need.
        """
        if boot.memory > LARGEST_MEMORY:
            raise UsageError(f"Bochs gives a guest at most {LARGEST_MEMORY} MiB of memory; lower --memory.")
        command_line = " ".join((*boot.append, *_APPEND))
        images, rom = bochs_images.write(
            boot.folder, boot.kernel.image, boot.layers, command_line, boot.memory
        )
        console, wire, file = (boot.folder / name for name in ("console.log", "wire", "bochsrc"))
        console.touch()
        wire.touch()
        file.write_text(configuration(self.built.bios, boot.memory, images, rom, console, wire))
        return Launch((str(self.built.program), "-q", "-f", str(file)), console, wire)


def configuration(
    bios: Path, memory: int, images: Sequence[Image], rom: Image, console: Path, wire: Path
) -> str:
    """The text of a bochsrc.  A panic of Bochs ends it and is told on standard error."""
    lines = [
        "config_interface: textconfig",
        "display_library: nogui",
        f"memory: guest={memory}, host={memory}",
        f"cpu: model={PROCESSOR}, add_features={_quoted(' '.join(FEATURES))}, count=1, ips={HERTZ}, "
        "reset_on_triple_fault=0, ignore_bad_msrs=1",
        f"romimage: file={_quoted(bios)}",
        f"vgaromimage: file={_quoted(rom.path.with_name('video.rom'))}",
        f"optromimage1: file={_quoted(rom.path)}, address={rom.address:#x}",
        *(
            f"optramimage{number}: file={_quoted(image.path)}, address={image.address:#x}"
            for number, image in enumerate(images, 1)
        ),
        "pci: enabled=1, chipset=i440fx",
        "ata0: enabled=0",
        "ata1: enabled=0",
        "clock: sync=none, time0=utc",
        "com1: enabled=1, mode=file, dev=" + _quoted(console),
        "com2: enabled=1, mode=file, dev=" + _quoted(wire),
        "parport1: enabled=0",
        "speaker: enabled=0",
        "mouse: enabled=0",
        "log: -",
        "panic: action=fatal",
        "error: action=ignore",
        "info: action=ignore",
        "debug: action=ignore",
    ]
    return "\n".join(lines) + "\n"


def _quoted(value: Path | str) -> str:
    """A value within quotes; Bochs has no way to write a quote or a dollar sign there."""
    text = str(value)
    if any(character in text for character in '"$\n'):
        raise HostError(f"Bochs cannot use the path {text}; name a plain one with PYKVM_LAB_CACHE.")
    return f'"{text}"'


def bochs(cache: Cache, note: Callable[[str], None]) -> Bochs:
    """Bochs, built first if it was not; HostError names what the build lacks."""
    return Bochs(bochs_build.prepare(cache, note))
