"""What KVM offers per kernel and kind, from ``pykvm info --json`` in the labs, and what changed between
kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from pykvm.lab.matrix import Saved

CAPABILITIES = (
    "DIRTY_LOG_RING",
    "DIRTY_LOG_RING_ACQ_REL",
    "DIRTY_LOG_RING_WITH_BITMAP",
    "MANUAL_DIRTY_LOG_PROTECT2",
    "READONLY_MEM",
    "BINARY_STATS_FD",
    "IMMEDIATE_EXIT",
    "SYNC_REGS",
    "SREGS2",
    "XSAVE2",
    "USER_MEMORY2",
    "MEMORY_FAULT_INFO",
    "MEMORY_ATTRIBUTES",
    "GUEST_MEMFD",
    "PRE_FAULT_MEMORY",
    "VM_DISABLE_NX_HUGE_PAGES",
    "EXIT_ON_EMULATION_FAILURE",
)
"""Of /dev/kvm's capabilities those that dirty logging, saved state and memory slots hang on."""

PARAMETERS = (
    ("kvm", "tdp_mmu"),
    ("kvm", "eager_page_split"),
    ("kvm", "nx_huge_pages"),
    ("kvm", "mmio_caching"),
    ("kvm_amd", "npt"),
    ("kvm_amd", "nested"),
    ("kvm_amd", "avic"),
    ("kvm_intel", "ept"),
    ("kvm_intel", "eptad"),
    ("kvm_intel", "pml"),
    ("kvm_intel", "unrestricted_guest"),
    ("kvm_intel", "nested"),
)
"""Of the module parameters those that decide how writes are tracked."""


def plain(info: Mapping[str, Any]) -> dict[str, str]:
    """The facts that matter, by name.  What a lab did not say is left out."""
    found: dict[str, str] = {}
    mmu = info.get("mmu")
    if isinstance(mmu, dict):
        newer = {True: ", TDP MMU", False: ", older MMU"}.get(mmu.get("tdp_mmu"), "")  # type: ignore[arg-type]
        found["paging of the MMU"] = f"{mmu.get('kind')}{newer if mmu.get('kind') != 'shadow' else ''}"
    for mode in info.get("modes") or ():
        if isinstance(mode, dict):
            found[f"guests: {mode.get('mode')}, CPL {mode.get('cpl')}"] = str(mode.get("execution"))
    capabilities = info.get("capabilities")
    if isinstance(capabilities, dict):
        for name in CAPABILITIES:
            found[f"KVM_CAP_{name}"] = str(capabilities.get(name) or "no")
    parameters = info.get("module_parameters")
    if isinstance(parameters, dict):
        for module, name in PARAMETERS:
            if isinstance(parameters.get(module), dict):
                found[f"{module}.{name}"] = str(parameters[module].get(name, "no such parameter"))
    limits = info.get("limits")
    if isinstance(limits, dict):
        for name in ("memslots", "physical_address_bits"):
            if name in limits:
                found[name.replace("_", " ")] = str(limits[name])
    return found


def facts(cells: Iterable[Saved], series: Sequence[str]) -> dict[str, Any]:
    """``same``: facts with one value wherever they are known; ``differ``: values by series, with the kinds
    where those differ.
    """
    known: dict[str, dict[tuple[str, str], str]] = {}
    for cell in cells:
        if cell.result is not None and cell.result.facts:
            for name, value in plain(cell.result.facts).items():
                known.setdefault(name, {})[cell.series, cell.kind] = value
    same = []
    differ = []
    for name, values in known.items():
        if len(set(values.values())) == 1:
            same.append({"name": name, "value": next(iter(values.values()))})
        else:
            row = {each: _values(each, values) for each in series if any(key[0] == each for key in values)}
            differ.append({"name": name, "values": row})
    return {"series": list(series), "same": same, "differ": differ}


def _values(series: str, values: Mapping[tuple[str, str], str]) -> str:
    """``Y``, or ``Y (amd-npt), N (amd-shadow)`` where kinds differ."""
    by_value: dict[str, list[str]] = {}
    for (each, kind), value in values.items():
        if each == series:
            by_value.setdefault(value, []).append(kind)
    if len(by_value) == 1:
        return next(iter(by_value))
    return "; ".join(f"{value} ({', '.join(kinds)})" for value, kinds in by_value.items())


def changes(cells: Iterable[Saved], series: Sequence[str]) -> list[dict[str, Any]]:
    """Capabilities and parameters that came, went or changed from a kernel to the next one that was run.

    Each: ``from``, ``to``, the ``kinds`` where it is so, ``what`` happened, the ``names``.
    """
    known: dict[str, dict[str, Mapping[str, Any]]] = {}
    for cell in cells:
        if cell.result is not None and cell.result.facts and "capabilities" in cell.result.facts:
            known.setdefault(cell.kind, {})[cell.series] = cell.result.facts
    order = list(series)
    found: dict[tuple[int, int, str], dict[str, list[str]]] = {}
    for kind, by_series in known.items():
        for old, new in pairwise(name for name in series if name in by_series):
            for what, names in differences(by_series[old], by_series[new]):
                step = found.setdefault((order.index(old), order.index(new), what), {})
                for name in names:
                    step.setdefault(name, []).append(kind)
    result = []
    for (old_at, new_at, what), by_name in sorted(found.items()):
        by_kinds: dict[tuple[str, ...], list[str]] = {}
        for name, kinds in by_name.items():
            by_kinds.setdefault(tuple(kinds), []).append(name)
        # What holds for most kinds comes first.
        for each, names_of in sorted(by_kinds.items(), key=lambda item: -len(item[0])):
            step_of = {"from": order[old_at], "to": order[new_at]}
            result.append(step_of | {"kinds": list(each), "what": what, "names": names_of})
    return result


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    """What came, went and changed between two hosts."""
    found = _compared(old.get("capabilities"), new.get("capabilities"), "capabilities", "KVM_CAP_")
    before, after = old.get("module_parameters"), new.get("module_parameters")
    if isinstance(before, dict) and isinstance(after, dict):
        for module in sorted(before.keys() & after.keys()):
            found += _compared(before[module], after[module], "parameters", f"{module}.")
    return found


def _compared(old: object, new: object, what: str, prefix: str) -> list[tuple[str, tuple[str, ...]]]:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return []
    both = sorted(old.keys() & new.keys())
    parts = (
        (f"new {what}", tuple(f"{prefix}{name}" for name in sorted(new.keys() - old.keys()))),
        (f"{what} that are gone", tuple(f"{prefix}{name}" for name in sorted(old.keys() - new.keys()))),
        (
            f"other values of {what}",
            tuple(f"{prefix}{name} {old[name]} → {new[name]}" for name in both if old[name] != new[name]),
        ),
    )
    return [(text, names) for text, names in parts if names]
