"""Machines of the model whose memory is managed by KVM's MMU of a host profile (``pykvm.model.mmu``).

The processor executes as on that host: natively, through what ``VcpuMmu.translate`` allows, or in KVM's
emulator.  What a real KVM of the profile would report of it, the machine reports.
"""
