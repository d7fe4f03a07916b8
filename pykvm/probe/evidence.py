"""What a host says about itself that bears on its KVM: parameters, processor flags, symbols, allocations.

Everything is read only, and what cannot be read is simply not known: /proc/kallsyms and /proc/vmallocinfo
are root's on many hosts, module parameters are absent where KVM is built in without them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_OWN_ADD: Final = "__kvm_write_track_add_gfn"
_EXTERNAL_ADD: Final = "kvm_write_track_add_gfn"
"""Since Linux 6.6 the second one is there only where KVM is built for external users; before, one function
served both."""
_TRUE: Final = ("Y", "1")
_FALSE: Final = ("N", "0", "never")


@dataclass(frozen=True)
class Evidence:
    """``parameters`` by module; ``flags`` of the processor, with VMX's own among them ("vmx:ept" and so on);
    ``symbols``: those of write tracking that the kernel has, None if it does not say; ``emulator``: what the
    host's processor or the lab around it says to be, empty for hardware."""

    parameters: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    flags: frozenset[str] = frozenset()
    symbols: frozenset[str] | None = None
    emulator: str = ""

    def parameter(self, *names: str) -> tuple[str, str] | None:
        """The first parameter that the host has of ``module.name``: that, and its text."""
        for name in names:
            module, _, key = name.partition(".")
            value = self.parameters.get(module, {}).get(key)
            if value is not None:
                return name, value
        return None

    def switch(self, *names: str) -> tuple[str, bool] | None:
        """The first of the parameters that is a switch, and whether it is on."""
        found = self.parameter(*names)
        if found is None or found[1] not in _TRUE + _FALSE:
            return None
        return found[0], found[1] in _TRUE

    @property
    def external_write_tracking(self) -> bool | None:
        """Whether KVM is built for external users of write tracking; None if nothing says."""
        if self.symbols is None or _OWN_ADD not in self.symbols:
            return None
        return _EXTERNAL_ADD in self.symbols

    @property
    def vendor(self) -> str:
        """``amd`` or ``intel`` where module or processor say so, ``pvm``, or empty."""
        for module, vendor in (("kvm_pvm", "pvm"), ("kvm_amd", "amd"), ("kvm_intel", "intel")):
            if module in self.parameters:
                return vendor
        if "svm" in self.flags:
            return "amd"
        return "intel" if "vmx" in self.flags else ""


def _parameters(module: Path) -> dict[str, str]:
    found = {}
    for path in sorted(module.glob("parameters/*")):
        try:
            found[path.name] = path.read_text().strip()
        except OSError:
            continue  # some are readable by root only
    return found


def _flags(cpuinfo: str) -> frozenset[str]:
    flags: set[str] = set()
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        prefix = {"flags": "", "vmx flags": "vmx:"}.get(name.strip())
        if prefix is not None:
            flags.update(prefix + flag for flag in value.split())
        elif not line and flags:
            break  # the other processors are the same
    return frozenset(flags)


def _emulator(cpuinfo: str) -> str:
    """QEMU's TCG names itself; a lab says which emulator carries it."""
    return "qemu-tcg" if "QEMU TCG" in cpuinfo else os.environ.get("PYKVM_LAB_EMULATOR", "")


def _symbols(path: Path) -> frozenset[str] | None:
    """Which of the symbols that matter the kernel has; names are there even where addresses are hidden."""
    try:
        with path.open() as lines:
            names = {line.split()[2] for line in lines if "write_track" in line}
    except (OSError, IndexError):
        return None
    return frozenset(names) if names else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def read_evidence(root: Path = Path("/")) -> Evidence:
    """Read below ``root`` (another one for tests); nothing is raised."""
    return Evidence(
        parameters={path.name: _parameters(path) for path in sorted((root / "sys/module").glob("kvm*"))},
        flags=_flags(_text(root / "proc/cpuinfo")),
        symbols=_symbols(root / "proc/kallsyms"),
        emulator=_emulator(_text(root / "proc/cpuinfo")),
    )


def vmalloc_areas(caller: str, path: Path = Path("/proc/vmallocinfo")) -> dict[int, int] | None:
    """The areas of the kernel that functions with ``caller`` in their name allocated: size to how many.

    Sizes include the guard page.  None where root keeps that to itself.
    """
    sizes: dict[int, int] = {}
    try:
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) > 2 and caller in words[2]:
                sizes[int(words[1])] = sizes.get(int(words[1]), 0) + 1
    except (OSError, ValueError):
        return None
    return sizes
