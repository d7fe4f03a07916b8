"""In-kernel interrupt controllers and ways to raise interrupts (api.rst 4.24 to 4.27, 4.52, 4.71, 4.75)."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass

from pykvm.abi import ffi, lib
from pykvm.abi.managed import Refusals
from pykvm.errors import KvmError, UsageError
from pykvm.kvm.capabilities import Capability, Extensions
from pykvm.kvm.fields import fill
from pykvm.machine.state import IRQCHIP_BYTES, IrqChips

_CHIPS = (lib.KVM_IRQCHIP_PIC_MASTER, lib.KVM_IRQCHIP_PIC_SLAVE, lib.KVM_IRQCHIP_IOAPIC)
_NO_CHIP = "this VM has no interrupt controller in the kernel; call create_irqchip before the first vCPU."
_REFUSALS: Refusals = {errno.ENXIO: (KvmError, _NO_CHIP), errno.EINVAL: (KvmError, _NO_CHIP)}


@dataclass(frozen=True, slots=True)
class ChipRoute:
    """A GSI wired to pin ``pin`` of a controller: 0 master PIC, 1 slave PIC, 2 IOAPIC."""

    gsi: int
    chip: int
    pin: int


@dataclass(frozen=True, slots=True)
class MsiRoute:
    """A GSI that sends a message: address and data as a PCI device would write them (SDM vol. 3, 11.11)."""

    gsi: int
    address: int
    data: int


class VmInterrupts(Extensions):
    """Interrupts of a VM."""

    has_irqchip = False
    """Whether ``create_irqchip`` was called."""

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP (api.rst 4.24, KVM_CAP_IRQCHIP): PIC, IOAPIC, and LAPICs for later vCPUs.

        HLT then waits in the kernel and KVM_INTERRUPT is gone.  Ports 0x20, 0x21, 0xa0, 0xa1, 0x4d0 and
        0x4d1 belong to the PIC.  Raises KvmError: EEXIST when there is one, EINVAL after the first vCPU.
        """
        refusals: Refusals = {
            errno.EEXIST: (KvmError, "this VM has its interrupt controllers already."),
            errno.EINVAL: (KvmError, "it must be created before the first vCPU."),
        }
        self.ioctl_int(lib.KVM_CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP", refusals)
        self.has_irqchip = True

    def get_irqchips(self) -> IrqChips:
        """KVM_GET_IRQCHIP (api.rst 4.26, KVM_CAP_IRQCHIP) of all three.  Raises KvmError without any."""
        states = []
        for chip_id in _CHIPS:
            chip = ffi.new("struct pykvm_irqchip *", {"chip_id": chip_id})
            self.ioctl(lib.KVM_GET_IRQCHIP, chip, "KVM_GET_IRQCHIP", _REFUSALS)
            states.append(bytes(ffi.buffer(chip.chip)))
        return IrqChips(*states)

    def set_irqchips(self, chips: IrqChips) -> None:
        """KVM_SET_IRQCHIP (api.rst 4.27, KVM_CAP_IRQCHIP) of all three, the IOAPIC last.

        What is pending in the IOAPIC goes to the LAPICs at once.  Raises UsageError unless each has 512
        bytes, KvmError without controllers in the kernel.
        """
        states = (chips.pic_master, chips.pic_slave, chips.ioapic)
        for chip_id, state in zip(_CHIPS, states, strict=True):
            if len(state) != IRQCHIP_BYTES:
                raise UsageError(f"The state of an interrupt controller has 512 bytes, not {len(state)}.")
            chip = ffi.new("struct pykvm_irqchip *", {"chip_id": chip_id})
            ffi.memmove(chip.chip, state, IRQCHIP_BYTES)
            self.ioctl(lib.KVM_SET_IRQCHIP, chip, "KVM_SET_IRQCHIP", _REFUSALS)

    def set_irq_line(self, gsi: int, level: bool) -> int:
        """KVM_IRQ_LINE_STATUS (api.rst 4.25, KVM_CAP_IRQCHIP): set the level of an input.

        An edge is a set and a clear.  Returns what became of it: positive = delivered to so many CPUs,
        0 = coalesced with one still pending, -1 = masked or nowhere routed.  Raises KvmError (ENXIO)
        without controllers in the kernel.
        """
        line = ffi.new("struct kvm_irq_level *")
        fill(line, irq=gsi, level=int(level))
        self.ioctl(lib.KVM_IRQ_LINE_STATUS, line, "KVM_IRQ_LINE_STATUS", _REFUSALS)
        status: int = ffi.cast("__s32", line.irq)
        return int(status)

    def set_gsi_routing(self, routes: Iterable[ChipRoute | MsiRoute]) -> None:
        """KVM_SET_GSI_ROUTING (api.rst 4.52, KVM_CAP_IRQ_ROUTING): replaces all routes.

        The default after create_irqchip is GSI 0 to 15 to PIC and IOAPIC, 16 to 23 to the IOAPIC.  Raises
        UsageError for fields out of range, KvmError (EINVAL) for a chip, pin or GSI that does not exist.
        """
        table = list(routes)
        # SAFETY: KVM copies the ``nr`` entries before the ioctl returns.
        routing = ffi.new("struct pykvm_irq_routing *", {"nr": len(table), "entries": len(table)})
        for i, route in enumerate(table):
            entry = routing.entries[i]
            if isinstance(route, ChipRoute):
                fill(entry, gsi=route.gsi, type=lib.KVM_IRQ_ROUTING_IRQCHIP)
                fill(entry.u.irqchip, irqchip=route.chip, pin=route.pin)
            else:
                fill(entry, gsi=route.gsi, type=lib.KVM_IRQ_ROUTING_MSI)
                low, high = route.address & 0xFFFFFFFF, route.address >> 32
                fill(entry.u.msi, address_lo=low, address_hi=high, data=route.data)
        refusals: Refusals = {
            errno.EINVAL: (
                KvmError,
                "a route names a chip, pin or GSI that does not exist (KVM_CAP_IRQ_ROUTING tells how many), "
                "or the VM has no interrupt controller in the kernel.",
            )
        }
        self.ioctl(lib.KVM_SET_GSI_ROUTING, routing, "KVM_SET_GSI_ROUTING", refusals)

    def signal_msi(self, address: int, data: int) -> bool:
        """KVM_SIGNAL_MSI (api.rst 4.71, KVM_CAP_SIGNAL_MSI): deliver a message-signalled interrupt now.

        Returns whether a LAPIC took it.  Raises KvmError without LAPICs in the kernel.
        """
        message = ffi.new("struct kvm_msi *")
        fill(message, address_lo=address & 0xFFFFFFFF, address_hi=address >> 32, data=data)
        return self.ioctl(lib.KVM_SIGNAL_MSI, message, "KVM_SIGNAL_MSI", _REFUSALS) > 0

    def assign_irqfd(self, eventfd: int, gsi: int, *, resample: int | None = None) -> None:
        """KVM_IRQFD (api.rst 4.75, KVM_CAP_IRQFD): a write to the eventfd raises the GSI, without the VMM.

        With ``resample`` (another eventfd, KVM_CAP_IRQFD_RESAMPLE) the line stays up until the guest
        acknowledges, which that eventfd tells.  Raises KvmError: EBUSY when the pair exists, EBADF or
        EINVAL for what is no eventfd or without controllers in the kernel.
        """
        if resample is None:
            self._irqfd(eventfd, gsi, 0, 0)
        else:
            self.require(Capability.IRQFD_RESAMPLE, "A level-triggered irqfd")
            self._irqfd(eventfd, gsi, lib.KVM_IRQFD_FLAG_RESAMPLE, resample)

    def remove_irqfd(self, eventfd: int, gsi: int) -> None:
        """KVM_IRQFD (api.rst 4.75) to undo an assignment: no later write raises the GSI."""
        self._irqfd(eventfd, gsi, lib.KVM_IRQFD_FLAG_DEASSIGN, 0)

    def _irqfd(self, eventfd: int, gsi: int, flags: int, resample: int) -> None:
        request = ffi.new("struct kvm_irqfd *")
        fill(request, fd=eventfd, gsi=gsi, flags=flags, resamplefd=resample)
        refusals: Refusals = {
            errno.EBUSY: (KvmError, "this eventfd drives that GSI already."),
            errno.EBADF: (KvmError, f"descriptor {eventfd} is not open; make one with os.eventfd(0)."),
            errno.EINVAL: (
                KvmError,
                "it takes an eventfd, and a VM with interrupt controllers in the kernel.",
            ),
        }
        # SAFETY: KVM takes references of its own to the eventfds; closing ours later is fine.
        self.ioctl(lib.KVM_IRQFD, request, "KVM_IRQFD", refusals)
