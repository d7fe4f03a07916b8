"""An emulator that boots nothing: a Python program that plays a guest by writing frames to the wire."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pykvm.lab.emulator import Boot, Launch
from pykvm.lab.kernels import PreparedKernel

PRELUDE = """
import json, os, sys, time
from pykvm.lab.channel import Frame, encode
console, wire = open(sys.argv[1], "ab", 0), open(sys.argv[2], "ab", 0)
def send(kind, payload=b""): wire.write(encode(kind, payload))
def ready(**parameters):
    parameters = {"kvm": {"tdp_mmu": "Y"}, "kvm_amd": {"npt": "1"}, **parameters}
    send(Frame.READY, json.dumps({"kvm": True, "parameters": parameters}).encode())
"""


@dataclass
class FakeEmulator:
    """``script`` is what the guest does; ``boots`` collects what it was asked to boot."""

    script: str
    boot_timeout: float = 20.0
    boots: list[Boot] = field(default_factory=list)

    name = "Fake 1.0"
    slug = "fake"
    wire_device = "/dev/wire"
    modules = ("wire",)
    parameters: ClassVar[dict[str, str]] = {"kvm": "halt_poll_ns=0", "kvm_amd": "avic=0"}
    default_memory = 1234

    def launch(self, boot: Boot) -> Launch:
        self.boots.append(boot)
        console, wire = boot.folder / "console.log", boot.folder / "wire"
        console.touch()
        wire.touch()
        argv = (sys.executable, "-c", PRELUDE + self.script, str(console), str(wire))
        return Launch(argv, console, wire)


def kernel(folder: Path, *, enforce: bool = False) -> PreparedKernel:
    """A kernel without contents."""
    (folder / "modules").mkdir(parents=True, exist_ok=True)
    return PreparedKernel("9.9", "9.9.1-cloud", folder / "vmlinuz", folder / "modules", enforce)
