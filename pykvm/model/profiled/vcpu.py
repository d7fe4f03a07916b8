"""A vCPU of a machine with a host profile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final, cast

from pykvm.machine.exits import Exit, IoIn, IoOut, MmioRead
from pykvm.machine.statistics import Statistics
from pykvm.model.profiled.processor import HostProcessor
from pykvm.model.profiled.rings import RingReader
from pykvm.model.statistics import vcpu_statistics
from pykvm.model.vcpu import ModelVcpu
from pykvm.model.vcpu_bus import VcpuBus
from pykvm.model.vcpu_registers import check_width

if TYPE_CHECKING:
    from pykvm.machine.protocols import RingEntries
    from pykvm.model.cpu.processor import Processor
    from pykvm.model.profiled.machine import ProfiledMachine


_OWN: Final = frozenset(
    {"KVM_RUN", "KVM_GET_REGS", "KVM_SET_REGS", "KVM_GET_SREGS", "KVM_GET_SREGS2", "KVM_GET_VCPU_EVENTS"}
)
"""Operations that touch nothing but the processor, or see to the MMU themselves."""


class ProfiledVcpu(ModelVcpu):
    """A vCPU whose accesses go through KVM's MMU; ``mmu`` is its part of it."""

    vm: ProfiledMachine

    def __init__(self, machine: ProfiledMachine, vcpu_id: int) -> None:
        self.mmu = machine.mmu.create_vcpu()
        self.ring_reader = RingReader(self.mmu.ring, vcpu_id) if self.mmu.ring is not None else None
        super().__init__(machine, vcpu_id, None)

    def _make_processor(self) -> Processor:
        bus = VcpuBus(self.vm, None)
        return HostProcessor(bus, (), self.mmu)

    @property
    def host_cpu(self) -> HostProcessor:
        """The processor, as what it is."""
        return cast("HostProcessor", self.cpu)

    # --- loading the vCPU ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _loaded(self) -> Iterator[None]:
        """``vcpu_load`` to ``vcpu_put``: marks that this thread makes go to this vCPU."""
        mmu = self.vm.mmu
        before, mmu.loaded = mmu.loaded, self.mmu
        try:
            yield
        finally:
            mmu.loaded = before

    @contextlib.contextmanager
    def use(self, operation: str) -> Iterator[Processor]:
        with super().use(operation) as cpu:
            if operation in _OWN:
                yield cpu
                return
            with self._schedule.visit(), self._loaded():
                yield cpu

    # --- running -------------------------------------------------------------------------------------

    def _run(self) -> Exit:
        self.host_cpu.left = True
        return super()._run()

    def _slice(self, limit: int) -> Exit | None:
        with self._loaded():
            if self.host_cpu.runs_natively:
                self.host_cpu.left = True  # others may have asked for a flush meanwhile
            return super()._slice(limit)

    def _seen(self, exit: Exit | None) -> Exit | None:
        if isinstance(exit, IoIn | MmioRead):
            self._question = exit
        return exit

    def forget_memory(self) -> None:
        """The MMU knows what changed."""

    def abandon_io(self) -> None:
        super().abandon_io()
        self.host_cpu.emulated = None

    def _count(self, exit: Exit) -> None:
        super()._count(exit)
        if isinstance(exit, IoIn | IoOut) and self.host_cpu.emulates_ports:
            self._counts["io_exits"] -= 1

    # --- looking in ----------------------------------------------------------------------------------

    def translate(self, linear: int) -> int | None:
        check_width("linear_address", linear, 64)
        with self.use("KVM_TRANSLATE"):
            return self.mmu.translate_for_host(linear)

    def peek_ring(self, since: int) -> tuple[RingEntries | None, int]:
        """As KvmVcpu.peek_ring: ring entries from the ``since``-th on that nobody harvested yet."""
        if self.ring_reader is None:
            return None, since
        with self._schedule.visit():
            return self.ring_reader.peek(since)

    def counters(self) -> Mapping[str, int]:
        """The single-valued statistics by name."""
        return {
            "io_exits": 0,
            **self._counts,
            **self.mmu.counters.as_dict(),
            "mmio_exits": self.host_cpu.mmio_exits,
        }

    def statistics(self) -> Statistics:
        return vcpu_statistics(self.id, self.counters())
