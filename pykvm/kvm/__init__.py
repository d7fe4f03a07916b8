"""The real machine: /dev/kvm, one class per kind of file descriptor."""

from pykvm.kvm.slots import MemorySlot
from pykvm.kvm.system import KvmSystem
from pykvm.kvm.vcpu import KvmVcpu
from pykvm.kvm.vm import KvmVm

__all__ = ["KvmSystem", "KvmVcpu", "KvmVm", "MemorySlot"]
