"""Saved state as JSON: a faithful round trip, and nothing odd gets in."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.errors import UsageError
from pykvm.machine.state import (
    ClockState,
    DebugRegisters,
    IrqChips,
    MachineState,
    Msr,
    PitChannel,
    PitState,
    VcpuEvents,
    VcpuState,
    Xcr,
)
from pykvm.x86.cpuid import CpuidEntry
from pykvm.x86.registers import Registers, SpecialRegisters

ALL_ONES = 2**64 - 1

VCPU = VcpuState(
    cpuid=(CpuidEntry(0, 0, 0, 1, 2, 3, 2**32 - 1), CpuidEntry(7, 1, 1, 0, 0, 0, 0)),
    registers=Registers(rax=ALL_ONES, rip=0x1000),
    special=SpecialRegisters(interrupt=0xFF, pdptrs=(1, 2, 3, ALL_ONES)),
    xsave=bytes(range(256)) * 16,
    xcrs=(Xcr(0, 7),),
    msrs=(Msr(0x10, ALL_ONES), Msr(0xC0000080, 0)),
    events=VcpuEvents(exception_error_code=2**32 - 1, exception_payload=ALL_ONES, nmi_masked=1, flags=13),
    mp_state=3,
    debug=DebugRegisters((1, 2, 3, 4)),
    lapic=bytes(1024),
    tsc_khz=2_500_000,
)
MACHINE = MachineState(
    ClockState(ALL_ONES, 14, 5, 6),
    IrqChips(b"\x01" * 512, b"\x02" * 512, b"\x03" * 512),
    PitState(
        tuple(PitChannel(0x10000, 65535, 1, 1, 255, 1, 1, 1, 3, 5, 1, 1, -(2**63)) for _ in range(3)), 3
    ),
)


@pytest.mark.parametrize("state", [VCPU, MACHINE, MachineState()])
def test_round_trip(state: VcpuState | MachineState) -> None:
    text = json.dumps(state.to_json())
    assert type(state).from_json(json.loads(text)) == state


def _set(data: Any, path: tuple[str | int, ...], value: object) -> Any:
    data = copy.deepcopy(data)
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("registers", "rax"), -1, "vcpu.registers.rax"),
        (("registers", "rax"), 2**64, "vcpu.registers.rax"),
        (("registers", "rax"), 1.0, "vcpu.registers.rax"),
        (("registers", "rax"), True, "vcpu.registers.rax"),
        (("registers", "rax"), "1", "vcpu.registers.rax"),
        (("registers", "rax"), None, "vcpu.registers.rax"),
        (("registers", "eax"), 1, "unknown member 'eax'"),
        (("special", "cs", "type"), 16, "vcpu.special.cs.type"),
        (("special", "cs", "dpl"), 4, "vcpu.special.cs.dpl"),
        (("special", "cs", "selector"), 2**16, "vcpu.special.cs.selector"),
        (("special", "gdt", "limit"), 2**16, "vcpu.special.gdt.limit"),
        (("special", "interrupt"), 256, "vcpu.special.interrupt"),
        (("special", "pdptrs"), [1, 2, 3], "vcpu.special.pdptrs"),
        (("cpuid", 1, "eax"), 2**32, r"vcpu.cpuid\[1\].eax"),
        (("cpuid",), [VCPU.to_json()["cpuid"][0]] * 257, "vcpu.cpuid must have 0 to 256 items"),
        (("cpuid",), {}, "vcpu.cpuid must be a list"),
        (("xsave",), "0g", "vcpu.xsave"),
        (("xsave",), "0", "vcpu.xsave"),
        (("xsave",), "00 00", "vcpu.xsave"),
        (("xsave",), "AB", "vcpu.xsave"),
        (("xsave",), "00" * 65537, "vcpu.xsave"),
        (("lapic",), "00" * 1023, "vcpu.lapic"),
        (("msrs",), [{"index": 1, "value": 0}] * 2, "vcpu.msrs has an index twice"),
        (("xcrs",), [{"index": 0, "value": 0}] * 2, "vcpu.xcrs has an index twice"),
        (("mp_state",), 11, "vcpu.mp_state"),
        (("events", "nmi_pending"), 256, "vcpu.events.nmi_pending"),
        (("debug", "db"), [0] * 5, "vcpu.debug.db"),
        (("tsc_khz",), 2**32, "vcpu.tsc_khz"),
    ],
)
def test_what_is_odd_is_refused_by_name(path: tuple[str | int, ...], value: object, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        VcpuState.from_json(_set(VCPU.to_json(), path, value))


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("clock", "clock"), -1, "machine.clock.clock"),
        (("irqchips", "ioapic"), "00" * 511, "machine.irqchips.ioapic"),
        (("pit", "channels"), [], "machine.pit.channels"),
        (("pit", "channels", 0, "count"), 0x10001, r"machine.pit.channels\[0\].count"),
        (("pit", "channels", 0, "count_load_time"), 2**63, r"machine.pit.channels\[0\].count_load_time"),
    ],
)
def test_so_it_is_for_the_machine(path: tuple[str | int, ...], value: object, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        MachineState.from_json(_set(MACHINE.to_json(), path, value))


@pytest.mark.parametrize("data", [None, 1, "x", [], {}, {"registers": {}}])
def test_what_is_no_state_at_all(data: object) -> None:
    with pytest.raises(UsageError):
        VcpuState.from_json(data)


def test_every_member_is_required() -> None:
    for name in VCPU.to_json():
        data = VCPU.to_json()
        del data[name]
        with pytest.raises(UsageError, match=f"vcpu.{name} is missing"):
            VcpuState.from_json(data)


def _paths(data: Any, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [prefix, *(path for key, value in items for path in _paths(value, (*prefix, key)))]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
PATHS = [path for path in _paths(VCPU.to_json()) if path]


@given(seed=st.integers(0, len(PATHS) - 1), value=JSON)
def test_any_json_anywhere_is_refused_or_kept(seed: int, value: object) -> None:
    """No exception but UsageError, and what is accepted reads back as the same JSON."""
    data = _set(VCPU.to_json(), PATHS[seed], value)
    try:
        state = VcpuState.from_json(data)
    except UsageError:
        return
    assert state.to_json() == data


def test_order_of_members_does_not_matter() -> None:
    items = list(VCPU.to_json().items())
    random.Random(1).shuffle(items)
    assert VcpuState.from_json(dict(items)) == VCPU
