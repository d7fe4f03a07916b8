"""``pykvm overhead``: what KVM's metadata about a guest's memory costs the host."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from pykvm.backends import open_system
from pykvm.cli.host_profile import named_profile
from pykvm.cli.parameters import number_type, size_type
from pykvm.cli.session import Session, common_options
from pykvm.kvm import KvmSystem
from pykvm.memory import PAGE_SIZE
from pykvm.model.mmu.overhead import ARRAYS, Overhead, overhead
from pykvm.probe import detect, read_evidence
from pykvm.profiles import DEVELOPMENT_HOST, Profile, WriteTrackAllocation, profile
from pykvm.report.text import bytes_text, count_text


def _host(session: Session) -> Profile:
    """The profile of this host where a real KVM works, or else the development host's."""
    with open_system(session.backend) as system:
        session.tell_choice(system)
        if not isinstance(system, KvmSystem):
            return profile(*DEVELOPMENT_HOST)
        return detect(system, read_evidence(), system.check_extension).profile


def _table(result: Overhead) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("from then on")
    for name in (*ARRAYS, "together"):
        table.add_column(name, justify="right")
    table.add_column("a page", justify="right")
    for moment in result.moments:
        cells = [bytes_text(moment.arrays[name]) if moment.arrays[name] else "-" for name in ARRAYS]
        a_page = moment.total * PAGE_SIZE / result.memory
        table.add_row(moment.name, *cells, bytes_text(moment.total), f"{a_page:.3f} B")
    return table


def _json(result: Overhead) -> dict[str, Any]:
    return {
        "policy": result.policy.value,
        "moments": [
            {
                "moment": moment.name,
                "bytes": moment.arrays,
                "total_bytes": moment.total,
                "bytes_per_page": moment.total * PAGE_SIZE / result.memory,
            }
            for moment in result.moments
        ],
    }


@click.command("overhead", short_help="What KVM's metadata about a guest's memory costs.")
@click.option(
    "--memory",
    type=size_type(minimum=PAGE_SIZE, multiple=PAGE_SIZE),
    default="512G",
    show_default=True,
    help="Guest memory, in as few slots as possible; 512G is a 39-bit address space.",
)
@click.option(
    "--profile",
    "host",
    type=named_profile(),
    help="The host, such as amd-npt or intel-ept@7.2; by default this one (pvm-shadow@6.18 for the model).",
)
@click.option(
    "--policy",
    type=click.Choice([policy.value for policy in WriteTrackAllocation]),
    help="When write-track counts are allocated; by default each of the three ways is shown.",
)
@click.option("--vcpus", type=click.IntRange(1, 4096), default=1, show_default=True, help="vCPUs of the VM.")
@click.option(
    "--ring",
    type=number_type(0, 65536),
    default="0",
    show_default=True,
    help="Entries of each vCPU's dirty ring, a power of two; 0 means bitmaps.",
)
@common_options
def command(
    session: Session, memory: int, host: Profile | None, policy: str | None, vcpus: int, ring: int
) -> None:
    """Show what KVM allocates for a guest's memory beside page tables, slot by slot and array by array.

    Reverse maps, large-page counts, write-track counts, dirty bitmaps and rings: when they are allocated
    depends on the host, and for the write-track counts on the policy. The figures come from the reference
    model, whose slots go through the same moments; nothing is allocated in the kernel.
    """
    chosen = host or _host(session)
    policies = [WriteTrackAllocation(policy)] if policy else list(WriteTrackAllocation)
    results = [overhead(chosen, each, memory, vcpus=vcpus, ring=ring) for each in policies]
    session.document |= {
        "kind": chosen.name,
        "era": chosen.era,
        "memory_bytes": memory,
        "pages": memory // PAGE_SIZE,
        "slots": results[0].slots,
        "vcpus": vcpus,
        "ring_entries": ring,
        "policies": [_json(result) for result in results],
    }
    slots = results[0].slots
    session.out.print(
        f"{bytes_text(memory)}, that is {count_text(memory // PAGE_SIZE)} pages in {slots} "
        f"slot{'s' if slots > 1 else ''}, on {chosen.name} {chosen.era}"
    )
    for result in results:
        session.out.print()
        session.out.print(f"[bold]write-track counts: {result.policy.value}[/]")
        session.out.print(_table(result))
