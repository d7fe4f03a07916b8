"""``pykvm info``: what this host can do, what it lacks, and how to get that."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from pykvm import __version__
from pykvm.backends import open_system
from pykvm.cli.host import Host, read_host
from pykvm.cli.modes import ModeResult, measure_modes
from pykvm.cli.profile_report import profile_document, profile_summary, profile_table
from pykvm.cli.session import Session, common_options
from pykvm.guest.boot import BootMode
from pykvm.kvm import KvmSystem
from pykvm.kvm.capabilities import Capability
from pykvm.probe import Detection, detect, read_evidence
from pykvm.report.text import bytes_text, count_text, seconds_text
from pykvm.x86.cpuid import physical_address_bits

_RING_ENTRY_BYTES = 16

# What pykvm uses itself, most important first: what for, and the first kernel that has it.
IMPORTANT = {
    Capability.DIRTY_LOG_RING: ("tracker 'ring'", "5.11"),
    Capability.DIRTY_LOG_RING_ACQ_REL: ("rings on weakly ordered processors", "6.1"),
    Capability.MANUAL_DIRTY_LOG_PROTECT2: ("tracker 'manual'", "5.2"),
    Capability.BINARY_STATS_FD: ("statistics of VMs and vCPUs", "5.14"),
    Capability.IMMEDIATE_EXIT: ("kicking a vCPU without a race", "4.11"),
    Capability.XSAVE2: ("state of processors with AMX", "5.17"),
    Capability.SREGS2: ("PDPTRs in the saved state", "5.14"),
    Capability.READONLY_MEM: ("read-only slots", "3.7"),
    Capability.USER_MEMORY2: ("slots over guest_memfd", "6.8"),
    Capability.MEMORY_FAULT_INFO: ("exits that name a faulting access", "6.8"),
    Capability.SYNC_REGS: ("registers without ioctls", "4.17"),
}


_MODE_REMEDIES = {
    BootMode.LA57: "a processor with 57-bit linear addresses (CPUID 7.0 ECX bit 16).",
    BootMode.PAE: "a host with Intel VT-x or AMD-V.",
    BootMode.PAGED32: "a host with Intel VT-x or AMD-V.",
}


def mmu_facts(host: Host, modes: list[ModeResult]) -> dict[str, Any]:
    """The MMU's kind, by the modules' parameters, or else by whether KVM built shadow pages."""
    long_mode = next((item for item in modes if item.mode is BootMode.LONG and item.cpl == 3), None)
    shadow_pages = long_mode.shadow_pages if long_mode else 0
    declared = host.two_dimensional_paging
    if declared in ("EPT", "NPT"):
        kind, evidence = declared.lower(), f"parameter of {host.vendor_module}"
    elif declared == "off":
        kind, evidence = "shadow", f"two-dimensional paging is off in {host.vendor_module}"
    elif shadow_pages:
        kind, evidence = "shadow", f"KVM built {shadow_pages} shadow pages for a small guest"
    else:
        kind, evidence = "unknown", "no parameter says it and no shadow page was built"
    return {"kind": kind, "tdp_mmu": host.tdp_mmu, "evidence": evidence}


_MODEL_MMU: dict[str, Any] = {
    "kind": "none",
    "tdp_mmu": None,
    "evidence": "the model walks the guest's own tables and keeps no others",
}


def missing_facts(capabilities: dict[str, int], modes: list[ModeResult]) -> list[dict[str, str]]:
    """What this host lacks of the things that pykvm can use, each with a remedy."""
    missing = [
        {"what": f"KVM_CAP_{item.name} ({purpose})", "remedy": f"Linux {since} or newer."}
        for item, (purpose, since) in IMPORTANT.items()
        if not capabilities.get(item.name)
    ]
    unavailable = {item.mode: item.reason for item in modes if item.execution == "unavailable"}
    missing += [
        {
            "what": f"guests in mode '{mode.value}' ({reason})",
            "remedy": _MODE_REMEDIES.get(mode, "a host whose KVM runs this mode."),
        }
        for mode, reason in unavailable.items()
    ]
    missing += [
        {
            "what": f"native execution in long mode at CPL {item.cpl}",
            "remedy": "a host with Intel VT-x or AMD-V; here prefer the other privilege level.",
        }
        for item in modes
        if item.mode is BootMode.LONG and item.execution == "emulated"
    ]
    return missing


def _limits(system: KvmSystem, capabilities: dict[str, int]) -> dict[str, int]:
    with system.create_machine() as machine:
        cpuid = machine.supported_cpuid
    return {
        "vcpus": capabilities.get("MAX_VCPUS", 0) or capabilities.get("NR_VCPUS", 0),
        "vcpus_recommended": capabilities.get("NR_VCPUS", 0),
        "memslots": capabilities.get("NR_MEMSLOTS", 0),
        "ring_entries": capabilities.get("DIRTY_LOG_RING", 0) // _RING_ENTRY_BYTES,
        "physical_address_bits": physical_address_bits(cpuid),
        "vcpu_mapping_bytes": system.vcpu_mmap_size,
    }


def _facts_table(rows: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=10)
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _modes_table(modes: list[ModeResult]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("guest mode", "CPL", "runs"):
        table.add_column(name)
    for name in ("instruction", "exit"):
        table.add_column(name, justify="right")
    styles = {"native": "green", "emulated": "yellow", "unavailable": "dim"}
    for item in modes:
        costs = ("", "")
        if item.execution != "unavailable":
            nanoseconds = f"{item.instruction_seconds * 1e9:.1f} ns"
            costs = (nanoseconds, seconds_text(item.exit_seconds))
        style = styles[item.execution]
        table.add_row(item.mode.value, str(item.cpl), f"[{style}]{item.execution}[/]", *costs)
    return table


def _capabilities_table(capabilities: dict[str, int]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("capability")
    table.add_column("value", justify="right")
    table.add_column("what pykvm uses it for")
    for item, (purpose, _) in IMPORTANT.items():
        value = capabilities.get(item.name, 0)
        table.add_row(item.name, count_text(value) if value else "[red]missing[/]", purpose)
    return table


@click.command("info", short_help="What this host's KVM can do and what it lacks.")
@click.option(
    "--all", "show_all", is_flag=True, help="List every capability with a value, not only those in use."
)
@common_options
def command(session: Session, show_all: bool) -> None:
    """Show what this host's KVM can do, what it lacks, and how to get that.

    Guest modes, and what KVM does about memory, are measured with small real guests: about a second.
    Nothing on the host is changed.
    """
    host = read_host()
    session.document |= {"version": __version__} | host.to_json()
    flag = host.virtualization_flag or "neither vmx nor svm"
    session.out.print(
        _facts_table(
            {
                "kernel": f"Linux {host.kernel}",
                "processor": f"{host.processor} ({flag})",
                "memory": bytes_text(host.memory_bytes),
                "modules": ", ".join(host.modules) or "none (kvm may be built in)",
            }
        )
    )
    with open_system(session.backend) as system:
        capabilities: dict[str, int] = {}
        if isinstance(system, KvmSystem):
            answers = {item.name: system.check_extension(item) for item in Capability}
            capabilities = {name: value for name, value in answers.items() if value}
            session.document |= {"api_version": system.api_version, "limits": _limits(system, capabilities)}
        modes = measure_modes(system)
        detection: Detection | None = None
        if isinstance(system, KvmSystem):
            detection = detect(system, read_evidence(), system.check_extension)
        on_kvm = isinstance(system, KvmSystem)
        mmu = mmu_facts(host, modes) if on_kvm else _MODEL_MMU
        missing = missing_facts(capabilities, modes) if on_kvm else []
        description = system.description
        session.document |= {
            "backend": system.backend,
            "mmu": mmu,
            "modes": [item.to_json() for item in modes],
            "profile": profile_document(detection) if detection else None,
            "capabilities": capabilities,
            "missing": missing,
        }
    rows = {"backend": description, "MMU": f"{mmu['kind']} ({mmu['evidence']})"}
    if limits := session.document.get("limits"):
        rows["limits"] = (
            f"{count_text(limits['vcpus'])} vCPUs, {count_text(limits['memslots'])} memslots, "
            f"{count_text(limits['ring_entries'])} entries a dirty ring, "
            f"{limits['physical_address_bits']} physical address bits"
        )
    session.out.print(_facts_table(rows))
    session.out.print()
    session.out.print(_modes_table(modes))
    if detection:
        session.out.print()
        session.out.print(f"[bold]profile[/] {profile_summary(detection)}", soft_wrap=True)
        session.out.print()
        session.out.print(profile_table(detection))
    if on_kvm:
        _print_capabilities(session, capabilities, show_all=show_all)
    if missing:
        session.out.print()
        session.out.print("[bold]missing here[/]")
        for item in missing:
            session.out.print(f"  {item['what']}: {item['remedy']}", markup=False, soft_wrap=True)


def _print_capabilities(session: Session, capabilities: dict[str, int], *, show_all: bool) -> None:
    session.out.print()
    session.out.print(_capabilities_table(capabilities))
    rest = [name for name in capabilities if name not in {item.name for item in IMPORTANT}]
    if show_all:
        session.out.print()
        session.out.print(_facts_table({name: count_text(capabilities[name]) for name in rest}))
    else:
        session.out.print(f"[dim]and {len(rest)} more; --all lists them[/]")
