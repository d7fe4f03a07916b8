"""What the host says about itself without a VM: kernel, modules and their parameters, processor, limits.

Everything is read only.  Parameters of a module tell how KVM was set up; what it really does is measured
by ``modes``.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MMU_PARAMETERS = {"kvm_intel": ("ept", "EPT"), "kvm_amd": ("npt", "NPT")}


@dataclass(frozen=True, slots=True)
class Host:
    """Facts about the host; ``modules`` maps each KVM module to its parameters."""

    kernel: str
    processor: str
    virtualization_flag: str
    modules: dict[str, dict[str, str]]
    memory_bytes: int
    open_files: int

    @property
    def vendor_module(self) -> str:
        """The module beside ``kvm`` that drives the processor; empty if it is built in or not loaded."""
        return next((name for name in self.modules if name != "kvm"), "")

    @property
    def two_dimensional_paging(self) -> str:
        """``EPT`` or ``NPT`` where a parameter says that it is on, ``off`` where one says so, else empty."""
        for module, (parameter, name) in _MMU_PARAMETERS.items():
            value = self.modules.get(module, {}).get(parameter)
            if value is not None:
                return name if value in ("Y", "1") else "off"
        return ""

    @property
    def tdp_mmu(self) -> bool | None:
        """kvm.tdp_mmu: whether two-dimensional paging uses the newer MMU; None where nothing says."""
        value = self.modules.get("kvm", {}).get("tdp_mmu")
        return None if value is None else value in ("Y", "1")

    def to_json(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel,
            "processor": self.processor,
            "virtualization_flag": self.virtualization_flag,
            "vendor_module": self.vendor_module,
            "module_parameters": self.modules,
            "memory_bytes": self.memory_bytes,
            "open_files": self.open_files,
        }


def _parameters(module: Path) -> dict[str, str]:
    found = {}
    for path in sorted(module.glob("parameters/*")):
        try:
            found[path.name] = path.read_text().strip()
        except OSError:
            continue  # some are readable by root only
    return found


def _cpuinfo(text: str, key: str) -> str:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def read_host(root: Path = Path("/")) -> Host:
    """Read the facts below ``root`` (another one for tests)."""
    cpuinfo = (root / "proc/cpuinfo").read_text()
    flags = _cpuinfo(cpuinfo, "flags").split()
    modules = {path.name: _parameters(path) for path in sorted((root / "sys/module").glob("kvm*"))}
    return Host(
        kernel=os.uname().release,
        processor=_cpuinfo(cpuinfo, "model name"),
        virtualization_flag=next((flag for flag in ("vmx", "svm") if flag in flags), ""),
        modules=modules,
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )
