"""Delivery of exceptions and interrupts (placeholder signatures; being written)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.model.cpu.faults import Fault

if TYPE_CHECKING:
    from pykvm.model.cpu.processor import Processor


def take_event(cpu: Processor) -> bool:
    """Deliver what is pending before the coming instruction; whether something was."""
    raise NotImplementedError


def deliver_fault(cpu: Processor, fault: Fault) -> None:
    """Enter the handler of a fault, with double and triple faults.  Raises TripleFault."""
    raise NotImplementedError
